"""How speech-like are the features? Train a student on them, test it on real speech.

    python experiments/realism.py out/ckpt.pt                       # a table and a picture
    python experiments/realism.py a.pt b.pt --no-real --out out/more   # more rows of the table

The decoder that trained the flow cannot judge it: it has been pleased already. A student can. It
is a small convolutional network without a language model that learns letters (CTC) from generated
features only; then it hears real speech: sentences and voices that nothing was trained on. Beside
it, from as many sentences: students of real speech (the upper bound), of real speech as long as
the length rule says, with equally long letters (is it the pace?), of a few minutes of it, and of
the features of the first checkpoint with the text of other sentences (the lower bound).

Every student learns until it reads sentences set aside no better: see `learn`.

Everything is measured on x1 (whisper_decoder.py), between the silences of an utterance. Needs the
pocket decoder, espeak-ng and matplotlib.
"""
import argparse
import copy
import math
import os
import random
import statistics
import sys
from functools import cached_property, partial
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from matplotlib import pyplot
from tqdm import tqdm

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]
import data  # noqa: E402
import make_pocket  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from experiments.spectrogram import SpectralWhisper  # noqa: E402
from model import mlp  # noqa: E402
from whisper_decoder import UNSPACED, BadInput, FrozenWhisper, edit_distance  # noqa: E402

VALIDATION = 0.1  # share of a student's utterances that say when it has learned enough
CHECK, PATIENCE, BETTER = 100, 3, 0.95  # steps; checks; what counts as better
RATE = 6e-3  # of learning
FIRST_SEED = 1000  # of speech; with those below make_pocket.py spoke what pocket was trained on
FRESH_SEED = 3000  # of a test on which nothing was chosen
COLUMNS = {  # name of a figure -> heading, format
    "student": ("student's CER on real speech", "{:.1%}"),
    "own": ("on its own kind", "{:.1%}"),
    "round_trip": ("round trip CER", "{:.1%}"),
    "frechet": ("Frechet distance", "{:.2f}"),
    "lag1": ("autocorrelation, 20 ms", "{:.2f}"),
    "lag5": ("100 ms", "{:.2f}"),
    "classifier": ("told from real", "{:.1%}"),
    "diversity": ("variance for one text", "{:.3f}"),
    "seconds": ("seconds", "{:.2f}"),
}


class Speech(NamedTuple):
    """Utterances of one kind, real or generated."""

    sentences: list
    x1: list[Tensor]  # (T, C) each


# ---- real and generated utterances -----------------------------------------------------------


@torch.no_grad()
def hear(sentences: list, clips: list, whisper: FrozenWhisper) -> Speech:
    """8-bit log-mel of clips -> what the frozen encoder makes of them."""
    x1 = []
    for start in range(0, len(clips), 50):
        mel = data.stack_clips(clips[start : start + 50], whisper)
        heard = whisper.encode_speech(mel).cpu()
        x1 += [x[data.speech_span(m)].clone() for x, m in zip(heard, mel)]
    return Speech(sentences, x1)


def speak(sentences: list, seed: int, whisper: FrozenWhisper, work: Path) -> Speech:
    """espeak-ng says the sentences, in voices of the pocket decoder's training."""
    seed += FIRST_SEED
    clips = make_pocket.speak_all(sentences, make_pocket.VARIANTS, seed, work, "realism")
    return hear(sentences, clips, whisper)


def generate(model, sentences: list, whisper: FrozenWhisper, settings) -> Speech:
    """The flow says the sentences, spectrograms in many voices; what Whisper's encoder hears."""
    x1, rng = [], torch.Generator().manual_seed(settings.seed)
    for start in range(0, len(sentences), 50):
        some = sentences[start : start + 50]
        lasting = [data.letter_lengths(s, 1.0, model.prior) for s in some]
        batch = data.make_batch(some, whisper, lasting, prior=model.prior)
        frames, made = batch.cond["frames"], sample.generate(model, whisper, batch, settings)[-1]
        if isinstance(whisper, SpectralWhisper):
            made = whisper.hear(made, frames, rng)
        x1 += [x[:n].clone() for x, n in zip(made.cpu(), frames.tolist())]
    return Speech(sentences, x1)


def resample(x1: Tensor, times) -> Tensor:
    """Frames at other times, between two of them linearly, (T, C), (T',) -> (T', C)."""
    times = torch.as_tensor(times, dtype=torch.float32).clamp(0, len(x1) - 1)
    before = times.long().clamp(max=max(0, len(x1) - 2))
    x1 = x1[before].lerp(x1[(before + 1).clamp(max=len(x1) - 1)], (times - before)[:, None])
    return F.layer_norm(x1, x1.shape[-1:])


def even(speech: Speech) -> Speech:
    """The same, as long as the length rule says, and every letter as long as any other."""
    x1 = []
    for sentence, x, n in zip(*speech, data.align_letters(*speech)):
        frames = data.natural_frames(sentence)
        place = (np.arange(frames) + 0.5) / frames * len(n)  # in letters
        ends = np.cumsum([0, *n])
        x1.append(resample(x, np.interp(place, np.arange(len(n) + 1), ends) - 0.5))
    return Speech(speech.sentences, x1)


# ---- the student -----------------------------------------------------------------------------


def letters(sentence) -> str:
    """What the student writes: words in lower case, no punctuation."""
    parting = "" if sentence.language in UNSPACED else " "
    return parting.join(data.words(sentence.text.lower(), sentence.language))


class Block(nn.Module):
    """One filter per channel, 9 frames of 40 ms wide, then a perceptron in each frame."""

    def __init__(self, width: int):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(9, width) / 3)
        self.mlp = mlp(width, 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        x = F.pad(x, (0, 0, 4, 4))  # shifted sums: faster than Conv1d here
        x = sum(x[:, i : i + frames] * tap for i, tap in enumerate(self.filter))
        return self.mlp(F.layer_norm(x, x.shape[-1:]))


class Student(nn.Module):
    """Six blocks, 2 s wide, over pairs of frames; each pair writes up to two letters."""

    def __init__(self, channels: int, n_letters: int, width: int = 160):
        super().__init__()
        self.first = nn.Linear(2 * channels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(6))
        self.last = nn.Linear(width, 2 * (n_letters + 1))  # 0 is CTC's blank

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """(B, T, C), (B,) -> log-probabilities (B, T or T + 1, letters + 1)."""
        x = F.pad(x, (0, 0, 0, x.shape[1] % 2)).unflatten(1, (-1, 2)).flatten(2)
        is_speech = (torch.arange(x.shape[1]) < (frames[:, None] + 1) // 2)[:, :, None]
        x = self.first(x)
        for block in self.blocks:
            y = block(F.layer_norm(x, x.shape[-1:]) * is_speech)
            x = x + F.dropout(y, 0.05, self.training)
        x = self.last(F.layer_norm(x, x.shape[-1:])).unflatten(2, (2, -1)).flatten(1, 2)
        return x.log_softmax(-1)


def student_loss(student: Student, x1: list[Tensor], texts: list[Tensor]) -> Tensor:
    """CTC in nats per letter, mean over the items."""
    frames, n_letters = (torch.tensor([len(x) for x in items]) for items in (x1, texts))
    log_probs = student(nn.utils.rnn.pad_sequence(x1, batch_first=True), frames)
    return F.ctc_loss(log_probs.transpose(0, 1), torch.cat(texts), frames, n_letters,
                      zero_infinity=True)


def vary(x: Tensor, rng: random.Random) -> Tensor:
    """(T, C) at another pace, with an offset and noise: for voices that were not heard."""
    x = resample(x, np.linspace(0, len(x) - 1, round(len(x) * rng.uniform(0.8, 1.2))))
    offset, noise = 0.3 * rng.random(), 0.3 * rng.random()
    return x + offset * torch.randn(x.shape[1]) + noise * torch.randn(x.shape)


def train_student(speech: Speech, alphabet: dict, seed: int, steps: int) -> Student:
    """A student of these utterances, when it has learned enough (`learn`)."""
    torch.manual_seed(seed)
    texts = [torch.tensor([alphabet[c] for c in letters(s)]) for s in speech.sentences]

    def loss(student: Student, picks: list[int], rng: random.Random | None) -> Tensor:
        x1 = [vary(speech.x1[i], rng) if rng else speech.x1[i] for i in picks]
        return student_loss(student, x1, [texts[i] for i in picks])

    student = Student(speech.x1[0].shape[1], len(alphabet))
    return learn(student, loss, [len(x) for x in speech.x1], seed, steps, RATE)


def learn(student: nn.Module, loss: Callable, frames: list[int], seed: int, steps: int,
          rate: float) -> nn.Module:
    """Averaged weights, when their loss on items set aside falls no more: the same for all.

    That is when PATIENCE checks in a row were hardly BETTER than one before; or after `steps`.
    loss(student, items, rng) varies its items if there is a rng; frames: of all items.
    """
    average, rng = copy.deepcopy(student).eval(), random.Random(seed)
    order = torch.randperm(len(frames)).tolist()
    n_validation = max(1, min(200, round(VALIDATION * len(order))))
    validation, training = order[:n_validation], order[n_validation:]
    optimizer = torch.optim.AdamW(student.parameters(), rate, (0.9, 0.98), weight_decay=0.01)
    best, lowest, good, since = None, math.inf, math.inf, 0
    for step in (bar := tqdm(range(1, steps + 1), desc="student", leave=False)):
        pool = sorted(rng.choices(training, k=48), key=lambda i: frames[i])
        first = rng.randrange(0, 48, 12)  # 12 of like length, so that little is padded
        now = loss(student, pool[first : first + 12], rng)
        optimizer.zero_grad(set_to_none=True)
        now.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 50)
        optimizer.step()
        with torch.no_grad():
            for averaged, new in zip(average.parameters(), student.parameters()):
                averaged.lerp_(new, max(0.01, 1 / step))
            if step % CHECK and step < steps:
                continue
            held_out = loss(average, validation, None).item()
        bar.set_postfix(validation=f"{held_out:.3f}")
        if best is None or held_out < lowest:
            best, lowest = copy.deepcopy(average), held_out
        if held_out < BETTER * good:
            good, since = held_out, step
        if step - since >= PATIENCE * CHECK:
            break
    else:
        print(f"note: after {steps} steps a student was still learning; give it more --steps")
    return best


@torch.no_grad()
def student_cer(student: Student, speech: Speech, alphabet: dict) -> float:
    """Character error rate of the best path: repeats joined, blanks dropped."""
    letter_of, read = {i: letter for letter, i in alphabet.items()}, []
    for x in speech.x1:
        best = student(x[None], torch.tensor([len(x)]))[0].argmax(-1).unique_consecutive()
        read.append("".join(letter_of[i] for i in best.tolist() if i))
    return letter_errors(speech.sentences, read)


def letter_errors(sentences: list, read: list[str]) -> float:
    """Edits per letter that the sentences have, where a student reads these letters."""
    said = [letters(s) for s in sentences]
    return sum(map(edit_distance, said, read)) / sum(map(len, said))


# ---- the other measures ----------------------------------------------------------------------


def frechet(a: Tensor, b: Tensor) -> float:
    """Distance of two Gaussians fitted to frames, (N, C), (M, C): 0 if they are the same.

    |mean difference|^2 + tr(A + B - 2 (A B)^1/2), Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    cov_a, cov_b = torch.cov(a.T.double()), torch.cov(b.T.double())
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).double().square().sum()
    return (gap + cov_a.trace() + cov_b.trace() - 2 * mixed).item()


def autocorrelation(x1: list[Tensor], lag: int) -> float:
    """Correlation of frames that are `lag` apart, around the mean frame."""
    mean = torch.cat(x1).mean(0)
    products = torch.cat([(x[lag:] - mean) * (x[:-lag] - mean) for x in x1 if len(x) > lag])
    return (products.mean() / (torch.cat(x1) - mean).square().mean()).item()


def classifier_accuracy(a: list[Tensor], b: list[Tensor], seed: int) -> float:
    """How often a small network tells a frame of a from one of b, on utterances set aside."""
    torch.manual_seed(seed)
    training, test = ([torch.cat(kind[part::2]) for kind in (a, b)] for part in (0, 1))
    network = nn.Sequential(nn.Linear(a[0].shape[1], 128), nn.GELU(), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    is_b = torch.arange(2).repeat_interleave(128)[:, None]
    for _ in range(1000):
        x = torch.cat([frames[torch.randint(len(frames), (128,))] for frames in training])
        loss = F.binary_cross_entropy_with_logits(network(x), is_b.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = [((network(x) > 0) == kind).float().mean() for kind, x in enumerate(test)]
    return sum(right).item() / 2


def diversity(versions: list[list[Tensor]]) -> float:
    """Variance of the mean frame over versions of a text / over texts; versions[v][text]."""
    means = torch.stack([torch.stack([x.mean(0) for x in texts]) for texts in versions])
    return (means.var(0).mean() / means.mean(0).var(0).mean()).item()


# ---- the table -------------------------------------------------------------------------------


class Study:
    """What all rows share: real speech, test sentences, alphabet."""

    def __init__(self, args):
        self.args, self.whisper = args, FrozenWhisper("pocket")
        training, _ = data.split(data.builtin())
        random.Random(0).shuffle(training)
        self.sentences = train.balanced(training, args.sentences)
        self.test = hear(*self.tests(), self.whisper)
        seen = sorted({c for s in [*training, *self.test.sentences] for c in letters(s)})
        self.alphabet = {letter: i for i, letter in enumerate(seen, 1)}
        self.some = train.balanced(training[::-1], 50)  # said again and again, for the diversity
        self.said = partial(speak, whisper=self.whisper, work=args.work_dir)
        self.real = self.said(self.sentences, 0)
        self.few = Speech(*(items[::10] for items in self.real))

    # What some tables do not need is spoken when it is asked for.

    @cached_property
    def reference(self) -> Speech:
        return self.said(self.sentences, 1)

    @cached_property
    def own(self) -> Speech:
        return self.said(self.test.sentences, 2)

    @cached_property
    def even(self) -> list[Speech]:
        return [even(self.real), even(self.own)]

    @cached_property
    def versions(self) -> list[list[Tensor]]:
        return [self.said(self.some, seed).x1 for seed in range(3, 11)]

    def tests(self) -> tuple[list, list]:
        """The sentences that pocket/ ships spoken; or as many others, in the same four voices."""
        sentences, clips = data.spoken_sentences(self.whisper)
        if self.args.fresh_test:
            _, held_out = data.split(data.builtin())
            shipped = set(sentences)
            others = [s for s in held_out if s not in shipped]
            random.Random(3).shuffle(others)
            sentences = train.balanced(others, len(sentences))
            clips = make_pocket.speak_all(sentences, make_pocket.HELD_OUT_VARIANTS, FRESH_SEED,
                                          self.args.work_dir, "test")
        return sentences, clips

    def student(self, speech: Speech, own: Speech, seed: int) -> dict:
        student = train_student(speech, self.alphabet, seed, self.args.steps)
        return dict(student=student_cer(student, self.test, self.alphabet),
                    own=student_cer(student, own, self.alphabet))

    def measures(self, speech: Speech, versions: list, seed: int) -> dict:
        """Everything but the student, against other real speech."""
        x1, reference = speech.x1, self.reference.x1
        return dict(
            frechet=frechet(torch.cat(x1), torch.cat(reference)),
            lag1=autocorrelation(x1, 1), lag5=autocorrelation(x1, 5),
            classifier=classifier_accuracy(x1, reference, seed),
            diversity=diversity(versions),
            seconds=statistics.mean(map(len, x1)) / data.FRAMES_PER_SECOND,
        )

    def read(self, speech: Speech) -> float:
        """Character error rate of the frozen decoder's greedy reading."""
        frames = torch.tensor([len(x) for x in speech.x1])
        x1 = nn.utils.rnn.pad_sequence(speech.x1, batch_first=True)
        read = []
        for i in range(0, len(frames), 50):
            features = self.whisper.features(x1[i : i + 50], frames[i : i + 50])
            codes = [s.language for s in speech.sentences[i : i + 50]]
            read += self.whisper.transcribe(features, codes)
        return train.rates(speech.sentences, read).cer

    def real_rows(self, seed: int) -> dict:
        """Students of real speech, of the same without its rhythm, and of a few minutes of it."""
        minutes = sum(map(len, self.few.x1)) / data.FRAMES_PER_SECOND / 60
        return {
            "real speech": self.student(self.real, self.own, seed)
            | dict(round_trip=self.read(self.test))
            | self.measures(self.real, self.versions, seed),
            "real speech, letters equally long": self.student(*self.even, seed),
            f"{minutes:.0f} minutes of real speech": self.student(self.few, self.own, seed),
        }

    def speaker(self, path: Path) -> Callable[..., Speech]:
        """A checkpoint -> `generate` of its flow, which takes sentences and settings."""
        checkpoint = sample.load_checkpoint(path)
        is_spectrogram = not checkpoint["model_config"]["sphere"]
        whisper = SpectralWhisper() if is_spectrogram else self.whisper
        return partial(generate, sample.load_model(checkpoint, whisper.device), whisper=whisper)

    def generated_rows(self, path: Path, seed: int, shuffle: bool) -> dict:
        """Students of a checkpoint's features, and of the same with other texts."""
        say = self.speaker(path)
        settings = sample.Settings(seed=seed)
        made = say(self.sentences, settings=settings)
        own = say(self.test.sentences, settings=settings)
        versions = [say(self.some, settings=settings._replace(seed=8 * seed + v)).x1
                    for v in range(8)]
        rows = {str(path): self.student(made, own, seed) | dict(round_trip=self.read(own))
                | self.measures(made, versions, seed)}
        if shuffle:
            languages = dict.fromkeys(s.language for s in self.sentences)
            same = [[s for s in self.sentences if s.language == code] for code in languages]
            others = [s for group in same for s in group[1:] + group[:1]]
            shuffled = self.student(Speech(others, made.x1), own, seed)
            rows[f"{path}, with other texts"] = dict(student=shuffled["student"])
        return rows


def markdown(rows: dict) -> str:
    """{row: [figures of each seed]} -> a table of mean ± standard deviation over the seeds."""
    lines = ["| features | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
             "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, results in rows.items():
        cells = [name]
        for figure, (_, form) in COLUMNS.items():
            values = [r[figure] for r in results if figure in r]
            varies = len(set(values)) > 1
            spread = " ± " + form.format(statistics.stdev(values)) if varies else ""
            cells.append(form.format(statistics.mean(values)) + spread if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: dict, path: Path) -> None:
    """Bars: what each student makes of real speech, and the round trip."""
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.6 * len(rows)), layout="constrained")
    for shift, name, label in ((-0.2, "student", "student on real speech"),
                               (0.2, "round_trip", "round trip")):
        values = [[r.get(name, np.nan) for r in results] for results in rows.values()]
        axes.barh(np.arange(len(rows)) + shift, 100 * np.mean(values, 1), 0.36,
                  xerr=100 * np.std(values, 1, ddof=min(1, len(values[0]) - 1)), label=label)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("character error rate, %")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def check(args) -> None:
    """BadInput for checkpoints that cannot be compared with speech, and for too little to learn."""
    for path in args.checkpoints:
        config = sample.load_checkpoint(path)["config"]
        if (config["whisper"], config["speed"]) != ("pocket", 1.0):
            raise BadInput(f"{path} was trained with --whisper {config['whisper']} --speed "
                           f"{config['speed']}; there is real speech for pocket at speed 1 only")
    if args.sentences < 50 or args.steps < 1:
        raise BadInput(f"--sentences {args.sentences} --steps {args.steps} are too few; give at "
                       "least 50 sentences and 1 step")


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="of train.py, with pocket")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the students")
    parser.add_argument("--sentences", type=int, default=2000, help="a student learns from")
    parser.add_argument("--steps", type=int, default=3000, help="of a student, at most")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, default=True,
                        help="rows of real speech and of other texts")
    parser.add_argument("--fresh_test", action="store_true",
                        help="test on speech on which no setting was chosen")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "realism", help="speech")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "realism",
                        help="writes OUT.md and OUT.png")
    args = parser.parse_args(argv)
    check(args)
    make_pocket.need_espeak()
    for folder in (args.work_dir, args.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    study, rows = Study(args), {}
    for seed in args.seeds:
        found = study.real_rows(seed) if args.real else {}
        for i, path in enumerate(args.checkpoints):
            found |= study.generated_rows(path, seed, shuffle=args.real and i == 0)
        for name, figures in found.items():
            rows.setdefault(name, []).append(figures)
        print(f"seed {seed}: " + ", ".join(f"{n} {f['student']:.1%}" for n, f in found.items()))
        table = markdown(rows)
        Path(f"{args.out}.tmp").write_text(table, "utf-8")
        os.replace(f"{args.out}.tmp", f"{args.out}.md")
    print(table)
    picture(rows, Path(f"{args.out}.png"))
    return rows


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"realism.py: {error}")
