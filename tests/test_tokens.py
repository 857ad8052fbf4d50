"""Sound tokens and the language model of them: experiments/tokens.py, speech_lm.py, speed.py."""
import json

import pytest
import torch

import data
from data import Sentence
from experiments import speech_lm, speed, tokens
from experiments.student import Speech, letters
from plumbing.errors import BadInput
from pocket import make_pocket
from speech.recordings import soundfile
from test_roundtrip import close, randn
from text.sources import builtin, load_sentences
from whisper_decoder import FrozenWhisper


@pytest.fixture(scope="module")
def real(pocket):
    speech = tokens.real_test(pocket, pocket.languages)
    return Speech(speech.sentences[::10], speech.x1[::10])


def test_languages_that_no_clip_has(pocket):
    german = tokens.real_test(pocket, ["de", "it"]).sentences
    assert {s.language for s in german} == {"de"}
    rest = tokens.real_test(pocket, ["de"], {*map(letters, german[:5])}).sentences
    assert rest == [s for s in german if letters(s) not in map(letters, german[:5])]
    with pytest.raises(BadInput, match="pocket can hear no clip .* not learned in it; give --rec"):
        tokens.real_test(pocket, ["it"])


def test_forms_of_other_projects(tmp_path):
    assert tokens.sound([3, 314]) == ("<|sound_start|><|sound_0003|><|sound_0314|><|sound_end|>")
    assert tokens.run_lengths([7, 7, 194]) == (
        "<|duration_02|><|sound_0007|><|duration_01|><|sound_0194|>")
    assert tokens.run_lengths([5] * 100) == (
        "<|duration_99|><|sound_0005|><|duration_01|><|sound_0005|>")
    task, heard = "<|reserved_special_token_69|>", "<|sound_start|><|sound_0511|><|sound_end|>"
    ichigo = tokens.row("ichigo", 7, "A dog\nsleeps.", [511])
    assert ichigo == dict(
        index=7, tokens=[511], text_prompt="A dog sleeps.", answer="A dog sleeps.", length=1,
        prompt=heard, conversations=[dict(content=task + heard, role="user"),
                                     dict(content="A dog sleeps.", role="assistant")])
    assert tokens.row("speechless", 7, "A dog\nsleeps.", [2, 2]) == dict(
        index=7, prompt=task + "A dog sleeps.", answer="<|duration_02|><|sound_0002|>")
    file = tokens.write_rows([ichigo], tmp_path, "x")
    if file.suffix == ".parquet":
        import pyarrow.parquet
        assert pyarrow.parquet.read_table(file).to_pylist() == [ichigo]
    else:
        assert json.loads(file.read_text()) == ichigo


def test_a_quantiser_learns_and_padding_changes_nothing(pocket, real):
    before, after = tokens.Quantiser(pocket).eval(), tokens.train_quantiser(real, pocket, 40, 0)
    texts = pocket.target_tokens(*zip(*((s.text, s.language) for s in real.sentences[:8])))
    loss = [sum(tokens.quantiser_loss(q, real.x1[:8], pocket, texts).values()).item()
            for q in (before, after)]
    assert loss[1] < 0.2 * loss[0]
    figures, worse = (tokens.judge(quantiser, real, pocket) for quantiser in (after, before))
    german = Speech(*zip(*(pair for pair in zip(*real) if pair[0].language == "de")))
    only = tokens.judge(after, german, pocket)
    assert only["cer_quantised"] == only["cer_quantised_de"] == figures["cer_quantised_de"]
    assert figures["cer_plain"] < 0.05 and figures["cer_quantised"] < 0.2 < worse["cer_quantised"]
    assert figures["codes"] > 30 and 3 < figures["entropy"] <= 9
    with pytest.raises(BadInput, match="63 frames of speech are too few for codes of 64"):
        tokens.train_quantiser(real._replace(x1=[x[:9] for x in real.x1[:7]]), pocket, 1, 0)
    cut = [x[:n] for x, n in zip(real.x1, (60, 44, *range(21, 43, 2)))]
    features, frames = tokens.features_of(cut, pocket)
    made = after(features, frames)
    for x, y, ids, n in zip(features, made.features, made.tokens, frames):
        alone = after(x[None, :n], n[None])
        assert torch.equal(ids[: (n + 1) // 2], alone.tokens[0])  # of an odd length too
        close(y[:n], alone.features[0], atol=1e-3)
    (made.features.square().mean() + made.commitment).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in after.parameters())


def test_codes_that_nothing_uses_move(pocket):
    quantiser, x = tokens.Quantiser(pocket), torch.nn.functional.normalize(randn(40, 64), dim=1)
    quantiser.uses.zero_()
    quantiser.update(x, torch.zeros(40, dtype=torch.long))
    assert quantiser.uses[0] > 1 and (quantiser.codes @ x.T).amax(1).gt(0.999).sum() == 40


def test_a_language_model_reads_on_where_it_was():
    torch.manual_seed(0)
    model = speech_lm.SpeechLM(600).eval()
    ids = torch.randint(0, 600, (2, 20))
    whole, caches = model(ids), [[] for _ in model.blocks]
    parts = [model(ids[:, :12], 0, caches)]
    parts += [model(ids[:, i : i + 1], i, caches) for i in range(12, 20)]
    close(torch.cat(parts, 1), whole, atol=1e-4)
    ids[:, 10:] = 0
    close(model(ids)[:, :10], whole[:, :10])  # nothing comes from the future


def test_a_language_model_learns_tokens_and_their_text():
    sounds = [[[i, i, 100 + i]] * 3 for i in range(8)]
    versions, texts = [[s[k] for s in sounds] for k in range(2)], list("abcdefgh")
    alphabet = {c: speech_lm.END + 1 + i for i, c in enumerate(texts)}
    model = speech_lm.train_model(versions, texts, alphabet, randn(512, 64), 150, 0)
    cer, perplexity = speech_lm.test(model, versions[0], texts, alphabet)
    assert cer == 0 and 1 <= perplexity < 3
    again = speech_lm.test(model, [*versions[0], [3]], [*texts, ""], alphabet)  # no pair of sounds
    assert abs(again[1] - perplexity) < 1e-3
    cer, other = speech_lm.test(model, [[200, 3, 77]] * 8, texts, alphabet)
    assert cer > 0.5 and other > 10 * perplexity


def test_commands(runs, pocket, tmp_path, monkeypatch, capsys):
    ear, features = (str(runs[0] / name) for name in ("mel", "features"))
    few = [Sentence("en", "The dog sleeps."), Sentence("de", "Die Sonne scheint.")]
    for code in ("en", "de"):
        (tmp_path / f"{code}.txt").write_text("\n".join(
            s.text for s in builtin(400) if s.language == code), "utf-8")
    text = ["--data", *(f"{code}={tmp_path}/{code}.txt" for code in ("en", "de"))]
    held_out, judge_it, judged, known = [Sentence("fr", "Le chien dort.")], tokens.judge, [], []
    monkeypatch.setattr(tokens.data, "per_language", lambda _, n: held_out if n == 100 else few)
    monkeypatch.setattr(tokens, "judge", lambda quantiser, speech, whisper: judged.append(
        speech.sentences) or judge_it(quantiser, speech, whisper))
    speech = tokens.speak(features, few, pocket, tmp_path)
    judge = FrozenWhisper("pocket/judge.pt")
    heard = [tokens.speak(ear, few, whisper, tmp_path).x1[0] for whisper in (pocket, judge)]
    assert heard[0].shape == heard[1].shape and (heard[0] - heard[1]).abs().mean() > 0.1
    with pytest.raises(BadInput, match="whose features are not those of pocket/judge.pt"):
        tokens.speak(features, few, judge, tmp_path)
    monkeypatch.setattr(tokens, "real_test", lambda *args: known.append(args[2]) or speech)
    monkeypatch.setattr(speech_lm, "real_test", tokens.real_test)
    tokens.main([ear, "--steps", "2", "--out", str(tmp_path), "--write", features, "--form",
                 "speechless", *text])
    out = capsys.readouterr().out
    assert "real speech: " in out and "speechless_features." in out and ": 2 rows" in out
    assert "\n  CER: " in out and "\n  CER en: " in out
    assert judged == [few, held_out] and known == [{"the dog sleeps", "die sonne scheint"}]
    with pytest.raises(BadInput, match="quantiser.pt is there already; --quantiser .* uses it"):
        tokens.main([ear, "--out", str(tmp_path)])
    with pytest.raises(BadInput, match="is no quantiser of pocket .'whisper'.; "):
        tokens.main([ear, "--quantiser", str(runs[0] / "mel" / "ckpt.pt"), *text])
    with pytest.raises(BadInput, match="is no quantiser of pocket/judge.pt .it is of another.; "):
        tokens.load_quantiser(tmp_path / "quantiser.pt", judge)
    with pytest.raises(BadInput, match="would be written to one file"):
        tokens.main([ear, "--write", ear, f"{ear}/ckpt.pt"])
    with pytest.raises(BadInput, match="hears at most 20 frames, and a sentence has"):
        monkeypatch.setattr(judge, "max_frames", 20)
        tokens.speak(ear, few, judge, tmp_path)
    monkeypatch.setattr(make_pocket, "need_espeak", lambda: None)
    with pytest.raises(BadInput, match="espeak-ng cannot read ja; give --data in others"):
        tokens.speak("espeak", [Sentence("ja", "犬が眠る。")], pocket, tmp_path)
    with pytest.raises(BadInput, match="is too long for pocket, with which .*mel was trained"):
        tokens.speak(ear, [Sentence("en", "The dog sleeps. " * 20)], judge, tmp_path)
    with pytest.raises(BadInput, match="never learned it; give --data in de, en"):
        tokens.speak(ear, [Sentence("it", "Ciao.")], pocket, tmp_path)
    with pytest.raises(BadInput, match="never learned it"):
        tokens.check_sources([ear], [Sentence("it", "Ciao.")], pocket)
    for study, flag in (tokens, ["--write"]), (speech_lm, []):
        with monkeypatch.context() as patch, pytest.raises(BadInput, match="no checkpoint .*nix"):
            patch.setattr(study, "speak", None)  # before the work
            study.main([ear, *flag, str(tmp_path / "nix"), "--quantiser",
                        str(tmp_path / "quantiser.pt"), *text])
    speech_lm.main([ear, features, "--quantiser", str(tmp_path / "quantiser.pt"), "--steps", "2",
                    "--chance", *text])
    out, err = capsys.readouterr()
    assert "never heard" not in err
    assert out.count("% | ") == 6 and f"| {ear}, with other texts | " in out
    assert known[-1] == {*map(letters, data.split(load_sentences(text[1:], pocket))[0])}
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", randn(24000).numpy() / 10, 16000)
    (tmp_path / "manifest.tsv").write_text("a.wav\ten\tA cat.\nb.wav\ten\tThe dog sleeps.\n")
    tested = []
    monkeypatch.setattr(speech_lm, "test", lambda *args: tested.append(args[2]) or (0, 1))
    speech_lm.main([features, "--quantiser", str(tmp_path / "quantiser.pt"), "--steps", "2",
                    "--languages", "en", "--data", "en=builtin", "--recordings", str(tmp_path)])
    assert tested[0] == ["a cat"]  # the other was learned from
    capsys.readouterr()
    tokens.main([features, "--quantiser", str(tmp_path / "quantiser.pt"), "--recordings",
                 str(tmp_path), *text])
    out, err = capsys.readouterr()
    assert "\npeople: " in out and "never heard" not in err
    tokens.note_unheard(tokens.load_quantiser(tmp_path / "quantiser.pt", pocket), held_out)
    assert "never heard fr, only de, en; what" in capsys.readouterr().err
    speed.main([features, ear, "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.count("one token after the other | ") == 4 and "wav, 4 steps | 2 |" in out
    assert out.count("tokens, 1 steps | ") == 4
