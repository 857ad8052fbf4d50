"""Is it the student's fault? The same features, and students of another kind than realism.py's.

    python experiments/controls.py out/seed0/ckpt.pt

Real speech and the features of each checkpoint teach, and real speech of other sentences and voices
is the test:

    a decoder       openai-whisper's TextDecoder, small and new: it attends to where it likes, so
                    that no pace can be wrong for it (and it can guess, so that it needs more data)
    soft labels     the same, but it learns what pocket's decoder expects in the features, with the
                    probability of every token, in place of the text
    and 7 minutes   the student of realism.py, of the features and the first tenth of the real
                    speech, drawn as often as any: are they of use beside it?
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from whisper.model import TextDecoder

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]
import sample  # noqa: E402
from experiments.realism import Study, check, parse_args  # noqa: E402
from experiments.student import (  # noqa: E402
    Speech, learn, letter_errors, letters, student_cer, train_student, vary,
)
from whisper_decoder import BadInput, FrozenWhisper  # noqa: E402

RATE = 1e-3  # of learning
FALSE = 0.3  # share of the words so far that are random, so that the decoder has to listen


class Reader:
    """A decoder that learns to read features, and what it is taught with."""

    def __init__(self, speech: Speech, test: Speech, whisper: FrozenWhisper):
        self.whisper, self.speech, self.test = whisper, speech, test
        self.targets = self.tokens_of(speech.sentences)
        used = torch.cat([self.targets.flatten(), self.tokens_of(test.sentences).flatten()])
        self.used = used[used >= 0].unique()  # few of Whisper's tokens
        self.number = torch.full((whisper.dims.n_vocab,), -1)
        self.number[self.used] = torch.arange(len(self.used))
        self.end = int(self.number[whisper.tokenizer("en").eot])

    def tokens_of(self, sentences: list) -> Tensor:
        tokens = [self.whisper.encode(s.text, s.language) for s in sentences]
        return self.whisper.target_tokens(tokens, [s.language for s in sentences]).to(
            self.whisper.device)

    def features(self, x1: list[Tensor]) -> Tensor:
        """(T, C) each -> what a decoder sees of them, up to some silence (B, T + 16, C)."""
        frames = torch.tensor([len(x) for x in x1])
        return self.whisper.features(pad_sequence(x1, True), frames)[:, : int(frames.max()) + 16]

    @torch.no_grad()
    def soft_labels(self) -> list[Tensor]:
        """What pocket expects at each position of each text, (L - 1, used tokens) each."""
        found = []
        for x, row in zip(self.speech.x1, self.targets):
            row = row[row >= 0]
            frames = torch.tensor([len(x)])
            logits = self.whisper.model.decoder(row[None, :-1],
                                                self.whisper.features(x[None], frames))
            found.append(logits[0, :, self.used].softmax(-1))
        return found

    def train(self, seed: int, steps: int, soft: list[Tensor] | None = None) -> TextDecoder:
        """A new decoder that has learned enough, from the texts or from soft labels."""
        torch.manual_seed(seed)
        dims = self.whisper.dims
        decoder = TextDecoder(len(self.used), dims.n_text_ctx, dims.n_text_state,
                              dims.n_text_head, dims.n_text_layer)
        nn.init.normal_(decoder.token_embedding.weight, std=0.05)
        nn.init.normal_(decoder.positional_embedding, std=0.05)

        def loss(decoder, picks, rng):
            x1 = [vary(self.speech.x1[i], rng) if rng else self.speech.x1[i] for i in picks]
            targets = self.targets[picks]
            tokens = self.number[targets[:, :-1].clamp(min=0)].clamp(min=0)
            if rng:
                is_false = torch.rand(tokens.shape) < FALSE
                is_false[:, : self.whisper.n_prompt] = False
                tokens = torch.where(is_false, torch.randint_like(tokens, len(self.used)), tokens)
            log_p = decoder(tokens, self.features(x1)).log_softmax(-1)  # (B, L - 1, used)
            said = targets[:, 1:] >= 0
            said[:, : self.whisper.n_prompt - 1] = False  # the prompt is given
            if soft is None:
                return F.nll_loss(log_p[said], self.number[targets[:, 1:][said]])
            expected = pad_sequence([soft[i] for i in picks], True)
            expected = F.pad(expected, (0, 0, 0, said.shape[1] - expected.shape[1]))
            return -(expected * log_p).sum(-1)[said].mean()

        return learn(decoder, loss, [len(x) for x in self.speech.x1], seed, steps, RATE)

    @torch.no_grad()
    def cer(self, decoder: TextDecoder) -> float:
        """Greedy character error rate on the real test, letters as realism.py counts them."""
        tokenizer, read = self.whisper.tokenizer("en"), []
        for sentence, x in zip(*self.test):
            features, prompt = self.features([x]), self.whisper.prompt(sentence.language)
            tokens = self.number[torch.tensor(prompt)].tolist()
            while len(tokens) < self.whisper.max_tokens and tokens[-1] != self.end:
                tokens.append(int(decoder(torch.tensor([tokens]), features)[0, -1].argmax()))
            text = [int(self.used[n]) for n in tokens[len(prompt) :]]
            text = tokenizer.encoding.decode([t for t in text if t < tokenizer.eot])
            read.append(letters(sentence._replace(text=text)))
        return letter_errors(self.test.sentences, read)


def controls(study: Study, speech: Speech, real: Speech, seed: int) -> list[float]:
    """Errors on real speech of a decoder, of one with soft labels, and beside 7 real minutes."""
    test, steps = study.tests["student"], study.args.steps
    reader = Reader(speech, test, study.whisper)
    rates = [reader.cer(reader.train(seed, steps)),
             reader.cer(reader.train(seed, steps, reader.soft_labels()))]
    if speech is not real:
        both = Speech(*(said[::10] + made for said, made in zip(real, speech)))
        student = train_student(both, study.alphabet, seed, steps)
        rates.append(student_cer(student, test, study.alphabet))
    return rates


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="of train.py, with pocket")
    parser.add_argument("--seed", type=int, default=0, help="of the students")
    parser.add_argument("--sentences", type=int, default=2000, help="a student learns from")
    parser.add_argument("--steps", type=int, default=6000, help="of a student, at most")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "realism", help="speech")
    args = parser.parse_args(argv)
    shared = parse_args([*map(str, args.checkpoints), "--device", "cpu", "--sentences",
                         str(args.sentences), "--steps", str(args.steps), "--work_dir",
                         str(args.work_dir), "--judge", "pocket"])  # nobody reads here
    check(shared)
    study = Study(shared)
    real = study.say(study.sentences, 0)
    kinds = {"real speech": real}
    for path in args.checkpoints:
        settings = sample.Settings(seed=args.seed)
        kinds[str(path)] = study.speaker(path)(study.sentences, settings=settings)
    print("| features | a decoder | soft labels | and 7 minutes |\n| --- | --- | --- | --- |")
    for name, speech in kinds.items():
        rates = controls(study, speech, real, args.seed)
        cells = [f"{rate:.1%}" for rate in rates] + [""] * (3 - len(rates))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"controls.py: {error}")
