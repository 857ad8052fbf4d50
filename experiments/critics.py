"""Is a critic that asks for more harder to fool? Train with others than the decoder's reading.

    python experiments/critics.py noise cuts                   # writes out/critics/NAME/ckpt.pt
    python experiments/critics.py adversarial --prior none     # other flags go to train.py

    noise         the decoder reads x1 with noise around it
    masks         it reads x1 with a gap of a tenth of its frames
    cuts          it reads x1 broken off before a word: the words until there must be there already
    adversarial   beside the reading, a network that tells x1 from the frames of real speech

What is asked for has to hold for real speech too, so `python experiments/critics.py real` prints
how well the decoder reads that under each.

B batch, T latent frames, C channels, L prompt + text + end tokens.
"""
import random
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]
import data  # noqa: E402
import train  # noqa: E402
from experiments.arms import names_and_flags, speak  # noqa: E402
from experiments.realism import hear  # noqa: E402
from whisper_decoder import BadInput, FrozenWhisper, UNSPACED  # noqa: E402

NOISE = 0.5  # standard deviation, at most; that of x1 is 1
GAP = 0.1  # share of the frames
ADVERSARY = 0.1  # weight beside the cross-entropy
MINUTES = 110  # of speech that the adversary hears


class Noise(FrozenWhisper):
    """Each item with its own share of noise, on the sphere again."""

    def reading_loss(self, x1, cond, targets):
        size = NOISE * torch.rand(len(x1), 1, 1, device=x1.device)
        x1 = F.layer_norm(x1 + size * torch.randn_like(x1), x1.shape[-1:])
        return super().reading_loss(x1, cond, targets)


class Masks(FrozenWhisper):
    """Noise in place of a tenth of each item, somewhere."""

    def reading_loss(self, x1, cond, targets):
        frames = cond["frames"][:, None]
        start = (torch.rand(len(x1), 1, device=x1.device) * (1 - GAP) * frames).long()
        place = torch.arange(x1.shape[1], device=x1.device) - start  # (B, T)
        is_gap = ((place >= 0) & (place < GAP * frames))[:, :, None]
        noise = F.layer_norm(torch.randn_like(x1), x1.shape[-1:])
        return super().reading_loss(torch.where(is_gap, noise, x1), cond, targets)


class Cuts(FrozenWhisper):
    """Every other item ends before one of its words, in the features and in the targets.

    Nothing is asked about the end of the text there: pocket would guess the rest, of real speech
    too.
    """

    def first_words(self, row: Tensor) -> list[int]:
        """A row of targets -> numbers of its text tokens, but for the first, that begin a word."""
        encoding, codes = self.tokenizer("en").encoding, UNSPACED & set(self.languages)
        is_unspaced = int(row[1]) in map(self.language_token, codes)
        tokens = row[self.n_prompt :][row[self.n_prompt :] >= 0][:-1]  # without the end
        pieces = [encoding.decode_single_token_bytes(t) for t in tokens.tolist()]
        whole = [not b"".join(pieces[:i]).decode(errors="replace").endswith("\ufffd")
                 for i in range(len(pieces))]
        return [i for i in range(1, len(pieces))
                if pieces[i][:1] == b" " or is_unspaced and whole[i]]

    def reading_loss(self, x1, cond, targets):
        frames, targets = cond["frames"].clone(), targets.clone()
        for i in range(0, len(x1), 2):
            if starts := self.first_words(targets[i]):
                n = random.choice(starts)
                frames[i] = (cond["token"][i, : frames[i]] < n).sum()
                targets[i, self.n_prompt + n :] = -1
        return super().reading_loss(x1, {**cond, "frames": frames}, targets)


class Adversary(FrozenWhisper):
    """Hinge loss (Lim and Ye 2017, arXiv 1705.02894) and spectral norm (Miyato et al. 2018,
    1802.05957): the network learns in every step, then the flow pays for what it finds unlike."""

    def __init__(self, name: str = "pocket"):
        super().__init__(name)
        training, _ = data.split(data.builtin())
        self.speech = speak(MINUTES, False, training, self).x1
        norm = nn.utils.parametrizations.spectral_norm
        wide = dict(kernel_size=9, padding=4)  # 25 frames in all, half a second
        self.network = nn.Sequential(
            norm(nn.Conv1d(self.channels, 128, **wide)), nn.SiLU(),
            norm(nn.Conv1d(128, 128, **wide)), nn.SiLU(),
            norm(nn.Conv1d(128, 1, **wide)))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-3, (0.5, 0.9))

    def judge(self, x1: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """How real each frame looks, and which are speech, (B, T, C), (B,) -> (B, T) twice."""
        is_speech = torch.arange(x1.shape[1]) < frames[:, None]
        return self.network((x1 * is_speech[:, :, None]).transpose(1, 2))[:, 0], is_speech

    def reading_loss(self, x1, cond, targets):
        made, is_made = self.judge(x1.detach(), cond["frames"])
        some = random.choices(self.speech, k=len(x1))
        frames = torch.tensor([len(x) for x in some])
        real, is_real = self.judge(nn.utils.rnn.pad_sequence(some, True).float(), frames)
        loss = F.relu(1 + made)[is_made].mean() + F.relu(1 - real)[is_real].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        made, _ = self.judge(x1, cond["frames"])
        unlike = -(made * is_made).sum(1) / is_made.sum(1)
        return super().reading_loss(x1, cond, targets) + ADVERSARY * unlike


CRITICS = dict(plain=FrozenWhisper, noise=Noise, masks=Masks, cuts=Cuts, adversarial=Adversary)


@torch.no_grad()
def read_real() -> None:
    """Print the decoder's loss in the real test sentences, under every critic that only reads."""
    for name in ("plain", "noise", "masks", "cuts"):
        random.seed(0)
        torch.manual_seed(0)
        whisper = CRITICS[name]("pocket")
        sentences, x1 = hear(*data.spoken_sentences(whisper), whisper)
        batch = data.make_batch(sentences, whisper, data.align_letters(sentences, x1), x1)
        nats = whisper.reading_loss(batch.x1, batch.cond, batch.targets)
        print(f"{name}: {nats.mean():.3f} nats per token of real speech")


def main(argv):
    names, given = names_and_flags(argv)
    if not names or set(names) - {"real", *CRITICS}:
        raise BadInput(f"give critics, some of {', '.join(CRITICS)}; or real")
    if "--resume" in given:
        raise BadInput("--resume cannot be used: what a critic has drawn and learned is not kept")
    for name in names:
        if name == "real":
            read_real()
            continue
        random.seed(0)
        torch.manual_seed(0)
        flags = ["--out_dir", f"out/critics/{name}", *given, "--whisper", "pocket",
                 "--device", "cpu"]
        train.main(flags, whisper=CRITICS[name]("pocket"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BadInput as error:
        sys.exit(f"critics.py: {error}")
