"""Greedy decoding by Whisper, past its encoder: step by step, or one pass that confirms a text.

B batch, P positions of Whisper's window, E width, L prompt + text + end tokens, N tokens of all
texts, V tokens of the vocabulary, R different rows of their embedding.
"""
from dataclasses import replace
from functools import partial
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.decoding import DecodingOptions, DecodingResult, DecodingTask
from whisper.utils import compression_ratio

CHUNK = 256  # tokens whose logits, R each, are in memory at once
CACHE = 2**31  # bytes of keys and values that Whisper keeps at once while it decodes, about
MARGIN = 0.1  # by which a logit is surely the largest, in spite of rounding, in TF32 too


def transcribe(whisper, features: Tensor, languages: Sequence[str | None],
               texts: Sequence[str] | None = None) -> list[DecodingResult]:
    """Greedy `whisper.decode`, past the encoder: features (B, P, E) -> hypotheses.

    None: the language is detected. texts: drafts, as in speculative decoding: one that a single
    pass confirms is not decoded; the result is the same.
    """
    features, results = features.float(), [None] * len(features)
    if texts and None not in languages:
        results = confirm(whisper, features, languages, texts)
    rest = [i for i, result in enumerate(results) if result is None]
    decoded = iter(decode(whisper, features[rest], [languages[i] for i in rest]) if rest else ())
    return [result or next(decoded) for result in results]


def make_task(whisper) -> DecodingTask:
    """Of `whisper.decode`: greedy, without timestamps, with its rules of what it never writes."""
    language = None if whisper.model.is_multilingual else "en"
    return DecodingTask(whisper.model, DecodingOptions(language=language, without_timestamps=True,
                                                       fp16=False))


def decode(whisper, features: Tensor,
           languages: Sequence[str | None]) -> list[DecodingResult]:
    """Token after token, (B, P, E) -> hypotheses. None: the language is detected."""
    task, dims, results = make_task(whisper), whisper.dims, []
    # In float32, of every position and layer: so few items of a large Whisper at once.
    n = max(1, CACHE // (8 * features.shape[1] * dims.n_text_state * dims.n_text_layer))
    for i in range(0, len(features), n):
        if whisper.model.is_multilingual:
            task._detect_language = partial(detect_language, whisper, languages[i : i + n])
        results += task.run(features[i : i + n])
    return [replace(x, audio_features=None) for x in results]  # (P, E) each


def detect_language(whisper, languages: Sequence[str | None], features: Tensor,
                    tokens: Tensor) -> tuple[list[str], None]:
    """Those that are given, or Whisper's guess, written into tokens (B, n_prompt) too.

    DecodingTask's own knows one language a batch, so each language would need its own call.
    """
    guesses = whisper.model.detect_language(features)[1] if None in languages else languages
    codes = [code or max(guess, key=guess.get) for code, guess in zip(languages, guesses)]
    tokens[:, 1] = torch.tensor([whisper.language_token(code) for code in codes])
    return codes, None


@torch.no_grad()
def confirm(whisper, features: Tensor, languages: Sequence[str],
            texts: Sequence[str]) -> list[DecodingResult | None]:
    """What `decode` returns for each text that it surely writes as it stands; None for others.

    It writes a text if after each token the next one has the largest logit. One teacher-forced pass
    shows that for all tokens at once, as it checks a draft in speculative decoding (Leviathan et
    al. 2023, arXiv 2211.17192).
    """
    task = make_task(whisper)
    targets = whisper.target_tokens(texts, languages).to(whisper.device)
    if targets.shape[1] > task.n_ctx:
        return [None] * len(texts)
    states = whisper.teacher_force(features, targets)  # (B, L - 1, E)
    is_sure, avg_logprob = score(whisper, task, states, targets)
    logits = F.linear(states[:, 0], whisper.model.decoder.token_embedding.weight)  # (B, V)
    no_speech = logits.softmax(1)[:, task.tokenizer.no_speech]
    results = []
    for row, sure, code, *scores in zip(targets.tolist(), is_sure.tolist(), languages,
                                        avg_logprob.tolist(), no_speech.tolist()):
        tokens = row[whisper.n_prompt : row.index(task.tokenizer.eot)]
        text, code = task.tokenizer.decode(tokens).strip(), task.options.language or code
        result = DecodingResult(None, code, None, tokens, text, *scores, 0.0,
                                compression_ratio(text))
        results.append(result if sure and len(tokens) < task.sample_len else None)
    return results


def score(whisper, task: DecodingTask, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each text: has every token surely the largest logit, and the mean log-probability of all.

    (B, L - 1, E), (B, L) -> (B,), (B,). Only what Whisper may write counts.
    """
    position = torch.arange(targets.shape[1] - 1, device=targets.device)
    mask = (targets[:, 1:] >= 0) & (position >= whisper.n_prompt - 1)  # what predicts text and end
    later = (position >= whisper.n_prompt).long().expand_as(mask)[mask]  # 0: the first token
    rows = whisper.row_of[targets[:, 1:][mask]]  # (N,)
    log_counts = allowed_counts(whisper, task).log()  # (2, R)
    log_p, margins = [], []
    for x, i, row in zip(*(tensor.split(CHUNK) for tensor in (states[mask], later, rows))):
        # k equal rows count as one whose logit is larger by log k, so none is overlooked.
        logits, row = F.linear(x, whisper.rows).add_(log_counts[i]), row[:, None]
        logit = logits.gather(1, row)[:, 0]
        log_p.append(logit - logits.logsumexp(1))
        margins.append(logit - logits.scatter_(1, row, -torch.inf).amax(1))
    is_sure, logprobs = torch.ones_like(mask), torch.zeros(mask.shape, device=mask.device)
    is_sure[mask] = (torch.cat(margins) > MARGIN) & (whisper.row_count[rows] == 1)
    logprobs[mask] = torch.cat(log_p)
    return is_sure.all(1), logprobs.sum(1) / mask.sum(1)


def allowed_counts(whisper, task: DecodingTask) -> Tensor:
    """How many tokens of each row Whisper may write first and later, by its own filters (2, R)."""
    counts = []
    for n in (task.sample_begin, task.sample_begin + 1):
        logits = torch.zeros(1, len(whisper.row_of), device=whisper.device)
        for logit_filter in task.logit_filters:
            logit_filter.apply(logits, torch.zeros(1, n))
        counts.append(torch.zeros_like(whisper.row_count, dtype=torch.float).index_add(
            0, whisper.row_of, logits[0].exp()))
    return torch.stack(counts)
