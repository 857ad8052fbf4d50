"""How fast is a checkpoint, and how fast would one token after the other be? One run, one table.

    python experiments/speed.py out/ckpt.pt out/mel/ckpt.pt

The rival is an autoregressive model from text to semantic tokens, 25 a second, as WhisperSpeech and
Ichigo have: as many layers as the DiT and as wide, keys and values cached, random weights. Both say
the same held-out sentences, from their text on, one at a time and 50 at once. "tokens" is what both
make: of the flow through the encoder, where it makes spectrograms, and a quantiser, of random
weights too.
"""
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Callable

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from experiments.benchmark import clock  # noqa: E402
from experiments.speech_lm import SpeechLM  # noqa: E402
from experiments.tokens import N_CODES, PER_SECOND, Quantiser  # noqa: E402
from flow import Solver, last  # noqa: E402
from plumbing.devices import choose_device  # noqa: E402
from plumbing.errors import guard  # noqa: E402
from plumbing.flags import Parser, file_path, positive  # noqa: E402
from speech.ear import SILENT_FRAMES, Ear  # noqa: E402
from speech.sound import griffin_lim  # noqa: E402
from text.durations import FRAMES_PER_SECOND, count_frames  # noqa: E402
from text.sources import split_of  # noqa: E402


@torch.no_grad()
def seconds_of(work: Callable, device: torch.device) -> float:
    """Seconds that a call takes, the median of three, after one that warms up."""
    work()
    times = [clock(device)]
    for _ in range(3):
        work()
        times.append(clock(device))
    return statistics.median(end - start for start, end in pairwise(times))


def say(batch: data.Batch, model, critic, quantiser: Quantiser, steps: int, kind: str) -> None:
    """Features, log-mels, samples or sound tokens of what `make_batch` made."""
    batch = batch.to(critic)
    x1 = last(train.generate(model, critic, batch, Solver(steps)))
    frames = batch.cond["frames"]
    if not isinstance(critic, Ear):
        features = critic.model.encoder.ln_post(x1)
    else:
        window = x1.shape[1] + (SILENT_FRAMES if kind == "tokens" else 0)  # as tokens.py has it
        mel = critic.spectrogram(x1, frames, min(window, critic.max_frames))
        features = critic.features_of_mel(mel) if kind == "tokens" else None
    if kind == "tokens":
        quantiser.tokens(features, frames)
    if kind == "wav":
        for x, n in zip(mel, frames.tolist()):
            griffin_lim(x[:, : 2 * n])


def say_in_turn(model: SpeechLM, texts: torch.Tensor, n: int) -> None:
    """n tokens after a text, one by one, (B, S)."""
    caches, tokens = [[] for _ in model.blocks], texts
    for i in range(n):
        first = texts.shape[1] + i - 1 if i else 0
        tokens = model(tokens, first, caches)[:, -1:].argmax(2)


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=file_path, help="of train.py")
    parser.add_argument("--data", nargs="+", help="of train.py; its held-out part is said")
    parser.add_argument("--sentences", type=positive, default=50)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    print(f"{device}, {torch.get_num_threads()} threads\n| what | at once | sentences a second | "
          "real-time factor | times as fast as one token after the other |\n" + "| --- " * 5 + "|")
    for path in args.checkpoints:
        checkpoint = train.load_checkpoint(path)
        model, critic, rule, speed = sample.load_flow(checkpoint, device)
        quantiser = Quantiser(critic).to(device).eval()
        rival = SpeechLM(2 * N_CODES, model.config.width, model.config.depth).to(device).eval()
        held_out = split_of(checkpoint["config"], critic, args.data)[1]
        sentences = data.per_language(held_out, args.sentences)
        seconds = sum(count_frames(rule(s, speed)) for s in sentences) / FRAMES_PER_SECOND
        for size in (1, len(sentences)):
            groups = [sentences[i : i + size] for i in range(0, len(sentences), size)]

            def in_turn() -> None:
                for group in groups:
                    longest = max(count_frames(rule(s, speed)) for s in group)
                    codes, texts = zip(*group)
                    tokens = critic.target_tokens(texts, codes).to(device) % N_CODES  # a small head
                    say_in_turn(rival, N_CODES + tokens, longest * PER_SECOND // FRAMES_PER_SECOND)

            def at_once(steps: int, kind: str) -> None:
                for group in groups:
                    batch = data.make_batch(group, critic, [rule(s, speed) for s in group])
                    say(batch, model, critic, quantiser, steps, kind)

            slow = seconds_of(in_turn, device)
            rows = [("one token after the other", slow)]
            kinds = ("mel", "wav") if isinstance(critic, Ear) else ("features",)
            for kind in (*kinds, "tokens"):
                rows += [(f"{kind}, {n} steps", seconds_of(lambda: at_once(n, kind), device))
                         for n in (1, 4)]
            for name, took in rows:
                print(f"| {path}, {name} | {size} | {len(sentences) / took:.1f} | "
                      f"{took / seconds:.5f} | {slow / took:.1f} |", flush=True)


if __name__ == "__main__":
    guard(main)
