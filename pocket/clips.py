"""The spoken test sentences that come with the pocket Whisper; make_pocket.py wrote them.

M mel bins, n frames (10 ms).
"""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Sentence
from whisper_decoder import FrozenWhisper

SPEECH = Path(__file__).parent / "speech.npz"


def mel_from_bytes(mel: np.ndarray, window: int) -> Tensor:
    """8-bit log-mel of a clip, 0.5 dB a step, (M, n) -> log-mel, silence behind it (M, window)."""
    mel = torch.from_numpy(mel).float() / 85 - 1.5
    # Log-mel spans 8 decades, 2.0 after Whisper's scaling: its floor is silence.
    return torch.nn.functional.pad(mel, (0, window - mel.shape[1]), value=float(mel.max()) - 2)


def spoken_clips(whisper: FrozenWhisper) -> list[tuple[Sentence, Tensor]]:
    """Test sentences that the checkpoint can hear and their log-mel (M, 2P)."""
    with np.load(SPEECH) as file:
        clips = np.split(file["mel"].T, np.cumsum(file["n_frames"])[:-1], axis=1)
        sentences = map(Sentence, file["language"].tolist(), file["text"].tolist())
    window = 2 * whisper.max_frames
    return [(sentence, mel_from_bytes(clip[:, :window], window))
            for sentence, clip in zip(sentences, clips)
            if sentence.language in whisper.languages and len(clip) == whisper.dims.n_mels]
