"""Runs of train.py in several processes, in official shapes, in many languages."""
import itertools
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import sample
import train
from data import Sentence
from model import OF_WHISPER
from plumbing import devices
from plumbing.errors import BadInput
from test_roundtrip import FLAGS, ROOT, batch_of, close, log_of, random_whisper
from text.durations import count_frames, n_frames
from text.error_rates import error_rates
from whisper_decoder import FrozenWhisper


def test_two_processes_take_the_steps_of_one_with_their_shares(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "train.py", *FLAGS, "--out_dir", str(tmp_path / "two")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "pocket on 2 x cpu" in done.stdout, done.stderr
    plain, count = train.objective, itertools.count()

    def both(model, critic, batch, x0, t, drop, room, flow_weight):
        parts, step = [], next(count)
        assert flow_weight == 0.3 and room == (step, 6)
        for rank in range(2):
            shard = data.Batch(batch.sentences[rank::2], {key: x[rank::2] for key, x in
                               batch.cond.items()}, batch.targets[rank::2],
                               batch.token_frames[rank::2])
            rng = data.generator(0, 2**31 + 2 * step + rank)
            noise = train.draw_noise(shard, critic.channels, 0.1, rng)
            parts.append(plain(model, critic, shard, *noise, room, flow_weight))
        return [sum(part) / 2 if part[0].ndim == 0 else torch.cat(part) for part in zip(*parts)]

    monkeypatch.setattr(train, "objective", both)
    monkeypatch.setattr(FrozenWhisper, "room_of_step", staticmethod(lambda *args: args[:2]))
    train.main([*FLAGS, "--out_dir", str(tmp_path / "one")])
    one, two = (train.load_checkpoint(tmp_path / x / "ckpt.pt")["ema"] for x in ("one", "two"))
    for name in one:
        close(one[name], two[name])
    norms = [[float(row[8]) for row in log_of(tmp_path / run)] for run in ("one", "two")]
    np.testing.assert_allclose(*norms, rtol=1e-3)


def test_samples_are_made_by_a_copy_of_the_averaged_weights(runs):
    checkpoint = train.load_checkpoint(runs[0] / "features")
    model = sample.load_flow(checkpoint, torch.device("cpu")).model
    for name, x in model.state_dict().items():
        assert torch.equal(x, checkpoint["ema"][name])
    assert not torch.equal(model.token_in.weight, checkpoint["model"]["token_in.weight"])
    # So they stay on the device of a network.
    assert model.no_text.data_ptr() != checkpoint["ema"]["no_text"].data_ptr()


def test_a_run_begins_with_the_weights_of_another(runs, tmp_path):
    flags = ["--data", f"de={ROOT / 'pocket/sentences/de.txt'}", "--steps", "1", "--device", "cpu",
             "--eval_sentences", "1", "--batch_size", "2", "--max_lines", "40", "--init_from",
             str(runs[0] / "features")]
    before = train.load_checkpoint(runs[0] / "features")["ema"]
    for rate, same in ("1e-9", True), ("0.5", False):
        train.main([*flags, "--depth", "1", "--learning_rate", rate, "--out_dir", str(tmp_path)])
        after = train.load_checkpoint(tmp_path)
        assert after["step"] == 1 and after["origin"]["languages"] == ["de"]
        for name in ("model", "ema"):
            assert all(torch.allclose(x, before[key], atol=1e-7)
                       for key, x in after[name].items()) == same
    with pytest.raises(BadInput, match="features needs its --latent, --depth 1 and --whisper"):
        train.main([*flags, "--depth", "2", "--out_dir", str(tmp_path / "other")])
    with pytest.raises(BadInput, match=r"no checkpoint .*none/ckpt\.pt"):
        train.main([*flags, "--init_from", str(tmp_path / "none")])


def test_an_ear_goes_on_with_another_whisper(runs, tmp_path):
    other = random_whisper(tmp_path / "other.pt")  # with narrower embeddings and a longer window
    flags = ["--whisper", other, "--steps", "1", "--depth", "1", "--batch_size", "2", "--device",
             "cpu", "--max_lines", "40", "--eval_sentences", "1", "--learning_rate", "1e-9",
             "--out_dir", str(tmp_path)]
    train.main([*flags, "--latent", "mel", "--init_from", str(runs[0] / "mel")])
    before, after = (train.load_checkpoint(x)["ema"] for x in (runs[0] / "mel", tmp_path))
    anew = {name.split(".")[0] for name, x in after.items() if x.shape != before[name].shape
            or not torch.allclose(x, before[name], atol=1e-7)}
    assert anew == {*OF_WHISPER} and after["token_out.weight"].abs().max() < 1e-9
    with pytest.raises(BadInput, match="features needs its --latent, --depth 1 and --whisper"):
        train.main([*flags, "--init_from", str(runs[0] / "features")])
    # Of the same shape, too: what features mean is known to their own decoder alone.
    flags += ["--whisper", str(ROOT / "pocket/judge.pt")]
    with pytest.raises(BadInput, match="features needs its --latent, --depth 1 and --whisper"):
        train.main([*flags, "--init_from", str(runs[0] / "features")])
    train.main([*flags, "--latent", "mel", "--init_from", str(runs[0] / "mel")])
    after = train.load_checkpoint(tmp_path)["ema"]
    assert {name.split(".")[0] for name, x in after.items() if not torch.allclose(
        x, before[name], atol=1e-7)} == {*OF_WHISPER} - {"position_out"}  # an ear has none


def test_samples_are_of_five_languages_and_others_each_time(capsys):
    held_out = [data.Sentence(code, f"{code} {i}") for i in range(9) for code in "abcdefg"]
    shown = []
    for step in (63, 126, 189):  # as many steps as sentences, and more
        train.show_samples(SimpleNamespace(step=step, config=train.Config(), transcribe_samples=(
            lambda found: [9 * s.text.upper() for s in found])), held_out)  # it repeats itself
        first, *lines = capsys.readouterr().out.splitlines()
        assert first == f"step {step}" and len({line.split()[0] for line in lines}) == 5
        assert all(line == f"  {line[2]}  {line[5:8]}  ->  {3 * line[5:8].upper()}"
                   for line in lines)
        shown += lines
    assert len({*shown}) > 10


def test_the_first_process_is_alone_at_first(monkeypatch):
    for rank, order in ((0, ["work", "wait"]), (1, ["wait", "work"])):
        seen = []
        monkeypatch.setattr(devices, "wait_for_all", lambda: seen.append("wait"))
        with devices.first_rank_first(rank):
            seen.append("work")
        assert seen == order


@pytest.mark.skipif(devices.resource is None, reason="the system does not tell")
def test_the_most_memory_ever_taken_is_told(runs):
    code = """import torch
from plumbing.devices import peak_memory
device = torch.device("cpu")
first = peak_memory(device)
x = torch.ones(10**8)
second = peak_memory(device)
del x
print(first, second, peak_memory(device))"""
    # By a shell: Linux counts what a parent had in memory before.
    out = subprocess.run(["sh", "-c", '"$0" -c "$1"; true', sys.executable, code], cwd=ROOT,
                         text=True, capture_output=True, check=True).stdout
    first, second, third = map(float, out.split())
    assert 0.05 < first < 2 and 0.38 < second - first < 0.45 and second <= third < second + 0.05
    assert first < runs[1]["features"]["peak_memory_gb"] < 24


def test_report_names_the_worst_of_many_languages(tmp_path, capsys):
    cers = {f"val_cer_4step_{n:02d}": n / 10 for n in range(10)}
    train.report(tmp_path / "result.txt", steps=6, **cers)
    assert capsys.readouterr().out.splitlines() == [
        "steps: 6", *(f"val_cer_4step_{n:02d}: {n / 10:.4f}" for n in range(5, 10)),
        *(f"val_cer_4step_{name}: 0.4500" for name in ("mean", "median"))]
    assert len((tmp_path / "result.txt").read_text().splitlines()) == 11


WIDE = {"tiny": dict(n_audio_state=384, n_audio_head=6, n_text_state=384, n_text_head=6),
        "large-v3": dict(n_audio_state=1280, n_audio_head=20, n_text_state=1280, n_text_head=20)}


@pytest.mark.parametrize("latent, n_languages, changes", [
    ("features", 1, dict(n_vocab=51864)), ("mel", 100, dict(n_vocab=51866, n_mels=128)),
    pytest.param("features", 99, WIDE["tiny"], marks=pytest.mark.slow),
    pytest.param("mel", 100, WIDE["large-v3"] | dict(n_vocab=51866, n_mels=128),
                 marks=pytest.mark.slow)], ids=["english", "128_mels", "tiny", "large-v3"])
def test_official_shapes_train_and_are_sampled(tmp_path, capsys, latent, n_languages, changes):
    path, text = random_whisper(tmp_path / "w.pt", **changes), tmp_path / "t.txt"
    text.write_text("\n".join(f"Sentence {n} here." for n in "one two three four five".split()))
    train.main(f"--whisper {path} --data en={text} --depth 1 --steps 1 --batch_size 4 --device cpu "
               f"--eval_sentences 1 --latent {latent} --out_dir {tmp_path}".split())
    (step, loss, nll, cfm, *_, norm, rate), = log_of(tmp_path)
    assert float(norm) > 0 and float(nll) > 1
    whisper = train.LATENTS[latent](path)
    assert len(whisper.languages) == n_languages
    batch = batch_of(whisper, [Sentence("en", "Grüße, 世界!")])
    features = whisper.features(data.noise(batch, whisper.channels, 0), batch.cond["frames"])
    assert features.shape == (1, 1500, changes.get("n_audio_state", 32))
    logits, said = whisper.model.decoder(batch.targets[:, :-1], features)[0], batch.targets[0, 1:]
    said = said.clone()
    said[n_languages > 1 : whisper.n_prompt - 1] = -100  # the language only, if there is a choice
    plain = F.cross_entropy(logits, said)
    close(whisper.nll(whisper.teacher_force(features, batch.targets), batch.targets)[0], plain)
    (tmp_path / "w.pt").rename(tmp_path / "moved.pt")
    argv = ["Hello.", "--ckpt", str(tmp_path / "ckpt.pt"), "--device", "cpu", "--steps", "1"]
    with pytest.raises(BadInput, match="w.pt': neither a file nor .*; --whisper says where"):
        sample.main(argv)
    sample.main([*argv, "--whisper", str(tmp_path / "moved.pt")])
    assert "letter by letter" in capsys.readouterr().out


def test_a_run_has_its_seed_and_its_speed(pocket, monkeypatch):
    one, again, other = (train.Run(train.Config(depth=1, speed=2.0, seed=seed), pocket)
                         for seed in (0, 0, 1))
    assert torch.equal(one.model.token_in.weight, again.model.token_in.weight)
    assert not torch.equal(one.model.token_in.weight, other.model.token_in.weight)
    lengths = []
    monkeypatch.setattr(train, "round_trips", lambda model, whisper, sentences, durations, solver: (
        lengths.extend(map(count_frames, durations)), [])[1])
    sentence = Sentence("en", "The children play football in the park.")
    one.transcribe_samples([sentence])
    assert lengths == [n_frames(sentence, 2.0)] < [n_frames(sentence)]


def test_the_log_tells_the_flow_loss_by_quarters_of_time(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "objective", lambda model, critic, batch, x0, t, *rest: (
        0 * sum(p.sum() for p in model.parameters()), t, t))
    train.main([*FLAGS, "--steps", "2", "--batch_size", "8", "--out_dir", str(tmp_path)])
    assert log_of(tmp_path)
    for row in log_of(tmp_path):
        assert [int(4 * float(x)) for x in row[4:8]] == [0, 1, 2, 3]


def test_what_was_read_is_what_error_rates_tell(runs, tmp_path, capsys):
    texts = ["The dog sleeps.", "The cat eats an apple."]
    sample.main([*texts, "--ckpt", str(runs[0] / "features"), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    read = [line[13:] for line in lines if line.startswith("read back")]
    rates = [error_rates([Sentence("en", text)], [x]).cer for text, x in zip(texts, read)]
    told = [line for line in lines if line.startswith("errors")]
    assert all(f"CER {rate:.1%}" in line for rate, line in zip(rates, told)) and max(rates) > 0
    cer, wer, _ = error_rates([Sentence("en", text) for text in texts], read)
    assert f"2 texts: CER {cer:.2%}, WER {wer:.2%}" in lines[-1]
    assert sum("4 euler steps, NFE 4, seed 0" in line for line in lines) == 2


def test_a_long_sentence_before_fifty_short_ones_is_evaluated(pocket):
    """The second fifty are evaluated with durations of their own."""
    long = Sentence("en", "The old teacher reads a long letter to all the children in the garden.")
    run = train.Run(train.Config(depth=1, eval_sentences=52), pocket)
    result = train.evaluate(run, [long, *[Sentence("en", "Yes.")] * 51])
    assert result["val_sentences"] == 52 and result["cer_shuffled_text"] > 0.5


def test_evaluation_is_of_so_many_steps_and_of_the_averaged_network(pocket):
    sentences = [Sentence("en", "The dog sleeps."), Sentence("en", "Mary reads a book.")]
    result = train.evaluate(SimpleNamespace(
        config=train.Config(), transcribe_samples=lambda found, solver: [
            s.text if solver.steps == 4 else "" for s in found]), sentences)
    assert result["val_cer_1step"] == 1 and result["val_cer_4step"] == 0
    assert result["cer_shuffled_text"] > 0.5
    run = train.Run(train.Config(), pocket)
    before = run.transcribe_samples(sentences)
    for p in run.model.parameters():
        p.data.zero_()
    assert run.transcribe_samples(sentences) == before != ["", ""]


def test_every_flag_of_the_objective_arrives(tmp_path, monkeypatch):
    seen, flags = {}, dict(temperature=1.5, speed=1.2, drop_text=0.3,
                           flow_weight=0.4, ema=0.9, weight_decay=0.2, learning_rate=3e-3)

    def spy(module, name, *positions):
        plain = getattr(module, name)

        def call(*args, **kwargs):
            seen.setdefault(name, []).extend([args[i] for i in positions] + [*kwargs.values()])
            return plain(*args, **kwargs)
        monkeypatch.setattr(module, name, call)

    spy(train, "load_data", 2, 3)
    spy(train, "MixedBatches", 2, 3, 4, 5, 0, 6)
    spy(train, "evaluate", 1)
    spy(data, "generator", 0, 1)
    spy(train, "draw_noise", 2)
    spy(train, "objective", 7)
    spy(train, "update_ema", 3)
    spy(devices, "mixed_precision", 1)
    spy(torch.nn.utils, "clip_grad_norm_", 1)
    monkeypatch.setattr(train.Run, "save", lambda run, log: seen.update(run=run))
    argv = [word for name, x in flags.items() for word in (f"--{name}", str(x))]
    train.main([*FLAGS, *argv, "--clip", "0.7", "--steps", "2", "--out_dir", str(tmp_path),
                "--seed", "5", "--batch_size", "3"])
    assert seen["load_data"] == [1.2, 1.5] and seen["MixedBatches"][:4] == [3, 5, 1.2, 1.7]
    (*_, trained, not_drawn), (held_out,) = seen["MixedBatches"], seen["evaluate"]
    assert not_drawn == held_out and not {*map(data.key, held_out)} & {*map(data.key, trained)}
    drawn = [*zip(seen["generator"][::2], seen["generator"][1::2])]
    assert drawn[:4] == [(5, 0), (5, 2**31), (5, 1), (5, 2**31 + 1)]  # batch and noise of a step
    assert seen["draw_noise"] == [0.3] * 2 and seen["objective"] == [0.4] * 2
    assert seen["update_ema"] == [0.9] * 2 and seen["mixed_precision"] == [128] * 2
    assert seen["clip_grad_norm_"] == [0.7] * 2
    group, run = seen["run"].optimizer.param_groups[0], seen["run"]
    assert group["weight_decay"] == 0.2
    assert group["lr"] == train.learning_rate(1, run.model.config.width, run.config) < 3e-3


@pytest.mark.parametrize("cpu, width, fast", [
    (dict(cpu_name="AMD EPYC", avx512_bf16=True), 384, True),
    (dict(cpu_name="AMD EPYC", avx512_bf16=True), 128, False),
    (dict(cpu_name="AMD EPYC", avx512_bf16=False), 512, False),
    (dict(cpu_name="Intel Xeon", avx512_bf16=True), 512, False),
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True), 512, True), ({}, 512, False)])
def test_matrix_products_are_bf16_where_that_is_faster(pocket, monkeypatch, cpu, width, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    x, in_encoder = torch.ones(2, 2), []
    attention = pocket.model.encoder.blocks[0].attn
    hook = attention.register_forward_pre_hook(
        lambda *_: in_encoder.append(torch.backends.cuda.flash_sdp_enabled()))
    with devices.mixed_precision(torch.device("cpu"), width), hook:
        assert (x @ x).dtype == (torch.bfloat16 if fast else torch.float32)
        assert torch.backends.cuda.flash_sdp_enabled() != fast
        pocket.encode_mel(torch.zeros(1, 80, 100))
        assert in_encoder == [True]
    assert (x @ x).dtype == torch.float32 and torch.backends.cuda.flash_sdp_enabled()


class Sessions(torch.utils.data.Dataset):
    def __getitem__(self, _):
        return os.getsid(0), signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_signal_to_all_processes_does_not_reach_those_that_make_batches():
    settings = devices.workers(torch.device("cuda"), 1)
    (session, is_deaf), = torch.utils.data.DataLoader(Sessions(), None, sampler=[0], **settings)
    assert session != os.getsid(0) and is_deaf


def test_processes_that_cannot_work_together(monkeypatch):
    for n, device, words in (("4", "cpu", "--batch_size 6 cannot be shared by 4"),
                             ("2", "mps", "2 processes cannot work together on mps")):
        monkeypatch.setenv("WORLD_SIZE", n)
        with pytest.raises(BadInput, match=words):
            devices.start_ranks(torch.device(device), 6)


def test_readme_says_how_long_the_files_are():
    readme, count = (ROOT / "README.md").read_text(), lambda *files: sum(
        len(file.read_text().splitlines()) for file in files)
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M)
    assert len(rows) == 7 and rows == [(name, str(count(ROOT / name))) for name, _ in rows]
    assert f"`plumbing/` ({count(*(ROOT / 'plumbing').glob('*.py'))} lines)" in readme
    assert f"(`ear.py`, {count(ROOT / 'speech' / 'ear.py')} lines)" in readme
