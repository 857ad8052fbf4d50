"""Train the flow, from text alone: text -> DiT -> frozen Whisper -> text.

    python train.py                     # minutes on a laptop, offline, with the embedded Whisper
    python train.py --latent mel        # spectrograms: the whole of Whisper hears them, in rooms
    python train.py --data fr=livre.txt builtin --whisper tiny      # --help lists all flags
    python train.py --resume            # go on where Ctrl-C stopped it
"""
from plumbing.errors import BadInput, as_bad_input, guard  # first, for Ctrl-C
import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from whisper.decoding import DecodingResult

import data
import flow
from model import OF_WHISPER, DiT, DiTConfig
from plumbing import devices
from plumbing.files import Log, atomic_write, fingerprint, locked
from plumbing.flags import check_flags, check_same, flag, parse_flags
from speech.align import durations_by
from speech.ear import Ear, Room
from text.error_rates import cer_by_language, error_rates
from text.long import MixedBatches  # data.Batches, with long and short texts too
from text.report import report, show_samples
from text.sources import load_data
from whisper_decoder import FrozenWhisper

LATENTS = dict(features=FrozenWhisper, mel=Ear)  # --latent -> its critic
MAY_CHANGE = "out_dir device resume eval_every eval_sentences batch_size whisper".split()
COLUMNS = ("step,seconds,loss,nll,flow,flow_t00_25,flow_t25_50,flow_t50_75,flow_t75_100,"
           "gradient_norm,learning_rate")  # losses of rank 0; nan: of no item in this step


@dataclass(frozen=True)
class Config:
    out_dir: str = flag("out", "folder for ckpt.pt, log.csv and result.txt")
    whisper: str = flag("pocket", "pocket, an official name, or a checkpoint file")
    latent: str = flag("features", "or mel: spectrograms, heard in random rooms", choices=LATENTS)
    data: tuple = flag(("builtin",), "sources of text, see docs/usage.md")
    speech: str = flag("", "folder of recordings to learn from as well, see docs/usage.md")
    max_lines: int = flag(10**6, "lines of a file that are read", 1)
    temperature: float = flag(3.0, "1: languages in proportion to their text; more: balanced", 1)
    speed: float = flag(1.0, "pace of the speech; 1 is natural", 0.1, 10)
    depth: int = flag(0, "size of the DiT: layers, heads, width / 32; 0: as wide as Whisper", 0, 65)
    steps: int = flag(900, "training steps", 1)
    batch_size: int = flag(24, "sentences per step, on all GPUs together", 1, 10**5)
    learning_rate: float = flag(2e-3, "peak, up to a width of 128; wider: in proportion less", 1e-9)
    warmup: int = flag(50, "steps to the peak; a cosine leads down from there", 1)
    weight_decay: float = flag(0.01, "AdamW", 0)
    clip: float = flag(1.0, "largest norm of the gradient", 1e-9)
    ema: float = flag(0.99, "largest decay of the averaged weights, which are evaluated", 0, 1)
    flow_weight: float = flag(0.3, "weight of the flow loss (not with --speech)", 0)
    drop_text: float = flag(0.1, "share of items without text and language, for guidance", 0, 1)
    eval_every: int = flag(300, "steps between samples and checkpoints", 1)
    eval_sentences: int = flag(250, "held-out sentences of the final evaluation", 1)
    init_from: str = flag("", "checkpoint to begin from; of mel also for another --whisper")
    seed: int = flag(0, "of everything random", 0, 2**31)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    resume: bool = flag(False, "go on from out_dir/ckpt.pt")

    def __post_init__(self):
        check_flags(self)
        if self.whisper.endswith(".pt"):  # to be found from another folder too
            object.__setattr__(self, "whisper", str(Path(self.whisper).absolute()))


# ---- the method ------------------------------------------------------------------------------


def objective(model, critic: FrozenWhisper, batch: data.Batch, x0: Tensor, t: Tensor, drop: Tensor,
              room: Room | None, flow_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> the loss of a step, a scalar; of each item its cross-entropy and flow loss, (B,) both."""
    # One solver step makes x1 from noise and text; the frozen Whisper reads it (an ear in a room).
    x1 = model(x0, torch.zeros_like(t), batch.cond)
    loss, nll = critic.text_loss(x1, batch, room)
    # Self-distillation: at every t the network learns to predict this x1, so that any number of
    # solver steps will do.
    cond = batch.cond | dict(drop=drop)  # some without their text, for guidance
    cfm = flow.cfm_loss(model, x0, x1.detach(), t, cond, batch.mask)
    return loss.mean() + flow_weight * cfm.mean(), nll, cfm


def draw_noise(batch: data.Batch, channels: int, drop_text: float,
               rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x0 (B, T, C), t (B,) stratified over [0, 1], shuffled as items come sorted, drop (B,)."""
    x0 = torch.randn(*batch.mask.shape, channels, generator=rng, device=rng.device)
    uniform = torch.rand(2, len(x0), generator=rng, device=rng.device)
    t = (torch.randperm(len(x0), generator=rng, device=rng.device) + uniform[0]) / len(x0)
    return x0, t, uniform[1] < drop_text


def learning_rate(step: int, width: int, config: Config) -> float:
    """Linear warm-up, then half a cosine down to a twentieth; lower in a wider network."""
    progress = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * min(1, 128 / width) * min((step + 1) / config.warmup, cosine)


@torch.no_grad()
def update_ema(ema: DiT, model: DiT, step: int, decay: float) -> None:
    """ema += (1 - d) (model - ema), in place, with d = min(decay, (1 + step) / (10 + step))."""
    for averaged, now in zip(ema.parameters(), model.parameters()):
        averaged.lerp_(now, 1 - min(decay, (1 + step) / (10 + step)))


# ---- evaluation ------------------------------------------------------------------------------


class RoundTrip(NamedTuple):
    """A text, what the flow made of it, and what the critic read."""

    sentence: data.Sentence
    x1: Tensor  # (T, C)
    features: Tensor  # (P, E)
    read: DecodingResult


@torch.no_grad()
def generate(model: DiT, whisper: FrozenWhisper, batch: data.Batch,
             solver: flow.Solver) -> Iterator[Tensor]:
    """The states of the flow, noise first, (B, T, C) each."""
    velocity = flow.model_velocity(model, batch.cond, solver.guidance)
    x0 = data.noise(batch, whisper.channels, solver.seed)
    yield from flow.sample(velocity, x0, solver.steps, solver.method)


def round_trips(model: DiT, whisper: FrozenWhisper, sentences: Sequence[data.Sentence],
                durations: Sequence[np.ndarray], solver: flow.Solver = flow.Solver(),
                change: Callable = lambda x1, batch: x1) -> Iterator[RoundTrip]:
    """Sentences, each with the durations of its characters (S,) -> greedy round trips, in order.

    change(x1, batch) -> x1: what sample.py --rooms does to it before it is read.
    """
    for i in tqdm(range(0, len(sentences), 50), "round trips", leave=False, delay=1):
        batch = data.make_batch(sentences[i : i + 50], whisper, durations[i : i + 50]).to(whisper)
        frames = batch.cond["frames"]
        x1 = change(flow.last(generate(model, whisper, batch, solver)), batch)
        features = whisper.features(x1, frames)
        read = whisper.transcribe(features, *zip(*batch.sentences))  # texts only save time
        x1 = [x[:n].clone() for x, n in zip(x1.cpu(), frames.tolist())]  # the padding goes
        yield from map(RoundTrip, batch.sentences, x1, features, read)


def evaluate(run: "Run", held_out: list) -> dict:
    """Greedy round trips of held-out text with 1 and 4 steps, and what chance would have."""
    sentences, start = data.per_language(held_out, run.config.eval_sentences), time.time()
    result = {"val_sentences": len(sentences)}
    for steps in (1, 4):
        hypotheses = run.transcribe_samples(sentences, flow.Solver(steps))
        for name, rate in error_rates(sentences, hypotheses)._asdict().items():
            result[f"val_{name}_{steps}step"] = rate
        for code, cer in cer_by_language(sentences, hypotheses).items():
            result[f"val_cer_{steps}step_{code}"] = cer
    others = hypotheses[1:] + hypotheses[:1]  # of 4 steps, each of another sentence
    chance = error_rates(sentences, others).cer if len(sentences) > 1 else math.nan
    return result | dict(cer_shuffled_text=chance, evaluation_seconds=time.time() - start)


# ---- the run ---------------------------------------------------------------------------------


class Run:
    """What a checkpoint keeps: network, its average, optimizer, step, flags; rhythm (the duration
    model from recordings, of each language), origin (digests of its inputs, and languages)."""

    def __init__(self, config: Config, whisper: FrozenWhisper, rhythm: dict | None = None,
                 shares: dict | None = None):
        torch.manual_seed(config.seed)  # the same weights in every process
        depth = config.depth or max(1, whisper.dims.n_audio_state // 32)
        shape = DiTConfig(whisper.channels, whisper.dims.n_text_state, depth, bound=whisper.bound,
                          max_frames=whisper.max_frames)
        self.config, self.whisper, self.rhythm = config, whisper, rhythm
        self.step, self.path = 0, Path(config.out_dir) / "ckpt.pt"
        self.durations = durations_by(rhythm)
        languages = {s.language for s in shares or ()} | {*(rhythm["chars"] if rhythm else ())}
        self.origin = dict(whisper=whisper.fingerprint, text=fingerprint(shares),
                           speech=fingerprint(rhythm), languages=sorted(languages))
        self.model = DiT(shape).to(whisper.device)
        self.model.init_shortcut(*whisper.shortcut())
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), fused=True,
                                           weight_decay=config.weight_decay)

    def save(self, log: Log) -> None:
        """Write ckpt.pt, whole or not at all; then this run's log replaces an older one."""
        states = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        states |= dict(step=self.step, rhythm=self.rhythm, origin=self.origin,
                       config=asdict(self.config), model_config=asdict(self.model.config))
        with atomic_write(self.path, log.keep) as part, open(part, "wb") as file:
            torch.save(states, file)

    def load(self, checkpoint: dict) -> None:
        """Go on from a checkpoint; BadInput if its origin or a flag not in MAY_CHANGE differs."""
        flags = {name: x for name, x in asdict(self.config).items() if name not in MAY_CHANGE}
        check_same(self.path, checkpoint["config"], flags, "--out_dir")
        check_same(self.path, checkpoint["origin"], self.origin, "--out_dir", things=self.origin)
        self.step = checkpoint["step"]
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(checkpoint[name])

    def begin_with(self, checkpoint: dict) -> None:
        """Take the averaged weights of another run of the same shape. Raises BadInput.

        Spectrograms may be for another Whisper: only the layers OF_WHISPER begin anew.
        """
        theirs, own = checkpoint["model_config"], asdict(self.model.config)
        is_same = checkpoint["origin"]["whisper"] == self.origin["whisper"]
        if not is_same:
            theirs |= {name: own[name] for name in ("embedding", "max_frames")}
        if theirs != own or not (is_same or own["bound"] == "tanh"):
            raise BadInput(f"{self.config.init_from} needs its --latent, --depth {theirs['depth']} "
                           "and --whisper (mel: any with as many mel bins)")
        weights = {name: x for name, x in checkpoint["ema"].items()
                   if is_same or name.split(".")[0] not in OF_WHISPER}
        for network in (self.model, self.ema):
            network.load_state_dict(weights, strict=is_same)

    def transcribe_samples(self, sentences: Sequence[data.Sentence],
                           solver: flow.Solver = flow.Solver()) -> list[str]:
        """What the critic reads of what the averaged network says."""
        durations = [self.durations(s, self.config.speed) for s in sentences]
        trips = round_trips(self.ema, self.whisper, sentences, durations, solver)
        return [trip.read.text for trip in trips]


def load_checkpoint(path: Path) -> dict:
    """What `Run.save` saved; BadInput if it is missing or something else."""
    path = path if path.is_file() or path.suffix == ".pt" else path / "ckpt.pt"
    if not path.is_file():
        raise BadInput(f"no checkpoint {path}; `python train.py --out_dir {path.parent}` makes one")
    with as_bad_input(f"{path} cannot be used as a checkpoint of this train.py",
                      "give another, or train again"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"] = asdict(Config(**checkpoint["config"]))
        model = DiT(DiTConfig(**checkpoint["model_config"]))
        for weights in checkpoint["model"], checkpoint["ema"]:
            model.load_state_dict(weights)
        groups = checkpoint["optimizer"]["param_groups"]  # to build an AdamW takes seconds
        if not (durations_by(checkpoint["rhythm"]) and checkpoint["origin"]["whisper"]
                and all(x.isfinite().all() for x in checkpoint["ema"].values())
                and checkpoint["step"] in range(checkpoint["config"]["steps"] + 1)
                and [len(x["params"]) for x in groups] == [len(list(model.parameters()))]):
            raise ValueError("weights that are not finite, an impossible step or optimizer")
        return checkpoint


def train(run: Run, batches: Dataset, held_out: list, run_objective: Callable = objective,
          rank: int = 0, n_ranks: int = 1) -> None:
    """The loop: batch, noise, objective, backward, clip, step, EMA, log; samples and saves."""
    config, whisper, device, start = run.config, run.whisper, run.whisper.device, time.time()
    loader = DataLoader(batches, batch_size=None, sampler=range(run.step, config.steps),
                        **devices.workers(device, n_ranks))
    bar = tqdm(loader, "training", config.steps, initial=run.step, disable=rank > 0)
    log = Log(run.path.with_name("log.csv"), COLUMNS, run.step) if rank == 0 else None
    with devices.catch_interrupts() as stops:
        for batch in bar:
            batch = devices.shard(batch, rank, n_ranks).to(whisper)  # all ranks make the same one
            # A random stream of its own: not the batch's, and not another rank's.
            rng = data.generator(config.seed, 2**31 + run.step * n_ranks + rank, device)
            x0, t, drop = draw_noise(batch, whisper.channels, config.drop_text, rng)
            room = whisper.room_of_step(run.step, config.steps, rng)  # None but for the ear
            with devices.mixed_precision(device, whisper.dims.n_text_state):
                loss, nll, cfm = run_objective(run.model, whisper, batch, x0, t, drop, room,
                                               config.flow_weight)
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stopped = devices.average_gradients(run.model, bool(stops))  # Ctrl-C on any rank?
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
            if not math.isfinite(norm):
                raise BadInput(f"the loss is {loss.item()} at step {run.step}, its gradient {norm};"
                               f" try a smaller --learning_rate than {config.learning_rate}")
            rate = learning_rate(run.step, run.model.config.width, config)
            run.optimizer.param_groups[0]["lr"] = rate
            run.optimizer.step()
            update_ema(run.ema, run.model, run.step, config.ema)
            quarters = [cfm[(4 * t).long() == i] for i in range(4)]
            losses = torch.stack([x.mean() for x in (loss, nll, cfm, *quarters)]).tolist()
            bar.set_postfix(nll=f"{losses[1]:.3f}", flow=f"{losses[2]:.3f}",
                            GB=f"{devices.peak_memory(device):.1f}", refresh=False)
            if log:
                log.write(run.step, time.time() - start, *losses, norm.item(), rate)
            run.step += 1
            is_due = stopped or run.step % config.eval_every == 0 or run.step == config.steps
            if is_due and log:
                run.save(log)
                show_samples(run, held_out)
            if stopped:
                devices.wait_for_all()  # until it is saved
                raise BadInput(f"stopped and saved at step {run.step}; --resume goes on from there")


def main(argv=None) -> dict:
    """The run that the flags describe -> its figures."""
    start, config = time.time(), parse_flags(Config, __doc__.splitlines()[0], argv)
    folder, device = Path(config.out_dir), devices.choose_device(config.device)
    rank, n_ranks = devices.start_ranks(device, config.batch_size)
    with locked(folder, rank):
        start_from = folder / "ckpt.pt" if config.resume else config.init_from
        checkpoint = load_checkpoint(Path(start_from)) if start_from else None
        run_objective, rhythm = objective, None
        with devices.first_rank_first(rank):  # it downloads and encodes for all
            whisper = LATENTS[config.latent](config.whisper, device)
            shares, notes = load_data(config.data, whisper, config.speed, config.temperature,
                                      config.max_lines)
            training, held_out = data.split(list(shares))
            batches = MixedBatches({s: shares[s] for s in training}, whisper, config.batch_size,
                                   config.seed, config.speed, whisper.speed_range, held_out)
            if config.speech:
                from speech.recordings import with_recordings
                batches, run_objective, rhythm, more = with_recordings(batches, held_out, config)
                notes += more
        run = Run(config, whisper, rhythm, shares)
        if checkpoint:
            (run.load if config.resume else run.begin_with)(checkpoint)
            checkpoint.clear()  # training needs the memory
        n_parameters = sum(p.numel() for p in run.model.parameters())
        if rank == 0:
            print(*(f"note: {note}" for note in notes), f"{config.whisper} on {n_ranks} x {device};"
                  f" {len(training)} sentences to train on, {len(held_out)} held out, in "
                  f"{', '.join(run.origin['languages'])}; {n_parameters:,} parameters", sep="\n")
        train(run, batches, held_out, run_objective, rank, n_ranks)
        devices.stop_ranks()
        if rank > 0:  # the first evaluates alone
            return {}
        return report(folder / "result.txt", device=device, steps=run.step,
                      parameters=n_parameters, peak_memory_gb=devices.peak_memory(device),
                      **evaluate(run, held_out), seconds=time.time() - start)


if __name__ == "__main__":
    guard(main)
