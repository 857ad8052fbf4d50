"""Do tokens lie in real speech where the frozen weights say? Words found with no training at all.

    python experiments/lens.py pocket                                   # espeak-ng, shipped clips
    python experiments/lens.py base --recordings FOLDER --languages en es fr it ru

The ear's lens (`Ear.lens`) asks what its encoder hears to lie along W e near the frames of a token,
where e is the token's embedding and W comes from the weights alone. Here W reads real speech: how
often does a token have a higher peak in a clip that says it than in a clip that does not? 50 % is
chance. FOLDER has manifest.tsv (path, language, text).
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]
from experiments.student import Speech  # noqa: E402
from experiments.utterances import encode, people  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from pocket.clips import spoken_clips  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402


def peaks(x1: list[Tensor], tokens: Tensor, whisper: FrozenWhisper) -> Tensor:
    """The highest score of each token in each clip, (T, C) each, (K,) -> (clips, K).

    In standard deviations from its mean over the clips, as some tokens score high in all.
    """
    directions = whisper.embed(tokens).cpu() @ whisper.token_direction.cpu().T  # (K, C)
    mean = torch.cat(x1).mean(0)
    best = torch.stack([((x - mean) @ directions.T).amax(0) for x in x1])
    return (best - best.mean(0)) / best.std(0)


def found(speech: Speech, whisper: FrozenWhisper) -> float:
    """How often a token peaks higher in a clip that says it (area under the ROC curve)."""
    said = [set(whisper.encode(s.text, s.language)) for s in speech.sentences]
    tokens = sorted(set().union(*said))
    is_said = torch.tensor([[token in clip for token in tokens] for clip in said])
    scores = peaks(speech.x1, torch.tensor(tokens), whisper)
    yes, no = scores[is_said], scores[~is_said]
    ranks = torch.searchsorted(no.sort().values, yes)
    return (ranks.double().mean() / len(no)).item()


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("whisper", help="pocket, an official name, or a checkpoint file")
    add("--recordings", type=Path, help="human speech (default: pocket's clips of espeak-ng)")
    add("--languages", nargs="+", help="of the recordings (default: all that Whisper knows)")
    args = parser.parse_args(argv)
    whisper = FrozenWhisper(args.whisper)
    known = [whisper.check_language(code) for code in args.languages or whisper.languages]
    if args.recordings:
        tests = {code: people(args.recordings, {code}, set(), whisper) for code in known}
    elif args.whisper != "pocket":
        raise BadInput(f"the shipped clips are for pocket, not for {args.whisper}; give "
                       "--recordings FOLDER")
    else:
        sentences, mels = zip(*spoken_clips(whisper))
        shipped = list(zip(sentences, encode(mels, whisper)))
        tests = {code: Speech(*zip(*(clip for clip in shipped if clip[0].language == code)))
                 for code in known}
    rates = {code: found(speech, whisper) for code, speech in tests.items()}
    for code, rate in rates.items():
        print(f"{code}  {len(tests[code].sentences)} clips: {rate:.1%}")
    return rates


if __name__ == "__main__":
    guard(main)
