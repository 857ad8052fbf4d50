"""The frozen Whisper: tokens, latents and features, cross-entropy, greedy decoding, error rates.

x1 is the encoder's output before the gain and bias of its last LayerNorm, so every frame has mean 0
and variance 1, as N(0, I) has; the decoder reads it.
A critic, this or speech/ear.py's, has `channels`, `bound`, `speed_range`, `latents`, `features`,
`text_loss`.

B batch, L prompt + text + end tokens, T latent frames (20 ms), C latent channels, M mel bins,
P positions of Whisper's window (n_audio_ctx), E width of encoder and decoder, V vocabulary.
"""
import hashlib
import re
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from whisper.audio import HOP_LENGTH, log_mel_spectrogram
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE, Tokenizer, get_tokenizer

from plumbing.errors import BadInput, first_line

POCKET = Path(__file__).parent / "pocket" / "pocket.pt"
# Signs that `whisper.decode` never writes (suppress_tokens), and those that part words besides.
SILENT_SIGNS = r"""["()\[\]{}<>*_`~^|「」『』♩♪♫♬♭♮♯]"""
PARTING_SIGNS = r"[#+/:;=@\\]|-{2,}|(?<=\w)[()\[\]{}<>_`~^|]+(?=\w)|(?<=\d)\*(?=\d)"
UNSPACED = {"zh", "yue", "ja", "th", "lo", "my", "km", "bo"}  # written without spaces
CHUNK = 512  # targets whose logits are in memory at once; all would be a step's largest tensor


class FrozenWhisper:
    """A Whisper whose weights never change: pocket, an official name, or a checkpoint file."""

    bound = "sphere"  # of the endpoint, see model.DiTConfig
    speed_range = 1.7  # in training: so many times slower or faster

    def __init__(self, name: str = "pocket", device: str | torch.device = "cpu"):
        self.name, self.device = name, torch.device(device)
        # requires_grad_, not no_grad: the gradient of the loss has to pass through to x1.
        self.model = load_whisper(name, self.device).eval().requires_grad_(False)
        self.dims = self.model.dims
        self.channels, self.max_frames = self.dims.n_audio_state, self.dims.n_audio_ctx
        self.max_tokens = self.dims.n_text_ctx // 2  # whisper.decode stops there
        # In pocket all tokens that it never uses share one row of the embedding, and so one logit:
        # `token_nll` needs 1,900 logits, not 51,865. Official checkpoints have no equal rows.
        unique = self.model.decoder.token_embedding.weight.cpu().unique(
            dim=0, return_inverse=True, return_counts=True)
        self.rows, self.row_of, self.row_count = (x.to(self.device) for x in unique)
        # A language whose token has no embedding of its own was never trained.
        codes = list(LANGUAGES)[: self.model.num_languages if self.model.is_multilingual else 1]
        is_own = self.row_count[self.row_of] == 1  # (V,)
        self.languages = [code for code in codes if is_own[self.language_token(code)]]
        if not (self.languages and self.rows.isfinite().all()):
            raise BadInput(f"{name} was never trained: its weights are all alike, or no numbers")
        self.n_prompt = len(self.prompt(self.languages[0]))  # the same for all

    @cached_property
    def silence(self) -> Tensor:
        """What the decoder sees of silence (P, E)."""
        samples = np.zeros(self.max_frames * 2 * HOP_LENGTH, np.float32)
        with torch.autocast(self.device.type, enabled=False):  # may be asked for inside one
            return self.features_of_mel(log_mel_spectrogram(samples, self.dims.n_mels)[None])[0]

    @cached_property
    def fingerprint(self) -> str:
        """It changes with the weights, the first 1,000 of each tensor."""
        first = torch.cat([p.flatten()[:1000].float().cpu() for p in self.model.parameters()])
        return hashlib.sha256(first.numpy().tobytes()).hexdigest()[:16]

    def check_language(self, language: str) -> str:
        """A code or English name -> the code; BadInput if this checkpoint does not know it."""
        name = language.strip().lower()
        code = TO_LANGUAGE_CODE.get(name, re.split("[-_]", name)[0])  # en-US, zh_CN
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
        """The decoder's own token embeddings on N(0, I)'s scale, (...) -> (..., E)."""
        x = self.model.decoder.token_embedding(tokens.to(self.device))
        return F.layer_norm(x, x.shape[-1:])

    def encode(self, text: str, language: str) -> list[int]:
        """Text, after a blank -> the tokens that `whisper.decode` can write for it."""
        tokenizer = self.tokenizer(language)
        tokens = tokenizer.encode(" " + strip_unspoken(text), disallowed_special=())
        # It never writes a first blank that is a token alone, as before Chinese (suppress_blank).
        return tokens[1:] if tokens[:1] == tokenizer.encode(" ") else tokens

    def target_tokens(self, texts: Sequence[str], languages: Sequence[str]) -> Tensor:
        """Texts -> prompt + text + <|endoftext|>, padded with -1 (B, L), on the CPU."""
        rows = [[*self.prompt(code), *self.encode(text, code), self.tokenizer(code).eot]
                for text, code in zip(texts, languages, strict=True)]
        return pad_sequence([torch.tensor(row) for row in rows], True, padding_value=-1)

    def encode_mel(self, mel: Tensor) -> Tensor:
        """AudioEncoder.forward without its last gain and bias, log-mel (B, M, 2T) -> (B, T, E)."""
        encoder = self.model.encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel.to(self.device))))).transpose(1, 2)
        x = x + encoder.positional_embedding[: x.shape[1]]  # shorter windows will do
        for block in encoder.blocks:
            x = block(x)
        return F.layer_norm(x, x.shape[-1:])

    def features_of_mel(self, mel: Tensor) -> Tensor:
        """What the decoder sees of real speech, (B, M, 2T) -> (B, T, E)."""
        return self.model.encoder.ln_post(self.encode_mel(mel))

    latents = encode_mel  # x1 of real speech, (B, M, 2T) -> (B, T, C)

    def features(self, x1: Tensor, frames: Tensor) -> Tensor:
        """What the decoder sees of x1 and silence behind it, (B, T, C), (B,) -> (B, P, E)."""
        # Cross-attention has no mask: what is behind the speech is seen, in training as in use.
        speech = self.model.encoder.ln_post(x1.float())
        speech = F.pad(speech, (0, 0, 0, self.max_frames - x1.shape[1]))
        mask = torch.arange(self.max_frames, device=x1.device) < frames[:, None]
        return torch.where(mask[:, :, None], speech, self.silence)

    def text_loss(self, x1: Tensor, frames: Tensor, targets: Tensor,
                  room: object = None) -> Tensor:
        """`nll` of x1, alike in any room, (B, T, C), (B,), (B, L) -> (B,)."""
        return self.nll(self.features(x1, frames), targets)

    def nll(self, features: Tensor, targets: Tensor) -> Tensor:
        """Teacher-forced cross-entropy of language and text, nats per token, -> (B,).

        Features (B, any number, E), targets (B, L). Speech shows its language: without that token a
        flow speaks Mandarin that Whisper takes for German.
        """
        decoder, inputs = self.model.decoder, targets[:, :-1].clamp(min=0)
        x = decoder.token_embedding(inputs) + decoder.positional_embedding[: inputs.shape[1]]
        for block in decoder.blocks:
            x = block(x, features, mask=decoder.mask)
        mask = targets[:, 1:] >= 0  # position i predicts token i + 1
        mask[:, : self.n_prompt - 1] = False
        mask[:, 0] = self.model.is_multilingual  # <|startoftranscript|> predicts the language
        x = decoder.ln(x[mask]).float()  # (all predicted tokens, E)
        rows = self.row_of[targets[:, 1:][mask]]
        parts = [checkpoint(self.token_nll, *part, use_reentrant=False)
                 for part in zip(x.split(CHUNK), rows.split(CHUNK))]
        nll = torch.zeros(mask.shape, device=x.device).masked_scatter(mask, torch.cat(parts))
        return nll.sum(1) / mask.sum(1)

    def token_nll(self, x: Tensor, rows: Tensor) -> Tensor:
        """-log softmax over V tokens, (N, E), (N,) -> (N,): k equal rows weigh k exp(logit)."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round small losses away
            log_count = self.row_count.log()
            logits = x @ self.rows.T + log_count
            # The target is one of its k equal rows.
            return F.cross_entropy(logits, rows, reduction="none") + log_count[rows]

    def transcribe(self, features: Tensor, languages: Sequence[str | None]) -> list[DecodingResult]:
        """Greedy `whisper.decode`, past the encoder: features (B, P, E) -> hypotheses.

        None: the language is detected. avg_logprob is a mean over tokens, in nats; no_speech_prob
        that of <|nospeech|> as the first token; a compression_ratio above 2.4 Whisper calls a loop.
        """
        result = {}
        for language in dict.fromkeys(languages):  # whisper.decode takes one language a call
            items = [i for i, code in enumerate(languages) if code == language]
            language = language or (None if self.model.is_multilingual else "en")
            options = DecodingOptions(language=language, without_timestamps=True, fp16=False)
            result.update(zip(items, whisper.decode(self.model, features[items].float(), options)))
        return [replace(result[i], audio_features=None) for i in range(len(languages))]


def load_whisper(name: str, device: torch.device) -> whisper.model.Whisper:
    """`whisper.load_model`, with one clear sentence, a BadInput, where it fails."""
    names = ["pocket", *whisper.available_models()]
    if name not in names and not Path(name).is_file():
        raise BadInput(f"no Whisper {name!r}: neither a file nor one of {', '.join(names)}")
    try:
        model = whisper.load_model(str(POCKET) if name == "pocket" else name, "cpu")
    except Exception as error:  # whatever the download, torch.load and the constructor raise
        hint = ("a Whisper checkpoint has `dims` and `model_state_dict` as openai-whisper saves "
                "them" if Path(name).is_file() else "check the network, or use the embedded pocket")
        raise BadInput(f"cannot load Whisper {name!r} ({first_line(error)}); {hint}") from error
    if device.type == "mps":  # has no sparse tensors; only word times need these
        model.alignment_heads = model.alignment_heads.to_dense()
    return model.to(device)


def strip_unspoken(text: str) -> str:
    """A text without the signs that `whisper.decode` never writes."""
    text = re.sub(SILENT_SIGNS, "", re.sub(PARTING_SIGNS, " ", text))
    return " ".join(re.sub(r"(?<!\S)[-']+", "", text).split())  # nor these before a word


@cache
def normalizer(language: str):
    """Whisper's own: lower case, no punctuation; in English also one spelling, digits."""
    return (EnglishTextNormalizer() if language == "en" else
            BasicTextNormalizer(split_letters=language in UNSPACED))


def edit_distance(reference: Sequence, hypothesis: Sequence) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        previous, row = row, [i]
        for j, token in enumerate(hypothesis):
            row.append(min(row[j] + 1, previous[j + 1] + 1, previous[j] + (expected != token)))
    return row[-1]


class ErrorRates(NamedTuple):
    cer: float  # character error rate: edits / characters of the references
    wer: float  # word error rate; in languages without spaces a character is a word
    exact: float  # share of texts that come back letter by letter, punctuation included


def error_rates(sentences: Sequence[tuple[str, str]],  # (language, text)
                hypotheses: Sequence[str]) -> ErrorRates:
    """Corpus error rates after Whisper's normaliser, as fractions (above 1 if too much is read)."""
    edits, total, exact = np.zeros(2), np.zeros(2), 0
    for (language, reference), hypothesis in zip(sentences, hypotheses, strict=True):
        reference = strip_unspoken(reference)  # what it was asked to write
        exact += reference == hypothesis
        ref, hyp = (normalizer(language)(text).split() for text in (reference, hypothesis))
        space = "" if language in UNSPACED else " "
        letters = space.join(ref)
        edits += edit_distance(letters, space.join(hyp)), edit_distance(ref, hyp)
        total += len(letters), len(ref)
    cer, wer = edits / np.maximum(total, 1)
    return ErrorRates(float(cer), float(wer), exact / max(len(sentences), 1))
