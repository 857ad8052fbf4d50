"""Make pocket/statistics.npz: means and covariances of the cepstra of speech, measured once.

    python pocket/make_statistics.py    # speaks 1,500 sentences; needs espeak-ng

What whisper_decoder.SpectralWhisper and train.py know of speech without a recording: the mean and
spread of each cepstrum (C,), and of WINDOW frames in a row, in units of that spread, the mean
(WINDOW * C,) and the covariance (WINDOW * C, WINDOW * C). Nobody's words can be read from it.
"""
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import make_pocket  # noqa: E402
import train  # noqa: E402
from whisper_decoder import STATISTICS, FrozenWhisper, cosines  # noqa: E402

N_CEPSTRA, WINDOW, N_SENTENCES, SEED = 13, 4, 1500, 1000


def main():
    make_pocket.need_espeak()
    sentences, _ = data.split(data.builtin())
    random.Random(1).shuffle(sentences)
    sentences = train.balanced(sentences, N_SENTENCES)
    work = make_pocket.HERE / "build"
    work.mkdir(exist_ok=True)
    clips = make_pocket.speak_all(sentences, make_pocket.VARIANTS, SEED, work, "statistics")
    whisper = FrozenWhisper("pocket")
    cepstra = []
    for clip in clips:
        mel = data.stack_clips([clip], whisper)[0]
        span = data.speech_span(mel)
        cepstra.append(F.avg_pool1d(cosines(N_CEPSTRA, len(mel)) @ mel, 2).T[span])  # (T, C)
    frames = torch.cat(cepstra)
    mean, spread = frames.mean(0), frames.std(0)
    windows = [((x - mean) / spread).unfold(0, WINDOW, 1).flatten(1) for x in cepstra]
    windows = torch.cat(windows)  # (n, C * WINDOW)
    found = dict(mean=mean, spread=spread, window_mean=windows.mean(0),
                 window_cov=torch.cov(windows.T))
    temporary = STATISTICS.with_suffix(".tmp.npz")
    np.savez(temporary, **{name: value.numpy() for name, value in found.items()})
    os.replace(temporary, STATISTICS)
    print(f"{STATISTICS}: {STATISTICS.stat().st_size:,} bytes, from {len(frames)} frames")


if __name__ == "__main__":
    main()
