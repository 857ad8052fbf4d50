"""Time of a step, part by part, and memory, with random weights in the official shapes.

    python experiments/benchmark.py memory                    # computed, of all shapes
    python experiments/benchmark.py train tiny base           # also in bf16 where that is faster
    python experiments/benchmark.py train base --data prompts.tsv --depth 8 --batch_size 4 8 16 \
        --words 1-4 5-10 20-40 --languages 1 8 40             # a row for each combination

Every figure is of this machine; the ratios in a table come from one run.
"""
import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Callable

import torch
from whisper.model import AudioEncoder, ModelDimensions, TextDecoder, Whisper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from model import DiT, DiTConfig  # noqa: E402
from plumbing.devices import choose_device, has_bf16, mixed_precision, peak_memory  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.flags import Parser, positive  # noqa: E402
from text.durations import FRAMES_PER_SECOND  # noqa: E402
from text.long import MixedBatches  # noqa: E402
from text.sources import load_data  # noqa: E402
from text.spelling import words  # noqa: E402

# n_mels, width, heads, encoder layers, decoder layers, n_vocab of the official checkpoints
SHAPES = {
    "tiny": (80, 384, 6, 4, 4, 51865), "base": (80, 512, 8, 6, 6, 51865),
    "small": (80, 768, 12, 12, 12, 51865), "medium": (80, 1024, 16, 24, 24, 51865),
    "large-v2": (80, 1280, 20, 32, 32, 51865), "large-v3": (128, 1280, 20, 32, 32, 51866),
    "turbo": (128, 1280, 20, 32, 4, 51866),
}
GB = 1e9
ALL = "all"  # of --words: the batches of train.py
PARTS = ("batch", "flow", "critic", "backward", "optimizer")  # of a step, in ms


def dims_of(name: str) -> ModelDimensions:
    n_mels, width, heads, n_encoder, n_decoder, n_vocab = SHAPES[name]
    return ModelDimensions(n_mels, 1500, width, heads, n_encoder, n_vocab, 448, width, heads,
                           n_decoder)


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def held(frozen: int, trained: int) -> float:
    """GB of the frozen Whisper, and of weights, gradient, AdamW's two and average of the DiT."""
    return 4 * (frozen + 5 * trained) / GB


def compute_memory(names: list[str], depth: int, latent: str) -> None:
    """Of weights, gradient and optimizer, without activations, in single precision."""
    print("| shape | depth = heads | width | DiT | Whisper | GB held |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for name in names:
        dims = dims_of(name)
        config = DiTConfig(dims.n_mels if latent == "mel" else dims.n_audio_state,
                           dims.n_text_state, depth or dims.n_audio_state // 32)
        with torch.device("meta"):
            trained = n_parameters(DiT(config))
            encoder = AudioEncoder(dims.n_mels, 1500, dims.n_audio_state, 1, dims.n_audio_layer)
            decoder = TextDecoder(dims.n_vocab, 448, dims.n_text_state, 1, dims.n_text_layer)
        frozen = n_parameters(encoder) + n_parameters(decoder)
        print(f"| {name} | {config.depth} | {config.width} | {trained / 1e6:.0f} M | "
              f"{frozen / 1e6:.0f} M | {held(frozen, trained):.1f} |")


def clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def timed(function: Callable, times: Counter, part: str, device: torch.device) -> Callable:
    """The function, which adds what it takes to times[part]."""
    def wrapper(*args):
        start = clock(device)
        result = function(*args)
        times[part] += clock(device) - start
        return result
    return wrapper


def choose(sentences: list, span: str, n_languages: int) -> list:
    """Sentences of so many words, as in "1-4", or all, of the first languages by code, 0: all."""
    codes = sorted({s.language for s in sentences})
    shortest, _, longest = span.replace(ALL, "1-1000").partition("-")
    if not (shortest.isdecimal() and longest.isdecimal()):
        raise BadInput(f"--words {span} is no range; give for example 5-10")
    chosen = [s for s in sentences if s.language in codes[: n_languages or None]
              and int(shortest) <= len(words(*s[::-1])) <= int(longest)]
    if not chosen:
        raise BadInput(f"no sentence of {span} words in {n_languages} languages; give more --data")
    return chosen


def random_run(name: str, args, device: torch.device) -> train.Run:
    """A run that begins, with a Whisper of random weights, by way of a file in OpenAI's format."""
    torch.manual_seed(0)
    model = Whisper(dims_of(name))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whisper.pt"
        torch.save(dict(dims=asdict(model.dims), model_state_dict=model.state_dict()), path)
        config = train.Config(out_dir=folder, latent=args.latent, depth=args.depth)
        return train.Run(config, train.LATENTS[args.latent](str(path), device))


def measure_training(name: str, bf16: bool, args) -> None:
    """One line of the table, in a process of its own: peak memory never falls."""
    device = choose_device(args.device)
    run = random_run(name, args, device)
    config, whisper, trained = run.config, run.whisper, n_parameters(run.model)
    n, span, n_languages = args.batch_size[0], args.words[0], args.languages[0]
    shares = load_data(args.data, whisper, temperature=config.temperature)[0]
    sentences = choose(data.split(list(shares))[0], span, n_languages)
    kind = MixedBatches if span == ALL else data.Batches  # with long and short texts, or neither
    batches = kind({s: shares[s] for s in sentences}, whisper, n, 0, 1.0, whisper.speed_range)
    times, frames = Counter(), []

    def draw(step: int) -> tuple:
        batch, rng = batches[step].to(whisper), data.generator(0, step, device)
        return batch, rng, train.draw_noise(batch, whisper.channels, config.drop_text, rng)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
        run.optimizer.step()
        train.update_ema(run.ema, run.model, 1000, config.ema)

    draw = timed(draw, times, "batch", device)
    run.model.forward = timed(run.model.forward, times, "flow", device)
    whisper.text_loss = timed(whisper.text_loss, times, "critic", device)
    backward = timed(torch.Tensor.backward, times, "backward", device)
    update = timed(update, times, "optimizer", device)
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            times.clear()
            frames.clear()
        batch, rng, noise = draw(step)
        frames.append(batch.mask.sum().item() / len(batch.mask))
        room = whisper.room_of_step(config.steps, config.steps, rng)
        with mixed_precision(device, whisper.dims.n_text_state) if bf16 else nullcontext():
            loss, *_ = train.objective(run.model, whisper, batch, *noise, room, config.flow_weight)
        backward(loss)
        update()
        run.optimizer.zero_grad()
    seconds = sum(frames) / args.steps / FRAMES_PER_SECOND
    form = "bf16" if bf16 else "tf32" if device.type == "cuda" else "fp32"
    parts = " | ".join(f"{1000 * times[part] / args.steps:.0f}" for part in PARTS)
    print(f"| {name} | {run.model.config.depth} | {trained / 1e6:.0f} M | {form} | {n} | {span} | "
          f"{seconds:.1f} | {n_languages} | {held(n_parameters(whisper.model), trained):.1f} | "
          f"{peak_memory(device):.1f} | {1000 * times.total() / args.steps:.0f} | {parts} |",
          flush=True)


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("what", choices=["memory", "train"])
    parser.add_argument("names", nargs="*", help=f"of {list(SHAPES)} (default: tiny base; memory: "
                        "all)")
    parser.add_argument("--latent", choices=list(train.LATENTS), default="features")
    parser.add_argument("--depth", type=int, default=0, help="of the DiT; 0: as wide as Whisper")
    parser.add_argument("--data", nargs="+", default=["builtin"])
    parser.add_argument("--batch_size", nargs="+", type=positive, default=[24])
    parser.add_argument("--words", nargs="+", default=[ALL], help="of a sentence, in "
                        "batches of single ones; all: batches as train.py has them")
    parser.add_argument("--languages", nargs="+", type=int, default=[0], help="how many; 0: all")
    parser.add_argument("--steps", type=positive, default=20, help="that are measured")
    parser.add_argument("--warmup", type=int, default=5, help="steps before")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what this process measures
    args = parser.parse_args(argv)
    args.names = args.names or (list(SHAPES) if args.what == "memory" else ["tiny", "base"])
    if unknown := set(args.names) - set(SHAPES):
        raise BadInput(f"{' '.join(unknown)}: choose some of {', '.join(SHAPES)}")
    if min(args.depth, args.warmup, *args.languages) < 0:
        raise BadInput(f"--depth {args.depth}, --warmup {args.warmup} or --languages "
                       f"{args.languages} cannot be used; at least 0")
    if args.what == "memory":
        return compute_memory(args.names, args.depth, args.latent)
    if args.one:
        return measure_training(args.names[0], args.one == "bf16", args)
    print("| shape | depth | DiT | arithmetic | batch size | words | seconds of a sentence | "
          "languages | GB held, computed | GB at most | ms, all parts | "
          f"{' | '.join(PARTS)} |\n{'| --- ' * (11 + len(PARTS))}|", flush=True)
    forms = ["single"] + ["bf16"] * has_bf16(choose_device(args.device))
    same = ("latent", "depth", "steps", "warmup", "device")
    for name, one, *row in itertools.product(args.names, forms, args.batch_size, args.words,
                                             args.languages):
        command = [sys.executable, __file__, "train", name, "--one", one, "--data", *args.data]
        varied = zip(("batch_size", "words", "languages"), row)
        for flag, value in (*((flag, getattr(args, flag)) for flag in same), *varied):
            command += [f"--{flag}", str(value)]
        if subprocess.run(command).returncode:  # it said why
            raise BadInput(f"{name}: this row cannot be measured")


if __name__ == "__main__":
    guard(main)
