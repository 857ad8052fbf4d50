"""Do tokens lie in real speech where the frozen weights say? Words found with no training at all.

    python experiments/lens.py pocket                                   # espeak-ng, shipped clips
    python experiments/lens.py base --recordings FOLDER --languages en es fr it ru

`Ear.lens` wants what the encoder hears near a token to lie along W e: e is the token's embedding, W
comes from the weights alone. Here W reads real speech: how often does a token have a higher peak in
a clip that says it than in a clip that does not? Two controls: other tokens in its place, which
make over 50 %, as long clips say more, and peak higher; and a random rotation in place of W.
FOLDER has manifest.tsv (path, language, text).
"""
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from experiments.student import Speech  # noqa: E402
from experiments.utterances import people, real_test  # noqa: E402
from plumbing.errors import guard  # noqa: E402
from plumbing.flags import Parser, file_path  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402

N_DRAWS = 10  # of other tokens, and of rotations


def token_aucs(speech: Speech, whisper: FrozenWhisper) -> tuple[float, float, float]:
    """How often a token peaks higher in a clip that says it than in one that does not; others in
    its place; a random rotation in place of W.

    That is the area under its ROC curve, here the mean over tokens; nan if no token tells clips
    apart.
    """
    token_sets = [set(whisper.tokenize(s.text, s.language)) for s in speech.sentences]
    tokens = sorted(set().union(*token_sets) - set.intersection(*token_sets))
    embeddings = whisper.embed(torch.tensor(tokens, dtype=torch.long))
    is_said = torch.tensor([[token in clip for token in tokens] for clip in token_sets])

    def peaks_along(w: Tensor) -> Tensor:
        directions = embeddings @ w.T  # (K, C)
        return torch.stack([(x @ directions.T).amax(0) for x in speech.x1])  # (clips, K)

    def area(peaks: Tensor) -> float:
        areas = [(x[is_in][:, None] > x[~is_in]).double().mean()
                 for x, is_in in zip(peaks.T, is_said.T)]
        return torch.stack(areas).mean().item() if areas else math.nan

    rng = data.generator(0, 0)
    seen, width = peaks_along(whisper.token_direction), embeddings.shape[1]
    others = [seen[:, torch.randperm(len(tokens), generator=rng)] for _ in range(N_DRAWS)]
    turned = [peaks_along(torch.linalg.qr(torch.randn(width, width, generator=rng))[0])
              for _ in range(N_DRAWS)]
    return area(seen), *(sum(map(area, x)) / N_DRAWS for x in (others, turned))


def main(argv=None) -> dict[str, tuple[float, float, float]]:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("whisper", help="pocket, an official name, or a checkpoint file")
    add("--recordings", type=file_path, help="human speech (default: clips of espeak-ng)")
    add("--languages", nargs="+", default="de en es fr zh".split(), help="of the speech")
    args = parser.parse_args(argv)
    whisper = FrozenWhisper(args.whisper)
    known = [whisper.check_language(code) for code in args.languages]
    tests = {code: people(args.recordings, {code}, set(), whisper) if args.recordings else
             real_test(whisper, {code}) for code in known}
    rates = {code: token_aucs(speech, whisper) for code, speech in tests.items()}
    for code, (rate, others, turned) in rates.items():
        print(f"{code}  {len(tests[code].sentences)} clips: {rate:.1%}, other tokens {others:.1%}, "
              f"random rotations {turned:.1%}")
    return rates


if __name__ == "__main__":
    guard(main)
