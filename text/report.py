"""What is printed: the figures of a run, which are kept too, samples, and a round trip."""
import re
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from tqdm import tqdm

import data
from flow import Solver
from plumbing.files import atomic_write
from text.durations import FRAMES_PER_SECOND
from text.error_rates import error_rates


def block(result: dict) -> str:
    """A line `key: value` for each."""
    return "".join(f"{key}: {value:.4f}\n" if isinstance(value, float) else f"{key}: {value}\n"
                   for key, value in result.items())


def report(path: Path, **result) -> dict:
    """Print a block of lines and write it; of over eight languages print the worst five only."""
    shown = dict(result)
    of_languages = filter(None, map(re.compile(r"val_cer_\d+step_").match, result))
    for prefix in dict.fromkeys(match[0] for match in of_languages):
        cers = {key: v for key, v in result.items() if key.startswith(prefix)}
        if len(cers) > 8:
            for key in sorted(cers, key=cers.get)[:-5]:
                del shown[key]
            shown[f"{prefix}mean"] = np.mean([*cers.values()])
            shown[f"{prefix}median"] = np.median([*cers.values()])
    print(block(shown), end="")
    with atomic_write(path) as part:
        part.write_text(block(result))
    return result


def show_samples(run: "train.Run", held_out: list) -> None:  # noqa: F821
    """A held-out sentence of each of up to five languages, others each time; loops are cut."""
    order = torch.randperm(len(held_out), generator=data.generator(run.config.seed, run.step))
    sentences = list({held_out[i].language: held_out[i] for i in order.tolist()}.values())[:5]
    pairs = zip(sentences, run.transcribe_samples(sentences))
    lines = [f"  {s.language}  {s.text}  ->  {text[:3 * len(s.text)]}" for s, text in pairs]
    tqdm.write("\n".join([f"step {run.step}", *lines]))


def show_round_trip(text: data.Sentence, hypothesis: str,
                    pieces: Sequence["train.RoundTrip"], solver: Solver) -> None:  # noqa: F821
    """Print what was read of a text, and lengths and scores of its pieces."""
    cer, wer, _ = error_rates([text], [hypothesis])
    read, frames = [piece.read for piece in pieces], sum(len(piece.x1) for piece in pieces)
    in_pieces = f" in {len(pieces)} pieces" if len(pieces) > 1 else ""
    repeats = max(r.compression_ratio for r in read)
    print(f"text         {text.text}  [{text.language}]")
    print(f"read back    {hypothesis}")
    print(f"errors       CER {cer:.1%}, WER {wer:.1%}")
    print(f"confidence   mean log-probability {np.mean([r.avg_logprob for r in read]):.2f}, no "
          f"speech {max(r.no_speech_prob for r in read):.2f}, compression {repeats:.2f}")
    if repeats > 2.4:  # as whisper.transcribe has it
        print("note         what was read repeats itself; try another --seed")
    print(f"flow         {frames / FRAMES_PER_SECOND:.2f} s, {frames} frames{in_pieces}, "
          f"{solver.steps} {solver.method} steps, NFE {solver.nfe}, seed {solver.seed}")
