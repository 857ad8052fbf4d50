"""A text that greedy decoding would write is read in one pass, with the same result."""
import numpy as np
import torch

from plumbing.weights import POCKET
from test_roundtrip import random_whisper, spoken
from text import greedy
from whisper_decoder import FrozenWhisper


def compare(confirmed, decoded):
    for a, b in zip(confirmed, decoded, strict=True):
        assert (a.tokens, a.text, a.language, a.temperature, a.compression_ratio) == (
            b.tokens, b.text, b.language, b.temperature, b.compression_ratio)
        assert abs(a.avg_logprob - b.avg_logprob) < 1e-4
        assert abs(a.no_speech_prob - b.no_speech_prob) < 1e-5


def both_ways(whisper, features, codes, texts) -> int:
    """What is confirmed is the same as decoded -> of how many texts."""
    confirmed = greedy.confirm(whisper, features, codes, texts)
    pairs = [(a, b) for a, b in zip(confirmed, whisper.transcribe(features, codes)) if a]
    for a, b in pairs:
        compare([a], [b])
    return len(pairs)


def test_one_pass_confirms_what_decoding_would_write_and_nothing_else(pocket, monkeypatch):
    sentences, mel = spoken(pocket, 10)
    codes, texts = zip(*sentences)
    features = pocket.features_of_mel(mel)
    monkeypatch.setattr(greedy, "CHUNK", 7)
    decoded = pocket.transcribe(features, codes)
    drafts = [x.text for x in decoded]
    is_own = [pocket.tokenize(text, code) == x.tokens
              for text, code, x in zip(drafts, codes, decoded)]
    assert np.mean(is_own) > 0.9
    compare([x for x in greedy.confirm(pocket, features, codes, drafts) if x],
            [x for x, own in zip(decoded, is_own) if own])
    for wrong in (drafts[1:] + drafts[:1], [x[: len(x) // 2] for x in drafts],
                  [x + " dog" for x in drafts]):
        assert greedy.confirm(pocket, features, codes, wrong) == [None] * len(drafts)
    n_decoded, decode = [], greedy.decode
    monkeypatch.setattr(greedy, "decode", lambda whisper, features, codes: (
        n_decoded.append(len(features)) or decode(whisper, features, codes)))
    drafts[3:5] = drafts[4], drafts[3]
    compare(pocket.transcribe(features, codes, drafts), decoded)
    assert n_decoded == [len(drafts) - sum(is_own) + 2]


def speech_and_silence(whisper) -> tuple:
    """Features of seven clips and of silence, their languages, what is read."""
    sentences, mel = spoken(whisper, 40)
    features = torch.cat([whisper.features_of_mel(mel), whisper.silence[None]])
    codes = [*(s.language for s in sentences), "en"]
    texts = [x.text for x in whisper.transcribe(features, codes)]
    return features, codes, texts


def test_rules_and_equal_rows_change_nothing(pocket, tmp_path, monkeypatch):
    """Blanks that must not come first, tokens that are alike, the largest length."""
    features, codes, texts = speech_and_silence(pocket)
    said = pocket.tokenize(texts[0], codes[0])
    unused = pocket.row_count[pocket.row_of] > 1
    blank = pocket.tokenizer("en").encode(" ")[0]
    no_speech = pocket.tokenizer("en").no_speech
    for changed, like, factor, n in ((blank, said[0], 0.99, 8), (blank, said[1], 0.99, 8),
                                     (blank, said[1], 1 - 1e-6, 7), (unused, said[0], 1, 4),
                                     (unused, no_speech, 1, 5)):
        saved = torch.load(POCKET / "pocket.pt", weights_only=True)
        weight = saved["model_state_dict"]["decoder.token_embedding.weight"].float()
        weight[changed] = factor * weight[like]
        saved["model_state_dict"]["decoder.token_embedding.weight"] = weight
        torch.save(saved, tmp_path / "changed.pt")
        whisper = FrozenWhisper(str(tmp_path / "changed.pt"))
        assert both_ways(whisper, features, codes, texts) == n, (changed, like)
    make_task = greedy.make_task
    lengths = [len(x.tokens) for x in pocket.transcribe(features, codes)]
    for limit in {*lengths}:
        def short_task(whisper):
            task = make_task(whisper)
            task.sample_len = limit
            return task
        monkeypatch.setattr(greedy, "make_task", short_task)
        assert both_ways(pocket, features, codes, texts) == sum(n < limit for n in lengths)


def test_whatever_the_draft_is_the_result_is_that_of_decoding(pocket, tmp_path):
    features, codes, texts = speech_and_silence(pocket)
    assert both_ways(pocket, features, codes, texts) == len(texts)
    compare(pocket.transcribe(features, [None] * len(codes), texts),
            pocket.transcribe(features, [None] * len(codes)))
    strange = ["", "***", "<|endoftext|>", "a", 200 * "dog ", texts[1], texts[0], texts[7]]
    compare(pocket.transcribe(features, codes, strange), pocket.transcribe(features, codes))
    # An English-only one that writes " dog" and ends, whatever it hears (of most seeds).
    torch.manual_seed(0)
    english = FrozenWhisper(random_whisper(tmp_path / "en.pt", n_vocab=51864, n_audio_ctx=256,
                                           n_audio_state=128, n_text_state=128))
    decoder, tokenizer = english.model.decoder, english.tokenizer("en")
    for token, logit in ((tokenizer.eot, 400), (english.tokenize("dog", "en")[0], 250)):
        row = decoder.token_embedding.weight[token]
        decoder.ln.bias += logit * row / row.square().sum()
    x, codes = english.silence[None].expand(3, -1, -1), ["de", "en", None]
    assert both_ways(english, x[:2], codes[:2], ["dog", "dog"]) == 2
    compare(english.transcribe(x, codes, ["dog"] * 3), english.transcribe(x, codes))


def test_a_large_whisper_decodes_few_texts_at_once(pocket, monkeypatch):
    features, codes, _ = speech_and_silence(pocket)
    decoded, sizes, run = pocket.transcribe(features, codes), [], greedy.DecodingTask.run
    dims = pocket.dims
    three = 3 * 2 * 4 * dims.n_audio_ctx * dims.n_text_state * dims.n_text_layer  # float32
    monkeypatch.setattr(greedy, "CACHE", three)
    monkeypatch.setattr(greedy.DecodingTask, "run",
                        lambda task, x: sizes.append(len(x)) or run(task, x))
    compare(pocket.transcribe(features, codes), decoded)
    assert sizes == [3, 3, 2]
    monkeypatch.setattr(greedy, "CACHE", 1)
    compare(pocket.transcribe(features[:2], codes[:2]), decoded[:2])
    assert sizes[3:] == [1, 1]
