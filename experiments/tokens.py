"""Sound tokens: a quantiser of WhisperVQ's recipe, and its tokens in the forms of other projects.

    python experiments/tokens.py espeak --out out/tokens                  # of its speech
    python experiments/tokens.py out/mel/ckpt.pt --out out/made_tokens    # of a flow's speech
    python experiments/tokens.py --quantiser out/tokens/quantiser.pt --set out/set --part 2/8

The last writes tokens of a data set of `sample.py --out out/set`, a file for each shard, in
out/set/tokens, where it is missing or older than its shard; --part 2/8: by the second of eight
processes.

The recipe: the encoder's output, mean of pairs of frames (25 a second), x + MLP(LN(x)), 64
dimensions, the nearest of 512 codes by angle; back through a linear map, each twice, positions, one
transformer layer and a LayerNorm, into the frozen decoder. The loss is its cross-entropy, the
Kullback-Leibler divergence from what it says of the unquantised features, and commitment; ours, for
minutes in place of days: it begins as the principal components of speech, the error of x1 counts
too, and for most steps that alone. Codes are moving averages, and those that nothing uses are put
where something is (van den Oord et al. 2017, arXiv 1711.00937; by angle: Yu et al. 2021, arXiv
2110.04627).

B batch, T frames (20 ms), N pairs of frames, E width of Whisper, K codes, D their dimensions.
"""
import argparse
import copy
import json
import math
import sys
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from experiments.student import Speech, letters, update  # noqa: E402
from experiments.utterances import open_source, people, real_test, speak  # noqa: E402
from model import mlp  # noqa: E402
from plumbing.devices import choose_device  # noqa: E402
from plumbing.errors import BadInput, as_bad_input, guard  # noqa: E402
from plumbing.files import atomic_write, fingerprint, locked  # noqa: E402
from plumbing.flags import (  # noqa: E402
    Parser, file_path, keep_settings, positive, read_settings, seed_number,
)
from plumbing.weights import weights_fingerprint  # noqa: E402
from speech.dataset import parse_part  # noqa: E402
from speech.ear import SILENT_FRAMES, silence_of  # noqa: E402
from speech.recordings import TAIL  # noqa: E402
from text.error_rates import cer_by_language, error_rates  # noqa: E402
from text.sources import load_sentences, print_notes  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402

N_CODES, CODE_DIM, PER_SECOND = 512, 64, 25
DECAY, DEAD = 0.95, 0.1  # of the codes' averages; fewer uses a step than DEAD: it moves elsewhere
WEIGHTS = dict(nll=1.0, kl=1.0, error=1.0, commitment=0.25)
COPY = 0.75  # share of the steps before the decoder has a say: codes that say nothing yet would
             # teach it to guess, and each of these steps is cheap
RATE = 1e-3  # of learning
TRANSCRIBE = "<|reserved_special_token_69|>"  # how Ichigo and Speechless begin this task
LONGEST = 49  # times: Speechless's vocabulary has <|duration_02|> to 49, earlier to 99
TABLE = ".parquet" if find_spec("pyarrow") else ".jsonl"


# ---- the quantiser ---------------------------------------------------------------------------


class Quantised(NamedTuple):
    features: Tensor  # (B, T, E) as the decoder takes them
    tokens: Tensor  # (B, N)
    commitment: Tensor  # (), 1 - cosine


class Quantiser(nn.Module):
    """Features of speech -> tokens -> features."""

    languages: Sequence[str] = ()  # of the speech that it was trained on

    def __init__(self, whisper: FrozenWhisper):
        super().__init__()
        width, heads = whisper.dims.n_audio_state, whisper.dims.n_audio_head
        self.mlp = mlp(width, width, width)
        self.down, self.up = nn.Linear(width, CODE_DIM), nn.Linear(CODE_DIM, width)
        self.positions = nn.Parameter(torch.zeros(whisper.max_frames + 1, width))
        self.layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu",
                                                batch_first=True, norm_first=True)
        self.norm = copy.deepcopy(whisper.model.encoder.ln_post).requires_grad_()
        self.register_buffer("codes", F.normalize(torch.randn(N_CODES, CODE_DIM), dim=1))
        self.register_buffer("uses", torch.ones(N_CODES))
        self.register_buffer("mean", torch.zeros(width))  # of the features, channel by channel
        self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def begin(self, features: Tensor) -> None:
        """Directions begin as the largest principal components of features of speech (T, E).

        At random ones the codes of an official Whisper come together before they are of any use.
        """
        self.std, self.mean = torch.std_mean(features, 0)
        x = (features - self.mean) / self.std
        basis = torch.pca_lowrank(x, CODE_DIM)[2]  # (E, D)
        codes = x[torch.randint(len(x), (N_CODES,))] @ basis
        self.codes.copy_(F.normalize(codes, dim=1))
        self.down.weight.copy_(basis.T)
        self.up.weight.copy_(codes.norm(dim=1).mean() * self.std[:, None] * basis)
        self.up.bias.copy_(self.mean)
        for p in (self.down.bias, *self.mlp[2].parameters()):
            p.zero_()

    def encode(self, features: Tensor, frames: Tensor) -> Tensor:
        """(B, T, E), lengths (B,) -> directions (B, N, D)."""
        # The last frame of an odd length is a pair alone, whatever is padded behind it.
        every = torch.arange(features.shape[1] + features.shape[1] % 2, device=features.device)
        inside = every.minimum(frames[:, None] - 1)[:, :, None].expand(-1, -1, features.shape[2])
        x = F.avg_pool1d(features.gather(1, inside).mT, 2).mT
        x = (x - self.mean) / self.std  # else a few large channels are all that there is
        return F.normalize(self.down(x + self.mlp(F.layer_norm(x, x.shape[-1:]))), dim=2)

    def decode(self, codes: Tensor, frames: Tensor) -> Tensor:
        """(B, N, D), lengths (B,) -> features (B, T, E)."""
        x = self.up(codes).repeat_interleave(2, 1)
        behind = torch.arange(x.shape[1], device=x.device) >= frames[:, None]
        x = self.layer(x + self.positions[: x.shape[1]], src_key_padding_mask=behind)
        return self.norm(x)[:, : int(frames.max())]

    def tokens(self, features: Tensor, frames: Tensor) -> Tensor:
        """(B, T, E), (B,) -> (B, N): 25 a second."""
        return (self.encode(features, frames) @ self.codes.T).argmax(2)

    def forward(self, features: Tensor, frames: Tensor) -> Quantised:
        x = self.encode(features, frames)
        tokens = (x @ self.codes.T).argmax(2)
        nearest = self.codes[tokens]
        mask = torch.arange(x.shape[1], device=x.device) < (frames[:, None] + 1) // 2
        if self.training:
            self.update(x.detach()[mask], tokens[mask])
        commitment = (1 - (x * nearest).sum(2))[mask].mean()
        straight = x + (nearest - x).detach()  # its gradient goes to x
        return Quantised(self.decode(straight, frames), tokens, commitment)

    def update(self, x: Tensor, tokens: Tensor) -> None:
        """Codes follow the mean of what chose them, (n, D), (n,)."""
        chosen = F.one_hot(tokens, N_CODES).to(x.dtype)  # (n, K)
        uses, sums = chosen.sum(0), chosen.T @ x
        self.uses.lerp_(uses, 1 - DECAY)
        moved = F.normalize(self.codes.lerp(F.normalize(sums, dim=1), 1 - DECAY), dim=1)
        self.codes.copy_(torch.where(uses[:, None] > 0, moved, self.codes))
        dead = (self.uses < DEAD).nonzero()[:, 0][: len(x)]
        self.codes[dead] = x[torch.randperm(len(x), device=x.device)[: len(dead)]]
        self.uses[dead] = 1


# ---- training --------------------------------------------------------------------------------


def features_of(x1: list[Tensor], whisper: FrozenWhisper) -> tuple[Tensor, Tensor]:
    """x1 (T, E) each -> features as the decoder takes them (B, T, E), lengths (B,)."""
    frames = torch.tensor([len(x) for x in x1])
    return whisper.model.encoder.ln_post(pad_sequence(x1, True)), frames


def quantiser_loss(quantiser: Quantiser, x1: list[Tensor], whisper: FrozenWhisper,
                   targets: Tensor | None = None) -> dict[str, Tensor]:
    """Error of x1 and commitment; with targets cross-entropy and divergence too, nats per token."""
    features, frames = features_of(x1, whisper)
    made = quantiser(features, frames)
    error = ((made.features - features) / whisper.model.encoder.ln_post.weight).square().mean(2)
    mask = torch.arange(error.shape[1]) < frames[:, None]
    losses = dict(error=error[mask].mean(), commitment=made.commitment)
    if targets is None:
        return losses
    x = whisper.teacher_force(made.features, targets, frames)
    with torch.no_grad():
        real = whisper.teacher_force(features, targets, frames)
    mask = targets[:, 1:] >= 0
    log_p, log_q = ((y[mask] @ whisper.rows.T + whisper.row_count.log()).log_softmax(1)
                    for y in (real, x))
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return losses | dict(nll=whisper.nll(x, targets).mean(), kl=kl)


def train_quantiser(speech: Speech, whisper: FrozenWhisper, steps: int, seed: int) -> Quantiser:
    """A quantiser of these utterances; BadInput for fewer frames than a code has dimensions."""
    if (n := sum(map(len, speech.x1))) < CODE_DIM:
        raise BadInput(f"{n} frames of speech are too few for codes of {CODE_DIM} dimensions; give "
                       "more sentences")
    torch.manual_seed(seed)
    quantiser = Quantiser(whisper).train()
    quantiser.languages = sorted({s.language for s in speech.sentences})
    optimizer = torch.optim.AdamW(quantiser.parameters(), RATE, (0.9, 0.98))
    frames = torch.tensor([float(len(x)) for x in speech.x1])
    sums = torch.ones(len(frames), dtype=torch.double).cumsum(0)  # all are drawn equally often
    quantiser.begin(features_of([torch.cat(speech.x1)], whisper)[0][0])
    for step in (bar := tqdm(range(steps), "quantiser")):
        rng = data.generator(seed, step)
        picks = data.draw_similar(sums, frames, 16, rng)
        languages, texts = zip(*(speech.sentences[i] for i in picks))
        targets = whisper.target_tokens(texts, languages) if step >= COPY * steps else None
        losses = quantiser_loss(quantiser, [speech.x1[i] for i in picks], whisper, targets)
        loss = sum(WEIGHTS[name] * x for name, x in losses.items())
        update(quantiser, optimizer, loss, RATE * min(1, step / 50, 1.05 - step / steps))
        bar.set_postfix({name: f"{x.item():.2f}" for name, x in losses.items()})
    return quantiser.eval()


def load_quantiser(path: Path, whisper: FrozenWhisper) -> Quantiser:
    """What `main` saved; BadInput if it is missing, something else, or of another Whisper."""
    quantiser = Quantiser(whisper).eval()
    with as_bad_input(f"{path} is no quantiser of {whisper.name}",
                      "give its --whisper, or leave out --quantiser to make one"):
        saved = torch.load(path, weights_only=True)
        if saved["whisper"] != whisper.fingerprint:
            raise ValueError("it is of another")
        quantiser.load_state_dict(saved["quantiser"])
        quantiser.languages = saved["languages"]
    return quantiser


def save_quantiser(quantiser: Quantiser, path: Path, whisper: FrozenWhisper) -> None:
    """For `load_quantiser`."""
    with atomic_write(path) as part:
        torch.save(dict(quantiser=quantiser.state_dict(), whisper=whisper.fingerprint,
                        languages=quantiser.languages), part)


def note_unheard(quantiser: Quantiser, sentences: Iterable[data.Sentence]) -> None:
    """Print the languages that its tokens will not carry."""
    if unheard := {s.language for s in sentences} - {*quantiser.languages}:
        print_notes([f"the quantiser never heard {', '.join(sorted(unheard))}, only "
                     f"{', '.join(quantiser.languages)}; what it never heard, it hardly carries"])


@torch.no_grad()
def tokenise(quantiser: Quantiser, speech: Speech, whisper: FrozenWhisper) -> list[list[int]]:
    """Utterances -> their tokens, 25 a second."""
    return [quantiser.tokens(*features_of([x], whisper))[0].tolist() for x in speech.x1]


@torch.no_grad()
def judge(quantiser: Quantiser, speech: Speech, whisper: FrozenWhisper) -> dict[str, float]:
    """Use and entropy of the codes; CERs of what the decoder reads in the speech ("plain") and in
    what its tokens give back ("quantised"), of all and of each language.

    Both are the frames of speech alone (`recordings.speech_span`), with silence behind.
    """
    counts = torch.tensor(sum(tokenise(quantiser, speech, whisper), [])).bincount(minlength=N_CODES)
    share = counts / counts.sum()
    figures = dict(codes=int((counts > 0).sum()),
                   entropy=-(share * share.clamp(min=1e-12).log2()).sum().item())
    for name in ("plain", "quantised"):
        read = []
        for i in range(0, len(speech.x1), 16):
            features, frames = features_of(speech.x1[i : i + 16], whisper)
            if name == "quantised":
                features = quantiser(features, frames).features
            whole = torch.stack([torch.cat([x[:n], whisper.silence[n:]])
                                 for x, n in zip(features, frames.tolist())])
            codes = [s.language for s in speech.sentences[i : i + 16]]
            read += [r.text for r in whisper.transcribe(whole, codes)]
        by_language = cer_by_language(speech.sentences, read)
        figures[f"cer_{name}"] = error_rates(speech.sentences, read).cer
        figures |= {f"cer_{name}_{code}": cer for code, cer in by_language.items()}
    return figures


# ---- forms of other projects -----------------------------------------------------------------


def sound(tokens: Iterable[int]) -> str:
    """As Ichigo writes a sound."""
    return f"<|sound_start|>{''.join(f'<|sound_{t:04d}|>' for t in tokens)}<|sound_end|>"


def run_lengths(tokens: Iterable[int]) -> str:
    """As Speechless does: how often, if more than once, then what; at most LONGEST at once."""
    runs = ((token, len(list(run))) for token, run in groupby(tokens))
    parts = [(token, min(LONGEST, n - i)) for token, n in runs for i in range(0, n, LONGEST)]
    written = (f"<|duration_{n:02d}|>" * (n > 1) + f"<|sound_{token:04d}|>" for token, n in parts)
    return f"<|sound_start|>{''.join(written)}<|sound_end|>"


def row(form: str, index: int, text: str, tokens: list[int]) -> dict:
    """A row of a data set in the form of "ichigo" or "speechless"."""
    text = " ".join(text.split())
    if form == "speechless":
        return dict(index=index, prompt=TRANSCRIBE + text, answer=run_lengths(tokens))
    turns = [dict(content=TRANSCRIBE + sound(tokens), role="user"),
             dict(content=text, role="assistant")]
    return dict(index=index, tokens=tokens, text_prompt=text, answer=text, length=len(tokens),
                prompt=sound(tokens), conversations=turns)


def write_rows(rows: list[dict], file: Path) -> None:
    """Rows as .parquet, by pyarrow, or as .jsonl."""
    with atomic_write(file) as part:
        if file.suffix == ".parquet":
            with as_bad_input(f"{file} needs pyarrow", "`pip install pyarrow`"):
                import pyarrow
                import pyarrow.parquet
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            part.write_text("".join(lines), "utf-8", newline="\n")


# ---- tokens of a data set --------------------------------------------------------------------


def rows_of(folder: Path) -> Iterator[dict]:
    """The manifest's rows: pieces of text that were kept, in the order of the shards."""
    with open(folder / "manifest.jsonl", encoding="utf-8") as file:
        for line in file:
            with as_bad_input(f"{file.name} is damaged", "the command of sample.py that made it "
                              "makes it again"):
                row = json.loads(line)
            yield row


def shards_of(folder: Path) -> Iterator[tuple[Path, list[dict]]]:
    """Each shard's .npz and its rows; one without rows is left out."""
    for name, rows in groupby(rows_of(folder), itemgetter("shard")):
        yield folder / name, list(rows)


def load_shard(file: Path, rows: list[dict]) -> tuple[str, list[np.ndarray]]:
    """"mel" and (2T, M) of each piece; where there are none "features" and (T, E). Or BadInput."""
    with (as_bad_input(f"{file} is damaged", "the command of sample.py that made it makes it "
                       "again"), np.load(file) as arrays):
        if arrays["frames"].tolist() != [row["frames"] for row in rows]:
            raise ValueError("its pieces are not those of manifest.jsonl")
        kind, per_frame = ("mel", 2) if "mel" in arrays else ("features", 1)
        return kind, np.split(arrays[kind], per_frame * arrays["frames"].cumsum()[:-1])


def check_set(folder: Path, whisper: FrozenWhisper) -> None:
    """Raises BadInput unless it is a finished set of `sample.py` that this Whisper understands."""
    if not (folder / "manifest.jsonl").exists():
        raise BadInput(f"{folder} has no manifest.jsonl; `python sample.py --text_file TEXT --out "
                       f"{folder}` makes it, or goes on until it is there")
    if "shard" not in next(rows_of(folder), {}):
        raise BadInput(f"{folder} has neither mel nor features of any text; make another with "
                       "`sample.py --write mel`, or with `--write features`")
    kind, arrays = load_shard(*next(shards_of(folder)))
    width, longest = arrays[0].shape[1], max(row["frames"] for row in rows_of(folder))
    expected = whisper.dims.n_mels if kind == "mel" else whisper.dims.n_audio_state
    if width != expected or longest > whisper.max_frames:
        raise BadInput(f"{folder} has {kind} of width {width} and up to {longest} frames, and "
                       f"{whisper.name} takes {expected} and at most {whisper.max_frames}; give "
                       "the --whisper of the set, and a --quantiser of it")
    if kind == "features":  # any Whisper hears a mel
        made_by = read_settings(folder / "settings.json", "make the set anew").get("whisper")
        if made_by != whisper.fingerprint:
            raise BadInput(f"{folder} has features of another Whisper than {whisper.name}; give "
                           "the --whisper of the set, and a --quantiser of it")


def check_quantiser(folder: Path, quantiser: Quantiser) -> None:
    """Raises BadInput if the folder has tokens of another quantiser or set: nobody could tell."""
    made_of = read_settings(folder.with_name("settings.json"), "make the set anew")
    settings = dict(quantiser=weights_fingerprint(quantiser.state_dict().values()), tail=TAIL,
                    set=fingerprint(made_of))
    keep_settings(folder / "settings.json", settings, "move the folder away",
                  "--set, or move it away", settings)


def speech_features(mel: Tensor, whisper: FrozenWhisper) -> Tensor:
    """Log-mel (M, 2T) -> features of speech and TAIL, as far as the window goes (T + TAIL, E)."""
    frames = mel.shape[1] // 2
    silent = min(SILENT_FRAMES, whisper.max_frames - frames)
    mel = F.pad(mel, (0, 2 * silent), value=silence_of(mel.max()).item())
    return whisper.features_of_mel(mel[None])[0, : frames + TAIL]


@torch.no_grad()
def write_set(folder: Path, form: str, quantiser: Quantiser, whisper: FrozenWhisper,
              part: tuple[int, int] = (1, 1)) -> int:
    """FOLDER/tokens: a file for each shard of a part, if it is missing or older -> its rows."""
    note_unheard(quantiser, (data.Sentence(row["language"], row["text"])
                             for row in rows_of(folder)))
    check_quantiser(folder / "tokens", quantiser)
    n_rows, n_own, n_shards = 0, 0, len({row["shard"] for row in rows_of(folder)})
    number, n_parts = part
    tables = [x for x in (".jsonl", ".parquet") if any((folder / "tokens").glob(f"{form}-*{x}"))]
    table = (tables or [TABLE])[0]  # as it was begun, also if pyarrow was installed since
    for i, (shard, pieces) in enumerate(tqdm(shards_of(folder), folder.name, n_shards,
                                             unit=" shards")):
        first, n_rows = n_rows, n_rows + len(pieces)
        if i % n_parts != number - 1:
            continue
        n_own += len(pieces)
        file = folder / "tokens" / f"{form}-{shard.stem[len('shard-'):]}{table}"
        if not file.exists() or file.stat().st_mtime < shard.stat().st_mtime:
            rows, (kind, arrays) = [], load_shard(shard, pieces)
            for piece, array in zip(pieces, arrays):
                x = torch.from_numpy(array).float().to(whisper.device)
                features = (speech_features(x.T, whisper) if kind == "mel" else
                            torch.cat([x, whisper.silence[len(x) :][:TAIL]]))
                frames = torch.tensor([len(features)], device=whisper.device)
                tokens = quantiser.tokens(features[None], frames)[0].tolist()
                rows.append(row(form, first + len(rows), piece["text"], tokens)
                            | {key: piece[key] for key in ("id", "language", "cer")})
            for half in file.parent.glob(f"{file.name}.*.tmp"):
                half.unlink()  # of a run that was killed
            write_rows(rows, file)
    return n_own


# ---- the command -----------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", nargs="?", help="espeak, or a checkpoint of train.py: whose speech is quantised")
    add("--whisper", default="pocket")
    add("--data", nargs="+", default=["builtin"], help="of train.py")
    add("--sentences", type=positive, default=2000)
    add("--steps", type=positive, default=1500)
    add("--seed", type=seed_number, default=0)
    add("--recordings", type=file_path, help="a folder of recordings to test on, too")
    add("--quantiser", type=file_path, help="one that is there already")
    add("--set", nargs="+", type=file_path, default=[], help="in place of a source: folders of "
        "`sample.py --out FOLDER`, whose tokens are written to FOLDER/tokens")
    add("--part", default="1/1", help="2/8: the second of eight processes that write the tokens")
    add("--device", default="auto", help="of --set: auto, cpu, cuda, mps; training is on the CPU")
    add("--form", choices=["ichigo", "speechless"], default="ichigo")
    add("--out", type=file_path, default=Path("out/tokens"), help="folder")
    args = parser.parse_args(argv)
    if bool(args.source) == bool(args.set) or args.set and (args.recordings or not args.quantiser):
        raise BadInput("give espeak or a checkpoint, whose speech is quantised, or --set FOLDER "
                       "with --quantiser FILE.pt and no --recordings")
    args.numbers = parse_part(args.part)
    if args.source and args.part != "1/1":
        raise BadInput(f"--part {args.part} belongs to --set, without a source")
    file = args.out / "quantiser.pt"
    if file.exists() and not args.quantiser:
        raise BadInput(f"{file} is there already; --quantiser {file} uses it; or give another "
                       "--out")
    return args


def quantise_source(args: argparse.Namespace, whisper: FrozenWhisper) -> None:
    """Train a quantiser on the source's speech, or take --quantiser; print how it is read."""
    work, tests = args.out / "speech", {}
    training, held_out = data.split(load_sentences(args.data, whisper))
    held_out = data.per_language(held_out, 100)
    training = data.per_language(sorted(training, key=data.hash_share), args.sentences)
    flow = open_source(args.source, [*training, *held_out], whisper)
    known = {*map(letters, training)}
    languages = {s.language for s in training}
    if args.recordings:
        tests["people"] = people(args.recordings, languages, known, whisper)
    if args.whisper == "pocket":
        tests["espeak-ng, unheard voices"] = real_test(whisper, languages, known)
    if args.quantiser:
        quantiser = load_quantiser(args.quantiser, whisper)
        note_unheard(quantiser, training)
    else:
        speech = speak(flow, training, whisper, work, 7)  # what a model learns: other takes
        quantiser = train_quantiser(speech, whisper, args.steps, args.seed)
        save_quantiser(quantiser, args.out / "quantiser.pt", whisper)
    tests[f"{args.source}, held out"] = speak(flow, held_out, whisper, work, 2)
    print_figures(quantiser, tests, whisper)


def print_figures(quantiser: Quantiser, tests: dict[str, Speech], whisper: FrozenWhisper) -> None:
    """What `judge` says of each test."""
    print(f"{N_CODES} codes, {PER_SECOND} a second, of {math.log2(N_CODES):.0f} bits at most; CER "
          "of the speech, in front of silence, and of its tokens")
    for name, speech in tests.items():
        figures = judge(quantiser, speech, whisper)
        print(f"{name}: {figures['codes']} codes used, entropy {figures['entropy']:.2f} bits")
        for code in ("", *(f"_{code}" for code in sorted({s.language for s in speech.sentences}))):
            plain, quantised = (figures[f"cer_{x}{code}"] for x in ("plain", "quantised"))
            print(f"  CER{code.replace('_', ' ')}: {plain:.2%} of the speech, {quantised:.2%} of "
                  "its tokens")


def main(argv=None) -> None:
    args = parse_args(argv)
    whisper = FrozenWhisper(args.whisper, "cpu" if args.source else choose_device(args.device))
    if args.source:
        with locked(args.out):
            return quantise_source(args, whisper)
    for folder in args.set:  # it fails now, not after the work
        check_set(folder, whisper)
    quantiser = load_quantiser(args.quantiser, whisper).to(whisper.device)
    name = f"-tokens-{args.form}" + f"-{args.part.replace('/', '-')}" * (args.part != "1/1")
    for folder in args.set:
        with locked(folder, part=name):  # sample.py then leaves its files alone
            n_rows = write_set(folder, args.form, quantiser, whisper, args.numbers)
        print(f"wrote {folder / 'tokens'}: {n_rows} rows")


if __name__ == "__main__":
    guard(main)
