"""The frozen Whisper: tokens, latents and features, cross-entropy; reading: text/greedy.py.

x1 is the encoder's output before the gain and bias of its last LayerNorm, ln_post, so every frame
has mean 0 and variance 1, as N(0, I) has; with them it is the features, which the decoder reads.
Another critic, such as speech/ear.py's, overrides `channels`, `bound`, `speed_range`,
`room_of_step`, `latents`, `features`, `text_loss` and `shortcut`.

B batch, L prompt + text + end tokens, T latent frames (20 ms), C latent channels, M mel bins,
P positions of Whisper's window (n_audio_ctx), E width of encoder and decoder, R different rows of
the token embedding.
"""
from functools import cached_property
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from whisper.audio import HOP_LENGTH, log_mel_spectrogram
from whisper.tokenizer import LANGUAGES, Tokenizer, get_tokenizer

from plumbing.attention import attend, keys_and_values, silence_behind
from plumbing.devices import KERNELS
from plumbing.errors import BadInput
from plumbing.weights import distinct_rows, load_whisper, weights_fingerprint
from text import greedy
from text.spelling import language_code, strip_unspoken


class FrozenWhisper:
    """A Whisper whose weights never change: pocket, an official name, or a checkpoint file."""

    bound = "sphere"  # of the endpoint, see model.DiTConfig
    speed_range = 1.7  # speech in training is up to this many times slower or faster
    room_of_step = staticmethod(lambda step, n_steps, rng: None)  # no augmentation; an ear has one

    def __init__(self, name: str = "pocket", device: str | torch.device = "cpu"):
        self.name, self.device = name, torch.device(device)
        # requires_grad_, not no_grad: the gradient of the loss has to pass through to x1.
        self.model = load_whisper(name, self.device).eval().requires_grad_(False)
        self.dims = self.model.dims
        self.channels, self.max_frames = self.dims.n_audio_state, self.dims.n_audio_ctx
        self.n_samples = 2 * self.max_frames * HOP_LENGTH  # of 16 kHz, in its window
        self.max_tokens = self.dims.n_text_ctx // 2  # whisper.decode stops there
        # Equal embeddings, as of pocket's unused tokens, are one of R rows: a cheaper softmax.
        self.rows, self.row_of, self.row_count, is_own = distinct_rows(
            self.model.decoder.token_embedding.weight)
        # A language was trained if the embedding of its token is its own.
        codes = list(LANGUAGES)[: self.model.num_languages if self.model.is_multilingual else 1]
        self.languages = [code for code in codes if is_own[self.language_token(code)]]
        if not (self.languages and self.rows.isfinite().all()):
            raise BadInput(f"{name} was never trained: its weights are all alike, or not finite")
        self.fingerprint = weights_fingerprint(self.model.parameters())
        self.n_prompt = len(self.prompt(self.languages[0]))  # the same for all

    @cached_property
    def encoded_silence(self) -> Tensor:
        """The encoder's output for silence, before the gain and bias of ln_post (P, E)."""
        samples = torch.zeros(self.n_samples)
        # In float32, also where it is first asked for inside devices.mixed_precision.
        with torch.autocast(self.device.type, enabled=False):
            return self.encode_mel(log_mel_spectrogram(samples, self.dims.n_mels)[None])[0]

    @cached_property
    def silence(self) -> Tensor:
        """What the decoder sees of silence (P, E)."""
        return self.model.encoder.ln_post(self.encoded_silence)

    @cached_property
    def silence_keys(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the silence in each layer of the decoder, (P, E) twice."""
        return keys_and_values(self.model.decoder, self.silence)

    def check_language(self, language: str) -> str:
        """A code or English name -> the code; BadInput if this checkpoint does not know it."""
        code = language_code(language)
        if code not in self.languages:
            raise BadInput(f"{self.name} does not know the language {language!r}; it knows "
                           + ", ".join(self.languages))
        return code

    def tokenizer(self, language: str) -> Tokenizer:
        count = self.model.num_languages  # English-only checkpoints ignore the language
        return get_tokenizer(self.model.is_multilingual, num_languages=count, language=language)

    def prompt(self, language: str) -> list[int]:
        """<|startoftranscript|><|language|><|transcribe|><|notimestamps|>, as far as they exist."""
        return list(self.tokenizer(language).sot_sequence_including_notimestamps)

    def language_token(self, language: str) -> int:
        """The language's token; <|startoftranscript|> in an English-only checkpoint."""
        return self.prompt(language)[1 if self.model.is_multilingual else 0]

    def embed(self, tokens: Tensor) -> Tensor:
        """The decoder's token embeddings, layer-normed, (...) -> (..., E)."""
        x = self.model.decoder.token_embedding(tokens.to(self.device))
        return F.layer_norm(x, x.shape[-1:])

    @cached_property
    def token_direction(self) -> Tensor:
        """W₀ (E, E): the encoder's output along W₀ e raises the logit of a token with embedding e.

        Attention to a frame x adds W_out W_value x to a state, and so e · W_out W_value x to the
        logit of a token with the embedding e, if no later layer changes it. That grows along
        (W_out W_value)^T e, the "OV circuit" of Elhage et al. 2021, here summed over the layers,
        with the gains of encoder.ln_post and decoder.ln, and scaled: |W₀ e| is about |e|.
        """
        decoder = self.model.decoder
        paths = sum(b.cross_attn.out.weight @ b.cross_attn.value.weight for b in decoder.blocks)
        w = self.model.encoder.ln_post.weight[:, None] * paths.T * decoder.ln.weight
        return w * len(w) ** 0.5 / w.norm()

    def shortcut(self) -> tuple[Tensor, Tensor]:
        """For `DiT.init_shortcut`: what W begins as (C, E), and the fixed m (P, C).

        The latter is the encoder's silence less its mean over time, scaled to a root mean square of
        1/2; it helps attention to move forward.
        """
        m = self.encoded_silence - self.encoded_silence.mean(0)
        return self.token_direction, m / (2 * m.square().mean().sqrt())

    def tokenize(self, text: str, language: str) -> list[int]:
        """Text, after a space -> the tokens that `whisper.decode` can write for it."""
        tokenizer = self.tokenizer(language)
        tokens = tokenizer.encode(" " + strip_unspoken(text), disallowed_special=())
        # whisper.decode never begins with a lone space token (suppress_blank), as in Chinese.
        return tokens[1:] if tokens[:1] == tokenizer.encode(" ") else tokens

    def target_tokens(self, texts: Sequence[str], languages: Sequence[str]) -> Tensor:
        """Texts -> prompt + text + <|endoftext|>, padded with -1 (B, L), on the CPU."""
        rows = [[*self.prompt(code), *self.tokenize(text, code), self.tokenizer(code).eot]
                for text, code in zip(texts, languages, strict=True)]
        return pad_sequence([torch.tensor(row) for row in rows], True, padding_value=-1)

    def encode_mel(self, mel: Tensor) -> Tensor:
        """AudioEncoder.forward before ln_post's gain and bias, log-mel (B, M, 2T) -> (B, T, E)."""
        encoder = self.model.encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel.to(self.device))))).transpose(1, 2)
        x = x + encoder.positional_embedding[: x.shape[1]]  # the window may be shorter
        with sdpa_kernel(KERNELS):  # with flash attention, fast in long windows in bf16 too
            for block in encoder.blocks:
                x = block(x)
        return F.layer_norm(x, x.shape[-1:])

    def features_of_mel(self, mel: Tensor) -> Tensor:
        """What the decoder sees of real speech, (B, M, 2T) -> (B, T, E)."""
        return self.model.encoder.ln_post(self.encode_mel(mel))

    latents = encode_mel  # x1 of recordings (speech/), (B, M, 2T) -> (B, T, C)

    def features(self, x1: Tensor, frames: Tensor) -> Tensor:
        """What the decoder sees of x1 and silence behind it, (B, T, C), (B,) -> (B, P, E)."""
        # Whisper cannot be told where speech ends: silence fills its window, in training too.
        speech = self.model.encoder.ln_post(x1.float())  # normalises guided and midpoint x1
        speech = F.pad(speech, (0, 0, 0, self.max_frames - x1.shape[1]))
        mask = torch.arange(self.max_frames, device=x1.device) < frames[:, None]
        return torch.where(mask[:, :, None], speech, self.silence)

    def text_loss(self, x1: Tensor, batch, room=None) -> tuple[Tensor, Tensor]:
        """x1 (B, T, C), a data.Batch -> loss and nll, (B,), here the same; room is an ear's."""
        # As through `features`, but the keys and values of the silence are not computed again.
        speech = self.model.encoder.ln_post(x1.float())
        states = self.teacher_force(speech, batch.targets, batch.cond["frames"])
        nll = self.nll(states, batch.targets)
        return nll, nll

    def teacher_force(self, features: Tensor, targets: Tensor,
                      frames: Tensor | None = None) -> Tensor:
        """The decoder's last states, (B, T, E), (B, L) -> (B, L - 1, E).

        With frames (B,), silence up to P positions stands behind the features.
        """
        decoder, inputs = self.model.decoder, targets[:, :-1].clamp(min=0)
        x = decoder.token_embedding(inputs) + decoder.positional_embedding[: inputs.shape[1]]
        if frames is not None:
            silences = silence_behind(self.silence_keys, frames, features.shape[1])
        for i, block in enumerate(decoder.blocks):
            x = x + block.attn(block.attn_ln(x), mask=decoder.mask)[0]
            y = block.cross_attn_ln(x)
            x = x + (block.cross_attn(y, features)[0] if frames is None else
                     attend(block.cross_attn, y, features, *silences[i]))
            x = x + block.mlp(block.mlp_ln(x))
        return decoder.ln(x)

    def nll(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of language, text and end, nats per token, (B, L - 1, E), (B, L) -> (B,).

        The language's token counts too, or Whisper could hear a flow's Mandarin as German.
        """
        mask = targets[:, 1:] >= 0  # position i predicts token i + 1
        mask[:, : self.n_prompt - 1] = False
        mask[:, 0] = self.model.is_multilingual  # but <|startoftranscript|> predicts the language
        target, log_count = self.row_of[targets[:, 1:][mask]], self.row_count.log()
        with torch.autocast(states.device.type, enabled=False):  # bf16 rounds small losses away
            # k equal rows weigh k exp(logit) in the softmax, and the target is one of them.
            logits = F.linear(states[mask].float(), self.rows, log_count)  # (predicted tokens, R)
            per_token = F.cross_entropy(logits, target, reduction="none") + log_count[target]
        return mean_per_item(per_token, mask)

    transcribe = greedy.transcribe  # features (B, P, E) -> what `whisper.decode` reads


def mean_per_item(values: Tensor, mask: Tensor) -> Tensor:
    """values[i] belongs to the i-th True of mask (B, L) -> the mean of each item (B,)."""
    grid = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)
    return grid.sum(1) / mask.sum(1)
