"""Other decoders, made of pocket by minutes of training, and what the flow learns from each.

    python experiments/decoders.py window    # 1,500 audio positions, as all official checkpoints
    python experiments/decoders.py prior     # guesses well, and hardly has to listen
    python experiments/decoders.py salad     # pocket itself, and words in random order

The first two print greedy error rates of held-out text and teacher-forced cross-entropy: a decoder
that is a strong language model says the text with hardly a look at the features once the words so
far are given, so that training may see no error where reading has one.
"salad" has pocket read real speech of words that it knows, in no order. Needs espeak-ng.
"""
import random
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from whisper.model import sinusoids

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]
import data  # noqa: E402
import make_pocket  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from experiments import realism  # noqa: E402
from whisper_decoder import BadInput, FrozenWhisper  # noqa: E402

SEED, N_SENTENCES, TUNING_STEPS, BATCH = 4000, 2000, 800, 24
STEPS = 800  # of the flow
WORK = ROOT / "out" / "decoders"


def falsify(tokens: Tensor, n_prompt: int, share: float, rng: torch.Generator) -> Tensor:
    """Text tokens of a random part of each item become others of the batch, (B, L) -> (B, L).

    share is the mean of that part, at most half. Words so far that are false make the decoder
    listen, where it would guess the next one from them.
    """
    false = torch.rand(tokens.shape, generator=rng) < 2 * share * torch.rand(
        len(tokens), 1, generator=rng)
    false[:, :n_prompt] = False
    said = tokens[:, n_prompt:]
    said = said[said >= 0]
    return torch.where(false, said[torch.randint(len(said), tokens.shape, generator=rng)], tokens)


class Misled(FrozenWhisper):
    """A critic that is told false words so far in training."""

    share, rng = 0.0, torch.Generator().manual_seed(0)

    def reading_loss(self, x1: Tensor, cond: dict[str, Tensor], targets: Tensor) -> Tensor:
        so_far = falsify(targets, self.n_prompt, self.share, self.rng)
        return self.cross_entropy(self.features(x1, cond["frames"]), targets, so_far)


def speech() -> realism.Speech:
    """Sentences of the training, spoken, and what the encoder makes of them."""
    make_pocket.need_espeak()
    whisper = FrozenWhisper("pocket")
    sentences, _ = data.split(data.builtin())
    random.Random(3).shuffle(sentences)
    sentences = train.balanced(sentences, N_SENTENCES)
    clips = make_pocket.speak_all(sentences, make_pocket.VARIANTS, SEED, WORK, "decoders")
    return realism.hear(sentences, clips, whisper)


def tune(name: str, max_frames: int, hidden: float) -> str:
    """Train pocket's decoder on, with so many audio positions -> its file.

    hidden: share of the items whose speech breaks off anywhere, so that the rest must be guessed.
    """
    path = WORK / f"{name}.pt"
    if path.exists():
        return str(path)
    pocket = FrozenWhisper("pocket").model
    dims, state = asdict(pocket.dims) | dict(n_audio_ctx=max_frames), pocket.state_dict()
    state["encoder.positional_embedding"] = sinusoids(max_frames, pocket.dims.n_audio_state)
    with data.writing(path) as part:
        torch.save(dict(dims=dims, model_state_dict=state), part)
        whisper = FrozenWhisper(str(part))
        parameters = [p.requires_grad_() for p in whisper.model.decoder.blocks.parameters()]
        optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, TUNING_STEPS)
        sentences, x1 = speech()
        rng = torch.Generator().manual_seed(0)
        for _ in tqdm(range(TUNING_STEPS), desc=f"tuning {name}"):
            picks = torch.randint(len(x1), (BATCH,), generator=rng).tolist()
            lasting = [data.letter_lengths(sentences[i]) for i in picks]
            lasting = [n * len(x1[i]) / n.sum() for n, i in zip(lasting, picks)]
            batch = data.make_batch([sentences[i] for i in picks], whisper, lasting,
                                    [x1[i] for i in picks])
            frames = batch.cond["frames"]
            cut = torch.rand(BATCH, generator=rng) < hidden
            heard = (frames * torch.rand(BATCH, generator=rng)).int()
            features = whisper.features(batch.x1, torch.where(cut, heard, frames))
            so_far = falsify(batch.targets, whisper.n_prompt, 0.0 if hidden else 0.1, rng)
            loss = whisper.cross_entropy(features, batch.targets, so_far).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.save(dict(dims=dims, model_state_dict=whisper.model.state_dict()), part)
    return str(path)


@torch.no_grad()
def teacher_forced(out: Path, name: str) -> list[float]:
    """Cross-entropy of held-out text in nats per token, the words so far given: of silence, and of
    what the flow makes in 4 steps."""
    whisper = FrozenWhisper(name)
    model = sample.load_model(sample.load_checkpoint(out / "ckpt.pt"), whisper.device)
    _, held_out = data.split(data.builtin())
    batch = data.make_batch(train.balanced(held_out, 250), whisper)
    x1 = sample.generate(model, whisper, batch, sample.Settings())[-1]
    silence = whisper.silence.expand(len(x1), -1, -1)
    return [whisper.cross_entropy(features, batch.targets).mean().item()
            for features in (silence, whisper.features(x1, batch.cond["frames"]))]


def salad() -> None:
    """CER of pocket in real speech: held-out sentences, and five words of them in random order."""
    make_pocket.need_espeak()
    WORK.mkdir(parents=True, exist_ok=True)
    whisper, rng, kinds = FrozenWhisper("pocket"), random.Random(0), {"sentences": [], "words": []}
    _, held_out = data.split(data.builtin())
    for code in ("de", "en", "es", "fr"):
        texts = [s.text for s in held_out if s.language == code]
        for text in texts[:50]:
            said = [rng.choice(rng.choice(texts).rstrip(".!?").split()) for _ in range(5)]
            kinds["sentences"].append(data.Sentence(code, text))
            kinds["words"].append(data.Sentence(code, " ".join(said).capitalize() + "."))
    for name, sentences in kinds.items():
        voices = make_pocket.HELD_OUT_VARIANTS
        clips = make_pocket.speak_all(sentences, voices, SEED, WORK, name)
        read = data.transcribe_clips(clips, [s.language for s in sentences], whisper)
        print(f"{name}: CER {sample.rates(sentences, read).cer:.1%}")


def main(argv):
    if argv not in (["window"], ["prior"], ["salad"]):
        raise BadInput(f"give window, prior or salad, not {' '.join(argv) or 'nothing'}")
    if argv == ["salad"]:
        return salad()
    if argv == ["window"]:
        decoders, shares = [tune("window", 1500, 0.0)], (0.0,)
    else:
        decoders, shares = ["pocket", tune("prior", 256, 0.7)], (0.0, 0.3)
    rows = []
    for name in decoders:
        for share in shares:
            out = WORK / f"{Path(name).stem}_{share}"
            whisper = Misled(name)
            whisper.share = share
            flags = ["--whisper", name, "--prior", "none", "--steps", str(STEPS)]
            flags += ["--out_dir", str(out)]
            found = train.main([*flags, "--device", "cpu"], whisper=whisper)
            rows.append((Path(name).stem, share, *teacher_forced(out, name),
                         found["val_cer_4step"], found["cer_real_speech"]))
    print("| decoder | false words so far | cross-entropy of silence | of the flow | CER, 4 steps "
          "| CER of real speech |\n| --- | --- | --- | --- | --- | --- |")
    for name, share, alone, nats, cer, real in rows:
        print(f"| {name} | {share:.0%} | {alone:.2f} | {nats:.3f} | {cer:.2%} | {real:.2%} |")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BadInput as error:
        sys.exit(f"decoders.py: {error}")
