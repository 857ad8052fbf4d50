"""The spoken test sentences that come with the pocket Whisper; make_pocket.py wrote them.

M mel bins, n frames (10 ms).
"""
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Sentence
from text.error_rates import error_rates
from whisper_decoder import FrozenWhisper

SPEECH = Path(__file__).parent / "speech.npz"


def mel_from_bytes(mel: np.ndarray, window: int) -> Tensor:
    """8-bit log-mel of a clip, 0.5 dB a step, (M, n) -> log-mel, silence behind it (M, window)."""
    mel = torch.from_numpy(mel).float() / 85 - 1.5
    # Log-mel spans 8 decades, 2.0 after Whisper's scaling: its floor is silence.
    return torch.nn.functional.pad(mel, (0, window - mel.shape[1]), value=float(mel.max()) - 2)


def spoken_clips(whisper: FrozenWhisper, n: int = 250) -> list[tuple[Sentence, Tensor]]:
    """Test sentences that the checkpoint can hear and their log-mel (M, 2P), at most n of them."""
    with np.load(SPEECH) as file:
        clips = np.split(file["mel"].T, np.cumsum(file["n_frames"])[:-1], axis=1)
        sentences = map(Sentence, file["language"].tolist(), file["text"].tolist())
    known = [(sentence, clip) for sentence, clip in zip(sentences, clips)
             if sentence.language in whisper.languages and len(clip) == whisper.dims.n_mels]
    window = 2 * whisper.max_frames
    return [(sentence, mel_from_bytes(clip[:, :window], window))
            for sentence, clip in known[:: -(-len(known) // n) or 1]]


def real_speech_cer(whisper: FrozenWhisper, n: int) -> float:
    """Character error rate of at most n clips, read greedily; nan if it can hear none."""
    spoken, hypotheses = spoken_clips(whisper, n), []
    batches = DataLoader(spoken, 25) if spoken else ()
    for (languages, _), mel in tqdm(batches, "real speech", leave=False, delay=1):  # (25, M, 2P)
        hypotheses += [r.text for r in whisper.transcribe(whisper.features_of_mel(mel), languages)]
    return error_rates([s for s, _ in spoken], hypotheses).cer if spoken else math.nan
