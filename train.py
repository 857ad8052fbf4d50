"""Train the flow, from text alone or with recordings: text -> DiT -> frozen Whisper -> text.

    python train.py                     # minutes on a laptop, offline, with the embedded decoder
    python train.py --prior none        # the same from white noise: nothing is known of speech
    python train.py --latent mel        # spectrograms: the whole of Whisper hears them, in rooms
    python train.py --data fr=livre.txt builtin --whisper tiny
    python train.py --resume            # go on where Ctrl-C stopped it
    torchrun --nproc_per_node=4 train.py --batch_size 96        # several GPUs
    python train.py --help              # every field of Config is a flag
"""
import argparse
import copy
import dataclasses
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import flow
from model import DiT, DiTConfig
from sample import LATENTS, Settings, load_checkpoint, rates, round_trip
from whisper_decoder import BadInput, FrozenWhisper, Room, choose_device


COND_VARIANCE = 0.1  # of recordings given their text: about the flow loss at t < 0.25
SOLVER_STEPS = 4  # of the round trip beside recordings, as many as `sample.py` takes
SPEED_RANGE = dict(features=1.7, mel=1.25)  # what one can still hear in rooms
RAMP = (0.08, 0.38)  # of the run, while an ear's rooms grow: first it learns to be read at all


def setting(default, help, low=None, below=math.inf):
    """A field of Config; numbers must be at least low, and below `below`."""
    return field(default=default, metadata=dict(help=help, low=low, below=below))


@dataclass(frozen=True)
class Config:
    out_dir: str = setting("out", "folder for ckpt.pt and log.csv")
    whisper: str = setting("pocket", "decoder: pocket, an official name, or a checkpoint file")
    latent: str = setting("features", "what the flow makes: features, which the decoder reads; or "
                          "mel, a spectrogram that the whole Whisper hears in random rooms")
    data: tuple = setting(("builtin",), "sources of text: see data.load")
    temperature: float = setting(3.0, "1: languages in proportion to their text; more: balanced", 1)
    speech: str = setting("", "folder of recordings, with manifest.tsv (path, language, text)")
    speech_share: float = setting(0.75, "share of the steps, the first, for --speech alone; 1: all",
                                  0, 1.01)
    text_weight: float = setting(0.2, "with --speech: weight of the round trip, which joins it", 0)
    speed: float = setting(1.0, "pace of the speech; 1 is natural", 0.1, 10)
    speed_range: float = setting(0.0, "sentences are up to so many times slower or faster; 0: 1.7, "
                                 "or 1.25 for spectrograms, as people do", 0, 10)
    depth: int = setting(0, "size of the DiT: layers, heads, width / 32; 0: as wide as Whisper", 0)
    steps: int = setting(1200, "training steps", 1)
    batch_size: int = setting(24, "sentences per step, on all GPUs together", 4)
    learning_rate: float = setting(2e-3, "peak, up to a width of 128; wider: in proportion less", 0)
    warmup: int = setting(50, "steps to the peak; a cosine leads down from there", 1)
    weight_decay: float = setting(0.01, "AdamW", 0)
    clip: float = setting(1.0, "largest norm of the gradient", 1e-9)
    ema: float = setting(0.99, "decay of the averaged weights, which are evaluated", 0, 1)
    flow_weight: float = setting(0.3, "without --speech: weight of the flow loss", 0)
    prior: str = setting("auto", "what speech is likely to be, where the flow begins: a file of "
                         "experiments/listen.py; none: white noise; auto: pocket's own with "
                         "pocket, none with --speech or another decoder")
    transport_weight: float = setting(0.03, "with a prior: weight of the way from there", 0)
    drop_text: float = setting(0.1, "share of items without text, for guidance", 0, 1)
    eval_every: int = setting(400, "steps between samples and checkpoints", 1)
    eval_sentences: int = setting(250, "held-out sentences of the final evaluation", 1)
    seed: int = setting(0, "of everything random", 0, 2**31)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    compile: bool = setting(False, "torch.compile the DiT")
    resume: bool = setting(False, "go on from out_dir/ckpt.pt")

    def __post_init__(self):
        if self.latent not in LATENTS:
            raise BadInput(f"--latent {self.latent!r} is none of {', '.join(LATENTS)}")
        if 0 < self.speed_range < 1:
            raise BadInput(f"--speed_range {self.speed_range} cannot be used; at least 1, or 0")
        for f in dataclasses.fields(self):
            low, below, value = f.metadata["low"], f.metadata["below"], getattr(self, f.name)
            if low is not None and not low <= value < below:
                limit = f" and below {below}" if below < math.inf else ""
                raise BadInput(f"--{f.name} {value} cannot be used; at least {low}{limit}")


def parse_config(argv=None) -> Config:
    """The command line is made from the fields of Config."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        kind = dict(type=type(f.default))
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(f.default, tuple):
            kind = dict(nargs="+")
        help = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument(f"--{f.name}", default=f.default, help=help, **kind)
    args = vars(parser.parse_args(argv))
    return Config(**{**args, "data": tuple(args["data"])})


# ---- one step --------------------------------------------------------------------------------


class Draws(NamedTuple):
    """What is random in a step, beside its sentences."""

    x0: Tensor  # (B, T, C); white noise before `to_device`
    t: Tensor  # (B,)
    drop: Tensor  # (B,) bool, items without their condition


def draw(step: int, text: data.Corpus, speech: data.Corpus | None, whisper,
         config: Config) -> tuple[data.Batch, Draws]:
    """Everything random in one step, from seed and step alone; on the CPU."""
    rng = data.generator(config.seed, step)
    n, is_first = config.batch_size, step < config.speech_share * config.steps
    corpus = speech if speech and (is_first or step % 2) else text
    picks = torch.multinomial(corpus.weights, 4 * n, replacement=True, generator=rng)
    picks = picks[corpus.frames[picks].argsort(stable=True)]  # so little is padded
    first = n * int(torch.randint(4, (), generator=rng))
    picks = picks[first : first + n]
    x1 = corpus.x1 and [corpus.x1[i] for i in picks]
    speed_range = config.speed_range or SPEED_RANGE[config.latent]
    pace = config.speed * speed_range ** (2 * torch.rand(n, generator=rng).numpy() - 1)
    lasting = [corpus.lasting[i] / (1 if x1 else p) for i, p in zip(picks, pace)]  # or as recorded
    sentences = [corpus.sentences[i] for i in picks]
    batch = data.collate(sentences, whisper, lasting, x1, corpus.prior)
    white = torch.randn(*batch.cond["token"].shape, whisper.channels, generator=rng)
    t = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n  # spread over [0, 1]
    drop = torch.rand(n, generator=rng) < config.drop_text
    return batch, Draws(white, t, drop)


def to_device(batch: data.Batch, draws: Draws, whisper) -> tuple[data.Batch, Draws]:
    """What `draw` made, where the decoder is; the flow begins where a prior says."""
    draws = Draws(*(x.to(whisper.device) for x in draws))
    return data.to_device(batch, whisper), draws._replace(x0=data.first_state(draws.x0, batch))


class Steps(torch.utils.data.Dataset):
    """steps[step] is what `draw` makes, so that a DataLoader can have it ready in time."""

    def __init__(self, corpus_of: Callable[[int], data.Corpus], speech: data.Corpus | None,
                 whisper: FrozenWhisper, config: Config):
        self.corpus_of, self.speech, self.whisper, self.config = corpus_of, speech, whisper, config

    def corpus(self, step: int) -> data.Corpus:
        return self.corpus_of(step * self.config.batch_size // data.SHARD)

    def __getitem__(self, step: int) -> tuple[data.Batch, Draws]:
        try:
            return draw(step, self.corpus(step), self.speech, self.whisper, self.config)
        except BadInput as error:  # a loader would raise it with all of its traceback
            return error, None


def batches(steps: Steps, first: int, n_workers: int):
    """What `draw` makes of one step after another, some of it ahead, in so many processes."""
    steps.corpus(first)  # read once, before they fork
    loader = torch.utils.data.DataLoader(
        steps, None, sampler=range(first, steps.config.steps), num_workers=n_workers,
        multiprocessing_context="fork" if n_workers else None)
    for batch, draws in loader:
        if isinstance(batch, BadInput):
            raise batch
        yield batch, draws


class Losses(NamedTuple):
    """Of each item, (B,); 0 where there is none."""

    cross_entropy: Tensor  # of the round trip, nats per token
    flow: Tensor
    transport: Tensor  # mean square of the way from likely speech to x1


def losses(model, whisper: FrozenWhisper, batch: data.Batch, draws: Draws,
           beside_speech: bool = False) -> Losses:
    """What a step learns from.

    Recordings have their x1: only the flow has to be learned, the cross-entropy is 0. From text
    alone, x1 is where the sampler itself arrived from x0, taken as a constant (such pairs are those
    of reflow, Liu et al. 2022, arXiv 2209.03003): every t learns to point there, and any number of
    steps can be taken afterwards; where that should be, only the cross-entropy says. Beside
    recordings these say it, so text has no flow loss, and its cross-entropy passes all steps of
    the sampler: it may bend the path a little, and not leave it. With a prior x0 is likely speech,
    and the way from there to x1 has its cost.
    """
    x0, t, drop = draws
    frames, x1, cross_entropy = batch.cond["frames"], batch.x1, torch.zeros_like(t)
    transport = torch.zeros_like(t)
    is_speech = torch.arange(x0.shape[1], device=x0.device) < frames[:, None]
    if x1 is None:
        steps = SOLVER_STEPS if beside_speech else 1
        x1 = flow.sample(flow.model_velocity(model, batch.cond), x0, steps)
        cross_entropy = whisper.reading_loss(x1, batch.cond, batch.targets)
        if beside_speech:
            return Losses(cross_entropy, torch.zeros_like(t), transport)
        if batch.likely[0]:
            transport = flow.cfm_loss(x1, x0, is_speech)
        x1 = x1.detach()
    x1_hat = model(flow.path(x0, x1, t), t, {**batch.cond, "drop": drop})
    return Losses(cross_entropy, flow.cfm_loss(x1_hat, x1, is_speech), transport)


def room_of(run, device: torch.device) -> Room:
    """Where an ear hears the spectrograms of this step; each GPU's elsewhere.

    Rooms are weak as often as strong: what is only ever heard in strong ones is read worse in none.
    """
    step, config = run.step, run.config
    first, last = RAMP
    most = min(max((step / config.steps - first) / (last - first), 0.0), 1.0)
    rng = data.generator(config.seed, step * run.n_ranks + run.rank, device)
    return Room(most * torch.rand((), generator=rng, device=device).item(), rng)


def part_of_rank(batch: data.Batch, draws: Draws, rank: int,
                 n_ranks: int) -> tuple[data.Batch, Draws]:
    """Every n_ranks-th item of a batch, for one of several GPUs."""
    mine = slice(rank, None, n_ranks)
    cond = {name: x[mine] for name, x in batch.cond.items()}
    x1 = None if batch.x1 is None else batch.x1[mine]
    part = data.Batch(batch.sentences[mine], cond, batch.targets[mine], x1, batch.likely[mine])
    return part, Draws(*(x[mine] for x in draws))


def average_gradients(model: DiT, stop: bool, n_ranks: int) -> bool:
    """Gradients become their mean over all GPUs; true if one of these is to stop."""
    if n_ranks == 1:
        return stop
    stops = torch.tensor(float(stop), device=next(model.parameters()).device)
    for x in [*(p.grad for p in model.parameters()), stops]:
        dist.all_reduce(x.div_(n_ranks))
    return bool(stops > 0)


def learning_rate(step: int, width: int, config: Config) -> float:
    """Linear warm-up, then half a cosine down to a twentieth; lower in a wider network."""
    progress = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, progress)))
    return config.learning_rate * min(1, 128 / width) * min((step + 1) / config.warmup, cosine)


@torch.no_grad()
def update_ema(ema: DiT, model: DiT, step: int, config: Config) -> None:
    """ema += (1 - decay) (model - ema), in place; young averages forget faster."""
    decay = min(config.ema, (1 + step) / (10 + step))
    for averaged, now in zip(ema.parameters(), model.parameters()):
        averaged.lerp_(now, 1 - decay)


# ---- evaluation ------------------------------------------------------------------------------


def balanced(sentences: list, n: int) -> list:
    """Equally many sentences of every language, n in all (rounded up) or as many as there are."""
    languages = list(dict.fromkeys(s.language for s in sentences))
    each = math.ceil(n / len(languages))
    return [s for c in languages for s in [s for s in sentences if s.language == c][:each]]


def read_back(run, whisper: FrozenWhisper, sentences: list, steps: int = 4) -> list:
    """What the frozen decoder reads in the features that the averaged flow makes of sentences."""
    lasting = [data.letter_lengths(s, run.config.speed, run.model.prior) for s in sentences]
    return round_trip(run.ema, whisper, sentences, Settings(steps), lasting).read


def evaluate(run, whisper: FrozenWhisper, held_out: list) -> dict:
    """Greedy round trips of held-out text with 1 and 4 steps, and rates to compare with."""
    sentences = balanced(held_out, run.config.eval_sentences)
    result = {"val_sentences": len(sentences)}
    for steps in (1, 4):
        read = read_back(run, whisper, sentences, steps)
        result |= {f"val_{name}_{steps}step": rate
                   for name, rate in rates(sentences, read)._asdict().items()}
        for code in dict.fromkeys(s.language for s in sentences):
            pairs = [(s, r) for s, r in zip(sentences, read) if s.language == code]
            result[f"val_cer_{steps}step_{code}"] = rates(*zip(*pairs)).cer

    # Chance: the text of another sentence, and x0 in place of x1.
    read = read_back(run, whisper, sentences[1:] + sentences[:1])
    result["cer_shuffled_text"] = rates(sentences, read).cer
    some = balanced(sentences, 50)
    lasting = [data.letter_lengths(s, run.config.speed, run.model.prior) for s in some]
    batch = data.make_batch(some, whisper, lasting, prior=run.model.prior)
    x0 = data.noise(batch, whisper.channels, 0)
    features = whisper.features(x0, batch.cond["frames"])
    read = whisper.transcribe(features, [s.language for s in some])
    result["cer_x0"] = rates(some, read).cer

    # What the decoder makes of real speech, where ours fits the checkpoint.
    spoken, clips = data.spoken_sentences(whisper)
    some = slice(None, None, max(1, len(spoken) // run.config.eval_sentences))
    spoken, clips = spoken[some], clips[some]
    read = data.transcribe_clips(clips, [s.language for s in spoken], whisper)
    result["cer_real_speech"] = rates(spoken, read).cer if spoken else math.nan
    return result


def show_samples(run, whisper: FrozenWhisper, held_out: list) -> None:
    """One held-out sentence of each of up to five languages, with 4 steps."""
    sentences = balanced(held_out, 1)[:5]
    tqdm.write(f"step {run.step}", file=sys.stdout)
    for (code, text), r in zip(sentences, read_back(run, whisper, sentences)):
        tqdm.write(f"  {code}  {text}  ->  {r.text}", file=sys.stdout)


# ---- the run ---------------------------------------------------------------------------------


class Run:
    """Everything that a checkpoint keeps: network, its average, optimizer, step."""

    def __init__(self, config: Config, whisper: FrozenWhisper, has_speech: bool = False,
                 prior: dict | None = None, rank: int = 0, n_ranks: int = 1):
        torch.manual_seed(config.seed)
        if config.batch_size % n_ranks:
            raise BadInput(f"--batch_size {config.batch_size} cannot be shared by {n_ranks} "
                           "processes; give a multiple of their number")
        depth = config.depth or max(1, whisper.dims.n_audio_state // 32)
        # Of its own making x1 hardly varies, and the skip would only carry noise into it.
        cond_variance = COND_VARIANCE if has_speech and whisper.sphere else 0.0
        shape = DiTConfig(whisper.channels, whisper.dims.n_text_state, depth, sphere=whisper.sphere,
                          cond_variance=cond_variance, has_prior=data.has_sounds(prior))
        self.config, self.step, self.rank, self.n_ranks = config, 0, rank, n_ranks
        self.model = DiT(shape, prior).to(whisper.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.learning_rate, (0.9, 0.99),
            weight_decay=config.weight_decay,
        )
        self.path = Path(config.out_dir) / "ckpt.pt"
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def prepare(self, problems: list[str]) -> None:
        """Tell what is wrong with the data; keep an earlier run, if this one does not go on."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if len(problems) > 10:
                notes = self.path.with_name("notes.txt")
                notes.write_text("\n".join(problems) + "\n", "utf-8")
            for file in (self.path, self.path.with_name("log.csv")):
                if file.exists() and not self.config.resume:
                    os.replace(file, file.with_suffix(".old"))
                    print(f"note: {file} of an earlier run is kept as {file.with_suffix('.old')}")
            self.path.with_name("log.csv").open("a").close()
        except OSError as error:
            raise BadInput(f"cannot write to --out_dir {self.config.out_dir}: {error.strerror}"
                           ) from error
        for problem in problems[:10]:
            print(f"note: {problem}")
        if len(problems) > 10:
            print(f"note: {len(problems) - 10} more notes are in {notes}")

    def save(self) -> None:
        """There is always one whole checkpoint."""
        checkpoint = dict(
            model_config=asdict(self.model.config), config=asdict(self.config), step=self.step,
            prior=self.model.prior, model=self.model.state_dict(), ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        with data.writing(self.path) as part, open(part, "wb") as file:
            torch.save(checkpoint, file)

    def load(self) -> None:
        """Go on from the checkpoint; BadInput if it was made with another configuration."""
        checkpoint = load_checkpoint(self.path)
        free = {"out_dir", "device", "compile", "resume", "eval_every", "eval_sentences"}
        for name, now in asdict(self.config).items():
            before = checkpoint["config"].get(name)
            if name not in free and before != now:
                raise BadInput(f"{self.path} was trained with --{name} {before}, not {now}; give "
                               "the same, or another --out_dir")
        before, now = ({(code, name): x.tolist() if torch.is_tensor(x) else x
                        for code, heard in prior.items() for name, x in heard.items()}
                       for prior in (checkpoint["prior"], self.model.prior))
        if before != now:
            raise BadInput(f"{self.path} was trained with other recordings or another prior; give "
                           "the same, or another --out_dir")
        if DiTConfig(**checkpoint["model_config"]) != self.model.config:
            raise BadInput(f"{self.path} has another network than this train.py makes; train anew, "
                           "with another --out_dir")
        self.step = checkpoint["step"]
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(checkpoint[name])


def train(run: Run, whisper: FrozenWhisper, corpus_of: Callable[[int], data.Corpus],
          speech: data.Corpus | None, held_out: list) -> None:
    """The loop: batch, noise, path, prediction, losses, backward, clip, step, EMA, log.

    corpus_of(shard) is the text that may be drawn in this part of the run (data.read_lines).
    """
    config, device = run.config, whisper.device
    model = torch.compile(run.model, dynamic=True) if config.compile else run.model
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    start, stopped, tell = time.time(), False, run.rank == 0
    weights = ((config.text_weight, 1, 0) if speech else
               (1, config.flow_weight, config.transport_weight))
    bar = tqdm(total=config.steps, initial=run.step, desc="training", disable=not tell)
    can_fork = device.type == "cuda" and hasattr(os, "fork")
    n_workers = min(4, (os.cpu_count() or 1) // (2 * run.n_ranks)) if can_fork else 0
    steps = batches(Steps(corpus_of, speech, whisper, config), run.step, n_workers)
    with bar, open_log(run) as log, stop_on_ctrl_c() as stop:
        for batch, draws in steps:
            batch, draws = to_device(*part_of_rank(batch, draws, run.rank, run.n_ranks), whisper)
            critic = whisper.enter(room_of(run, device))
            with autocast:
                parts = losses(model, critic, batch, draws, bool(speech))
            loss = sum(weight * part.mean() for weight, part in zip(weights, parts))
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stopped = average_gradients(run.model, stop.is_set(), run.n_ranks)
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
            if not math.isfinite(norm):
                raise BadInput(f"the loss is {loss.item()} at step {run.step}, its gradient {norm};"
                               f" try a smaller --learning_rate than {config.learning_rate}")
            rate = learning_rate(run.step, run.model.config.width, config)
            run.optimizer.param_groups[0]["lr"] = rate
            run.optimizer.step()
            update_ema(run.ema, run.model, run.step, config)
            log.write(log_row(run, start, loss, parts, draws.t, norm, rate))
            run.step += 1
            bar.update()
            bar.set_postfix(ce=f"{parts.cross_entropy.mean():.3f}", flow=f"{parts.flow.mean():.3f}")
            if run.step % config.eval_every == 0 and tell:
                run.save()
                show_samples(run, whisper, held_out)
            if stopped:
                break
    if tell:
        run.save()
    if stopped:
        exit_with(f"stopped and saved at step {run.step}; the same command with --resume goes on "
                  "from there")


@contextmanager
def stop_on_ctrl_c():
    """Ctrl-C sets the event, so that the step can end and be saved."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# Of a process's own part of the batch; flow_t..: nan where no item of it has such a t. With
# recordings each step has the cross-entropy or the flow loss, and the other is 0.
LOG = ["step", "seconds", "loss", "cross_entropy", "flow", "transport", "flow_t00_25",
       "flow_t25_50", "flow_t50_75", "flow_t75_100", "gradient_norm", "learning_rate"]


def open_log(run: Run):
    """log.csv, one row a step; a resumed run cuts it back to its checkpoint and goes on."""
    path = run.path.with_name("log.csv" if run.rank == 0 else f"log{run.rank}.csv")
    old = path.read_text().splitlines()[1 : run.step + 1] if run.step and path.exists() else []
    file = open(path, "w", buffering=1)
    file.write("\n".join([",".join(LOG), *old]) + "\n")
    return file


def log_row(run: Run, start: float, loss: Tensor, parts: Losses, t, norm, rate) -> str:
    """The values of LOG; the flow loss also by quarters of t."""
    quarters = [parts.flow[(4 * t).long() == i].mean() for i in range(4)]
    values = [loss, *(part.mean() for part in parts), *quarters, norm]
    values = torch.stack(values).tolist()
    values = [f"{time.time() - start:.2f}", *(f"{v:.5f}" for v in values), f"{rate:.3e}"]
    return ",".join([str(run.step), *values]) + "\n"


def ranks(device: torch.device) -> tuple[int, int]:
    """This process among those of torchrun, which start to work together: rank, number."""
    n_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if n_ranks > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        patience = timedelta(days=1)  # while the first downloads, hears, evaluates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return (dist.get_rank(), n_ranks) if n_ranks > 1 else (0, 1)


class Material(NamedTuple):
    """What a run learns from."""

    corpus_of: Callable[[int], data.Corpus]  # text of a part of the run, see data.read_lines
    speech: data.Corpus | None
    prior: dict  # see data.fit_prior
    held_out: list
    problems: list[str]


def choose_prior(config: Config, whisper: FrozenWhisper, has_speech: bool) -> dict:
    """What --prior names, see data.fit_prior; recordings come with one of their own."""
    if config.prior in ("auto", "none"):
        is_shipped = (config.prior == "auto" and config.whisper == "pocket" and not has_speech
                      and config.latent == "features")
        return data.load_prior(data.PRIOR, whisper) if is_shipped else {}
    if has_speech:
        raise BadInput(f"--prior {config.prior} is for training without recordings; give it, or "
                       "--speech")
    return data.load_prior(Path(config.prior), whisper)


def gather(config: Config, whisper: FrozenWhisper, speech: data.Corpus | None) -> Material:
    """The text and the recordings that the flags name; or the recordings of a study."""
    prior = choose_prior(config, whisper, bool(config.speech or speech))
    load = partial(data.load, config.data, whisper, config.speed, config.temperature, prior=prior)
    found, problems = load(), []  # before anything is heard: a wrong flag is found at once
    if config.speech:
        speech, problems = data.load_speech(Path(config.speech), whisper)
    if speech:
        prior = data.fit_prior(speech.sentences, speech.lasting)
        load = partial(load, prior=prior)
        found = load()

    @lru_cache(1)
    def corpus_of(shard: int) -> data.Corpus:
        weights = load(shard=shard).weights if shard else found.weights
        return data.text_corpus(data.split(list(weights))[0], weights, prior)

    if data.has_sounds(prior) and (unheard := {s.language for s in found.weights} - set(prior)):
        problems.append(f"the prior has not heard {', '.join(sorted(unheard))}: all texts in it "
                        "begin at one mean frame")
    _, held_out = data.split(list(found.weights))
    return Material(corpus_of, speech, prior, held_out, found.problems + problems)


def main(argv=None, speech: data.Corpus | None = None,
         whisper: FrozenWhisper | None = None) -> dict:
    """The run that the flags describe -> its figures; a study may bring what it changes."""
    start, config = time.time(), parse_config(argv)
    device = choose_device(config.device)
    rank, n_ranks = ranks(device)
    if rank > 0:
        dist.barrier()  # until the first has downloaded, heard, and made the folder
    whisper = whisper or LATENTS[config.latent](config.whisper, device)
    corpus_of, speech, prior, held_out, problems = gather(config, whisper, speech)
    run = Run(config, whisper, bool(speech), prior, rank, n_ranks)
    if rank == 0:
        run.prepare(problems)
        training = corpus_of(0).sentences
        languages = ", ".join(sorted({s.language for s in [*training, *held_out]}))
        print(f"{config.whisper} on {n_ranks} x {device}; {len(training)} sentences to train on, "
              f"{len(held_out)} held out, in {languages}; {run.parameters:,} parameters")
        if speech:
            minutes = speech.frames.sum() / data.FRAMES_PER_SECOND / 60
            print(f"{len(speech.sentences)} recordings, {minutes:.1f} minutes of speech")
        if n_ranks > 1:
            dist.barrier()
    if config.resume:
        run.load()
    train(run, whisper, corpus_of, speech, held_out)
    if n_ranks > 1:
        dist.destroy_process_group()
    if rank > 0:
        return {}
    result = evaluate(run, whisper, held_out)
    result = dict(device=device, seconds=time.time() - start, steps=run.step,
                  parameters=run.parameters) | result
    for name, value in result.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    return result


def exit_with(why: str) -> None:
    """One sentence for all processes of torchrun."""
    sys.exit(f"train.py: {why}" if os.environ.get("RANK", "0") == "0" else 1)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        exit_with(str(error))
    except torch.OutOfMemoryError:
        exit_with("out of GPU memory; try a smaller --batch_size, --depth or --eval_sentences")
    except KeyboardInterrupt:
        exit_with("stopped; the last checkpoint, if there is one, is whole")
