"""How speech-like is what the flow makes? Judges that had no part in its training.

    python experiments/realism.py out/ckpt.pt                          # a table
    python experiments/realism.py a.pt b.pt --no-real --out out/more   # more rows of the table
    python experiments/realism.py out/mel/ckpt.pt --judge base --recordings FOLDER --hears base

The Whisper that trained the flow, its critic, cannot judge it: it has been pleased already. The
judge is another Whisper that reads the same x1; both also read .wav files. A student is a small
convolutional network without a language model. It learns letters (CTC) from speech of one kind,
then hears real speech: sentences and voices that nothing was trained on. What it hears is the
output of a frozen encoder before ln_post, of speech and 0.2 s behind it: the critic's, or
that of --hears, which the flow has not pleased.

Beside it stand students of espeak-ng's speech of the same texts, also with equally long letters (is
it the pace?). The lower bound is speech of the first checkpoint, with the texts of other sentences.
Needs soundfile, and espeak-ng for the languages that it speaks here.
"""
import argparse
import random
import statistics
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from flow import Solver  # noqa: E402
from experiments.student import (  # noqa: E402
    Speech, check_hears, greedy_cer, language_accuracy, letters, load_judge, others, student_cer,
    train_student,
)
from experiments.utterances import (  # noqa: E402
    N_PEOPLE, encode, espeak, even, generate, latents, parts, people, real_test,
)
from plumbing.devices import choose_device  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.files import atomic_write, locked, make_folder  # noqa: E402
from plumbing.flags import Parser, file_path, positive, seed_number  # noqa: E402
from plumbing.weights import POCKET  # noqa: E402
from pocket import make_pocket  # noqa: E402
from speech import sound  # noqa: E402
from speech.ear import Ear  # noqa: E402
from speech.recordings import read_audio, speech_span  # noqa: E402
from text.durations import count_frames  # noqa: E402
from text.sources import split_of  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402

N_WAV = 24  # files
FEWEST = 50  # utterances that a student learns from
COLUMNS = {  # name of a figure -> heading, format
    "critic": ("critic's CER", "{:.1%}"),
    "judge": ("judge's CER", "{:.1%}"),
    "critic_language": ("critic hears the language", "{:.0%}"),
    "judge_language": ("judge hears the language", "{:.0%}"),
    "critic_wav": ("critic, from .wav", "{:.1%}"),
    "judge_wav": ("judge, from .wav", "{:.1%}"),
    "human": ("student's CER on human speech", "{:.1%}"),
    "student": ("student's CER on espeak-ng", "{:.1%}"),
    "own": ("student on its own kind", "{:.1%}"),
    "steps": ("its steps", "{:.0f}"),
}


# ---- the table -------------------------------------------------------------------------------


def through_wav(mels: Iterable[Tensor], whisper: FrozenWhisper, name: Path) -> Iterator[Tensor]:
    """Log-mel (n_mels, 2T) -> NAME_00.wav ..., read as Whisper does (n_mels, 2 n_audio_ctx)."""
    for i, mel in enumerate(islice(mels, N_WAV)):
        sound.write_samples(path := Path(f"{name}_{i:02d}.wav"), sound.griffin_lim(mel))
        yield sound.log_mel(read_audio(path)[: whisper.n_samples], whisper)[0]


class Study:
    """What all rows share: critic, sentences, alphabet, tests of the students."""

    def __init__(self, args):
        checkpoints = {path: train.load_checkpoint(path) for path in args.checkpoints}
        check(args, {path: checkpoint["config"] for path, checkpoint in checkpoints.items()})
        config = checkpoints[args.checkpoints[0]]["config"]
        self.args, self.device = args, choose_device(args.device)
        is_pocket = config["whisper"] == "pocket"
        self.flows = {path: sample.load_flow(checkpoint, self.device)
                      for path, checkpoint in checkpoints.items()}
        self.whisper = self.flows[args.checkpoints[0]].critic
        self.hears = FrozenWhisper(args.hears, self.device) if args.hears else self.whisper
        check_hears(f"--hears {args.hears}", self.hears, self.whisper)
        self.judge = args.judge or (str(POCKET / "judge.pt") if is_pocket else "")
        sources = args.data or config["data"]
        training, held_out = split_of(config, self.whisper, sources)
        if len(training) < FEWEST:
            raise BadInput(f"--data {' '.join(sources)} has {len(training)} sentences to learn "
                           f"from; give at least {FEWEST}")
        random.Random(0).shuffle(training)
        held_out.sort(key=data.hash_share)
        self.sentences = data.per_language(training, args.sentences)
        self.held_out = sorted(data.per_language(held_out, args.read), key=data.hash_share)
        seen = sorted({c for s in training for c in letters(s)})
        self.alphabet = {letter: i for i, letter in enumerate(seen, 1)}
        self.has_voices = self.find_voices({s.language for s in training}, is_pocket)
        self.readers = {path: self.find_readers(path, checkpoint)
                        for path, checkpoint in checkpoints.items()}
        self.tests = self.make_tests(training, held_out, is_pocket)

    def find_voices(self, languages: set[str], is_pocket: bool) -> bool:
        """Whether espeak-ng is needed, and can say all the text."""
        if is_pocket and not self.args.real:
            return False
        if voiceless := make_pocket.voiceless(languages):
            print("note: no row of espeak-ng, as it cannot read " + ", ".join(voiceless))
        return not voiceless

    def make_tests(self, training: list, held_out: list, is_pocket: bool) -> dict[str, Speech]:
        """Real speech that students read, of sentences that none of them learns."""
        tests, languages = {}, {s.language for s in training}
        known = {letters(s) for s in training}
        if self.args.recordings:
            tests["human"] = people(self.args.recordings, languages, known, self.hears)
        if is_pocket:
            tests["student"] = real_test(self.hears, languages, known)
        elif self.has_voices:
            tests["student"] = self.say(data.per_language(held_out, N_PEOPLE), 2,
                                        make_pocket.HELD_OUT_VARIANTS)
        return tests

    def find_readers(self, path: Path, checkpoint: dict) -> dict[str, FrozenWhisper]:
        """Critic and, if there is one, judge of a checkpoint."""
        readers = dict(critic=self.flows[path].critic)
        if self.judge:
            readers["judge"] = load_judge(checkpoint, self.device, self.judge)
        n, whole = len(self.readable(self.flows[path], readers)), len(self.held_out)
        if 0 < n < whole:
            print(f"note: of {path} {n} of {whole} held-out sentences are read, as all can hear")
        if not n:
            raise BadInput(f"{readers.get('judge', readers['critic']).name} knows no language of "
                           "the text, or hears too little at once; give another judge")
        return readers

    def readable(self, flow: sample.Flow, readers: dict[str, FrozenWhisper]) -> list:
        """Held-out sentences in languages that all readers know, and that fit their windows."""
        return [s for s in self.held_out if all(
            s.language in whisper.languages and
            count_frames(flow.durations(s, flow.speed)) <= whisper.max_frames
            for whisper in readers.values())]

    def say(self, sentences: list, seed: int, variants=make_pocket.VARIANTS,
            rooms: float = 0.0) -> Speech:
        """espeak-ng says the sentences; what the students' encoder hears."""
        mels = espeak(sentences, variants, seed, self.hears, self.args.work_dir, rooms,
                      self.whisper)
        return Speech(sentences, encode(mels, self.hears))

    def student(self, speech: Speech, own: Speech, seed: int) -> dict:
        student = train_student(speech, self.alphabet, seed, self.args.steps)
        return {name: student_cer(student, test, self.alphabet)
                for name, test in [*self.tests.items(), ("own", own)]} | dict(steps=student.steps)

    def takes(self, seed: int, other: int) -> list[tuple[int, float]]:
        """Seed and --rooms of each version of the text: one plain, with --rooms one more."""
        return [(seed, 0.0), (other, self.args.rooms)][: 1 + bool(self.args.rooms)]

    def readings(self, path: Path, speak: Callable, name: str) -> dict:
        """What critic and judge of a checkpoint read, from .wav files too if it has spectrograms.

        speak(sentences, whisper) -> features of a few at a time, log-mel (n_mels, 2T) each.
        """
        figures, sentences = {}, self.readable(self.flows[path], self.readers[path])
        for who, whisper in self.readers[path].items():
            features, mels = speak(sentences, whisper)
            features = list(features)
            figures[who] = greedy_cer(whisper, sentences, features)
            if whisper.model.is_multilingual:
                figures[f"{who}_language"] = language_accuracy(whisper, sentences, features)
            if isinstance(whisper, Ear):
                read = (whisper.features_of_mel(torch.stack(part)) for part in
                        parts(through_wav(mels, whisper, self.args.work_dir / name), whisper))
                figures[f"{who}_wav"] = greedy_cer(whisper, sentences[:N_WAV], read)
        return figures

    def real_readings(self, sentences: list, whisper: FrozenWhisper) -> tuple:
        """Real speech, for `readings`: heard by the ear, of features by the critic's encoder."""
        hears = whisper if isinstance(whisper, Ear) else self.whisper
        mels = list(espeak(sentences, make_pocket.VARIANTS, 2, hears, self.args.work_dir,
                           critic=self.whisper))
        features = (whisper.model.encoder.ln_post(hears.encode_mel(torch.stack(part)))
                    for part in parts(mels, hears))
        return features, (mel[:, : 2 * speech_span(mel).stop] for mel in mels)

    def made_readings(self, sentences: list, whisper: FrozenWhisper, flow: sample.Flow,
                      solver: Solver) -> tuple:
        """What a flow makes, for `readings`."""
        made = list(latents(flow, sentences, solver))
        return (whisper.features(*batch) for batch in made), (
            whisper.log_mel_of(x[:n]) for x1, frames in made for x, n in zip(x1, frames.tolist()))

    def real_rows(self) -> Iterator[tuple[str, dict]]:
        """Students of espeak-ng's speech, and of the same in an even rhythm, for each seed."""
        real = join(self.say(self.sentences, seed, rooms=rooms)
                    for seed, rooms in self.takes(0, 20))
        own = self.say(self.held_out, 2)
        figures = self.readings(self.args.checkpoints[0], self.real_readings, "real")
        for seed in self.args.seeds:
            yield "espeak-ng", figures | self.student(real, own, seed)
        speed = self.flows[self.args.checkpoints[0]].speed
        real, own = even(real, speed), even(own, speed)
        for seed in self.args.seeds:
            yield "espeak-ng, letters equally long", self.student(real, own, seed)

    def generated_rows(self, path: Path, shuffle: bool) -> Iterator[tuple[str, dict]]:
        """Students of what a checkpoint makes, and of the same with other texts, for each seed."""
        flow, name = self.flows[path], f"{self.args.checkpoints.index(path)}_{path.parent.name}"
        say = partial(generate, flow, hears=self.hears)
        for seed in self.args.seeds:
            made = join(say(self.sentences, Solver(seed=n), rooms)
                        for n, rooms in self.takes(seed, 1000 + seed))
            own = say(self.held_out, Solver(seed=seed))
            speak = partial(self.made_readings, flow=flow, solver=Solver(seed=seed))
            yield str(path), (self.readings(path, speak, f"{name}_{seed}")
                              | self.student(made, own, seed))
            if shuffle:
                figures = self.student(made._replace(sentences=others(made.sentences)), own, seed)
                yield f"{path}, with other texts", {k: v for k, v in figures.items() if k != "own"}


def join(takes: Iterable[Speech]) -> Speech:
    return Speech(*(sum(items, []) for items in zip(*takes)))


def markdown(rows: dict) -> str:
    """{row: [figures of each seed]} -> a table of mean ± standard deviation over the seeds."""
    known = {name for results in rows.values() for r in results for name in r}
    shown = [name for name in COLUMNS if name in known]
    lines = ["| speech | " + " | ".join(COLUMNS[name][0] for name in shown) + " |",
             "| --- " * (len(shown) + 1) + "|"]
    for name, results in rows.items():
        cells = [name]
        for figure in shown:
            form, values = COLUMNS[figure][1], [r[figure] for r in results if figure in r]
            varies = len(set(values)) > 1
            spread = " ± " + form.format(statistics.stdev(values)) if varies else ""
            cells.append(form.format(statistics.mean(values)) + spread if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---- the command -----------------------------------------------------------------------------


def check(args, configs: dict[Path, dict]) -> None:
    """BadInput for checkpoints that do not belong in one table, and for too little to learn."""
    first, kinds = configs[args.checkpoints[0]], {c["latent"] for c in configs.values()}
    for path, config in configs.items():
        for name in ["whisper", "speed", "max_lines", *["data"] * (not args.data)]:
            if config[name] != first[name]:
                raise BadInput(f"{path} was trained with --{name} {config[name]} and "
                               f"{args.checkpoints[0]} with {first[name]}; give them in two calls")
    if args.sentences < FEWEST:
        raise BadInput(f"--sentences {args.sentences} are too few; give at least {FEWEST}")
    for name in "checkpoints", "seeds":
        if len({*getattr(args, name)}) < len(getattr(args, name)):
            raise BadInput(f"some {name} are given twice, which would count twice; give each once")
    if not 0 <= args.rooms <= 1 or args.rooms and "features" in kinds:
        raise BadInput(f"--rooms {args.rooms} cannot be used; at least 0, at most 1, and 0 with "
                       "features, which have no sound")
    if args.hears and "features" in kinds:
        raise BadInput(f"--hears {args.hears} cannot hear features, which have no sound; leave it "
                       "out")
    for folder in (args.work_dir, args.out.parent):  # better now than after an hour
        make_folder(folder)


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", nargs="+", type=file_path, help="of train.py, all with one critic")
    add("--judge", help="another Whisper (default with pocket: pocket/judge.pt)")
    add("--hears", help="whose encoder the students hear with (default: the critic's; mel only)")
    add("--recordings", type=file_path, help="human speech, a folder with manifest.tsv "
        "(path, language, text): another test of the students")
    add("--data", nargs="+", help="text, as for train.py (default: that of the checkpoints)")
    add("--seeds", nargs="+", type=seed_number, default=[0, 1, 2], help="of students and flow")
    add("--sentences", type=int, default=2000, help="a student learns from")
    add("--read", type=positive, default=100, help="held-out sentences that critic and judge read")
    add("--steps", type=positive, default=3000, help="of a student, at most")
    add("--rooms", type=float, default=0.0, help="up to 1: a second take of all, in other voices "
        "and rooms")
    add("--real", action=argparse.BooleanOptionalAction, default=True,
        help="rows of espeak-ng and of other texts")
    add("--device", default="auto", help="of Whisper and the flow: auto, cpu, cuda, mps")
    add("--work_dir", type=file_path, default=Path("out/realism"), help="speech, .wav files")
    add("--out", type=file_path, default=Path("out/realism"), help="writes OUT.md")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args, rows = parse_args(argv), {}
    with locked(args.work_dir):  # two studies would read each other's .wav files
        study = Study(args)
        sources = [study.real_rows()] if args.real and study.has_voices else []
        for i, path in enumerate(args.checkpoints):
            sources.append(study.generated_rows(path, shuffle=args.real and i == 0))
        for name, cells in (row for source in sources for row in source):
            rows.setdefault(name, []).append(cells)
            print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in cells.items()), flush=True)
            with atomic_write(Path(f"{args.out}.md")) as part:
                part.write_text(markdown(rows), "utf-8")
        print(markdown(rows))
        return rows


if __name__ == "__main__":
    guard(main)
