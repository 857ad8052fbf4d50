"""Listen once, so that nobody who trains need listen: write what speech is likely to be.

    python experiments/listen.py                     # espeak-ng speaks; writes pocket/prior.pt
    python experiments/listen.py --speech DIR --whisper tiny --out tiny_prior.pt

Then `python train.py --prior FILE`. Recordings need no text: the frozen Whisper writes it. None of
them is kept, only what they have in common, language by language:

    how long a letter lasts                  data.fit_prior
    what a frame is like, on average         the sum of what the letters around it add
    how frames differ from that              a covariance over the channels, and one over time

So a text has a Gaussian (data.likely_speech): with its mean over time each letter becomes what it
is between such neighbours, and a draw around it is no blurred average.
"""
import argparse
import sys
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]
import data  # noqa: E402
from experiments.arms import speak  # noqa: E402
from whisper_decoder import BadInput, FrozenWhisper, choose_device  # noqa: E402

OFTEN = 30  # frames of a kind of sound, or nothing is said about it


def fit_mean(texts: list[str], lasting: list[np.ndarray], x1: list[Tensor], letters: str) -> dict:
    """What data.mean_frames needs: the mean of all frames (C,), the kinds of sound that were heard
    often (R,), and what each adds to the frame that is of it (R, C)."""
    kinds = np.concatenate([data.kinds_of_sound(text, n, len(x), letters)
                            for text, n, x in zip(texts, lasting, x1)])
    heard, count = np.unique(kinds, return_counts=True)
    heard = np.append(0, heard[count >= OFTEN])  # 0: all others
    frames = torch.cat(x1)
    added = data.backfit(data.rows_of(kinds, heard), frames - frames.mean(0), len(heard))
    return dict(mean=frames.mean(0), kinds=torch.from_numpy(heard), added=added.half())


def fit_spread(rest: list[Tensor]) -> dict:
    """How utterances (T, C) differ from their means, with a covariance of channels times one of
    time: root (C, C) of the first; of the second the share that an utterance holds from its first
    frame to its last, as it does its voice (a little too much: in short ones the rest does not
    average out), and the decay of the others from frame to frame."""
    frames = torch.cat(rest)
    covariance = frames.T @ frames / len(frames)
    variance = covariance.trace()
    hold = (torch.stack([x.mean(0).square().sum() for x in rest]).mean() / variance).clamp(0, 0.9)
    steps = sum(len(x) - 1 for x in rest)
    lag1 = sum((x[1:] * x[:-1]).sum() for x in rest) / steps / variance
    decay = ((lag1 - hold) / (1 - hold)).clamp(0, 0.99)
    size, direction = torch.linalg.eigh(covariance.double())
    root = direction * size.clamp(min=0).sqrt()  # a layer norm leaves one direction without any
    return dict(root=root.float(), hold=float(hold), decay=float(decay))


def fit_sounds(sentences: Sequence[data.Sentence], lasting: Sequence[np.ndarray],
               x1: Sequence[Tensor]) -> dict:
    """Utterances, frames that their letters last, latents (T, C) -> the prior, see data.fit_prior.

    It has the languages of which enough letters were heard.
    """
    prior = data.fit_prior(sentences, lasting)
    for language, heard in tqdm(prior.items(), "languages"):
        mine = [i for i, s in enumerate(sentences) if s.language == language]
        texts, times = [data.sounds(sentences[i].text) for i in mine], [lasting[i] for i in mine]
        frames = [x1[i].float() for i in mine]
        heard |= fit_mean(texts, times, frames, heard["letters"])
        heard |= fit_spread([x - data.mean_frames(text, n, len(x), heard)
                             for text, n, x in zip(texts, times, frames)])
    return prior


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--speech", type=Path, help="folder of recordings (default: espeak-ng)")
    parser.add_argument("--whisper", default="pocket", help="who hears (default: pocket)")
    parser.add_argument("--minutes", type=float, default=110, help="that espeak-ng speaks, about")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--out", type=Path, default=data.PRIOR, help="file to write")
    args = parser.parse_args(argv)
    if not 1 <= args.minutes <= 110:
        raise BadInput(f"--minutes {args.minutes:g} cannot be used; 1 to 110 are possible")
    is_default = (args.speech, args.whisper, args.minutes) == (None, "pocket", 110)
    if args.out == data.PRIOR and not is_default:
        raise BadInput(f"{args.out} is what espeak-ng says to pocket; give another --out")
    whisper, problems = FrozenWhisper(args.whisper, choose_device(args.device)), []
    if not args.speech and whisper.dims.n_mels != 80:
        raise BadInput(f"espeak-ng speaks in 80 mel bands, and {whisper.name} hears "
                       f"{whisper.dims.n_mels}; give --speech")
    if args.speech:
        speech, problems = data.load_speech(args.speech, whisper)
    else:
        training, _ = data.split(data.builtin())
        speech = speak(args.minutes, False, training, whisper)
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    prior = fit_sounds(speech.sentences, speech.lasting, speech.x1)
    if not prior:
        raise BadInput(f"{len(speech.sentences)} utterances have less than {data.ENOUGH} letters "
                       "in each language; give more")
    for heard in prior.values():
        heard["encoder"] = data.encoder_key(whisper)
    with data.writing(args.out) as part:
        torch.save(prior, part)
    minutes = speech.frames.sum() / data.FRAMES_PER_SECOND / 60
    print(f"wrote {args.out}: {len(speech.sentences)} utterances, {minutes:.1f} minutes, in "
          f"{', '.join(sorted(prior))}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"listen.py: {error}")
