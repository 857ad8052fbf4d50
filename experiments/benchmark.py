"""Steps per second and memory, with random weights in the official shapes: no download.

    python experiments/benchmark.py memory                    # computed, of all shapes
    python experiments/benchmark.py train tiny base           # on a GPU also with bf16 and compiled
    python experiments/benchmark.py cross_entropy             # all logits at once, and in chunks
    python experiments/benchmark.py text                  # sentences per second from file to batch

Every figure is of this machine; the ratios in a table come from one run.
"""
import argparse
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from whisper.model import AudioEncoder, ModelDimensions, TextDecoder, Whisper

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import data  # noqa: E402
import train  # noqa: E402
from model import DiT, DiTConfig  # noqa: E402
from whisper_decoder import BadInput, FrozenWhisper, choose_device  # noqa: E402

# n_mels, width, heads, encoder layers, decoder layers, n_vocab of the official checkpoints
SHAPES = {
    "tiny": (80, 384, 6, 4, 4, 51865), "base": (80, 512, 8, 6, 6, 51865),
    "small": (80, 768, 12, 12, 12, 51865), "medium": (80, 1024, 16, 24, 24, 51865),
    "large-v2": (80, 1280, 20, 32, 32, 51865), "large-v3": (128, 1280, 20, 32, 32, 51866),
    "turbo": (128, 1280, 20, 32, 4, 51866),
}
GB = 1e9


def dims_of(name: str) -> ModelDimensions:
    n_mels, width, heads, n_encoder, n_decoder, n_vocab = SHAPES[name]
    return ModelDimensions(n_mels, 1500, width, heads, n_encoder, n_vocab, 448, width, heads,
                           n_decoder)


def held(frozen: int, trained: int) -> float:
    """GB of the frozen Whisper, and of weights, gradient, AdamW's two and average of the DiT."""
    return 4 * (frozen + 5 * trained) / GB


def compute_memory() -> None:
    """What lies in memory before the first sentence, in single precision."""
    print("| shape | depth = heads | width | DiT | Whisper | GB held |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for name in SHAPES:
        dims = dims_of(name)
        depth = dims.n_audio_state // 32
        with torch.device("meta"):
            model = DiT(DiTConfig(dims.n_audio_state, dims.n_text_state, depth))
            encoder = AudioEncoder(dims.n_mels, 1500, dims.n_audio_state, 1, dims.n_audio_layer)
            decoder = TextDecoder(dims.n_vocab, 448, dims.n_text_state, 1, dims.n_text_layer)
        trained, *frozen = (sum(p.numel() for p in x.parameters())
                            for x in (model, encoder, decoder))
        frozen = sum(frozen) + dims.n_vocab * dims.n_text_state  # and FrozenWhisper.rows
        print(f"| {name} | {depth} | {32 * depth} | {trained / 1e6:.0f} M | {frozen / 1e6:.0f} M | "
              f"{held(frozen, trained):.1f} |")


def random_checkpoint(name: str, path: Path) -> None:
    """Random weights in an official shape and OpenAI's file format."""
    dims = dims_of(name)
    torch.manual_seed(0)
    model = Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)
    torch.save(dict(dims=asdict(dims), model_state_dict=model.state_dict()), path)


def peak_memory(device: torch.device) -> float:
    """The most memory that was ever taken, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def measure_training(name: str, bf16: bool, compiled: bool, args) -> None:
    """One line of the table, in a process of its own: peak memory never falls."""
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whisper.pt"
        random_checkpoint(name, path)
        whisper = FrozenWhisper(str(path), device)
        config = train.Config(out_dir=folder, batch_size=args.batch_size)
        run = train.Run(config, whisper)
    frozen = sum(p.numel() for p in whisper.model.parameters()) + whisper.rows.numel()
    corpus = data.text_corpus(data.split(data.builtin())[0])
    model = torch.compile(run.model, dynamic=True) if compiled else run.model
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            start = clock(device)
        batch, draws = train.to_device(*train.draw(step, corpus, None, whisper, config), whisper)
        with autocast:
            parts = train.losses(model, whisper, batch, draws)
        sum(part.mean() for part in parts).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    rate = args.steps / (clock(device) - start)
    print(f"| {name} | {run.model.config.depth} | {run.parameters / 1e6:.0f} M | "
          f"{'bf16' if bf16 else 'fp32'}{', compiled' if compiled else ''} | "
          f"{held(frozen, run.parameters):.1f} | "
          f"{peak_memory(device):.1f} | {rate:.2f} |", flush=True)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_cross_entropy(form: str, args) -> None:
    """Loss and gradient of the features' side, 24 sentences of 30 tokens, 51,865 classes."""
    device, rng = choose_device(args.device), torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whisper.pt"
        random_checkpoint("tiny", path)
        whisper = FrozenWhisper(str(path), device)
    tokens = torch.randint(50_000, (24 * args.scale, 35), generator=rng)
    tokens[:, : whisper.n_prompt] = torch.tensor(whisper.prompt("en"))
    tokens = tokens.to(device)
    features = torch.randn(1, 1500, 384, generator=rng).to(device).expand(len(tokens), -1, -1)
    shift = torch.zeros(384, device=device, requires_grad=True)
    before, times = peak_memory(device), []
    for _ in range(4):
        start = clock(device)
        if form == "plain":
            logits = whisper.model.decoder(tokens[:, :-1], features + shift)
            loss = F.cross_entropy(logits[:, whisper.n_prompt - 1 :].flatten(0, 1),
                                   tokens[:, whisper.n_prompt :].flatten())
        else:
            loss = whisper.cross_entropy(features + shift, tokens).mean()
        shift.grad = None
        loss.backward()
        times.append(clock(device) - start)
    print(f"| {form} | {loss.item():.6f} | {shift.grad.norm().item():.6f} | {min(times):.2f} | "
          f"{peak_memory(device) - before:.2f} |", flush=True)


def measure_text(args) -> None:
    """From a file of a gigabyte or more to batches: sentences per second, memory."""
    whisper, sentences = FrozenWhisper("pocket"), data.builtin()
    block = "".join(f"{s.language}\t{s.text}\n" for s in sentences).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.tsv"
        with open(path, "wb") as file:
            while file.tell() < args.gigabytes * GB:
                file.write(block)
        before, start = peak_memory(torch.device("cpu")), time.perf_counter()
        found = data.load([str(path)], whisper)
        loading = time.perf_counter() - start
        grown = peak_memory(torch.device("cpu")) - before
    corpus, config = data.text_corpus(list(found.weights), found.weights), train.Config()
    start = time.perf_counter()
    for step in range(args.steps):
        train.draw(step, corpus, None, whisper, config)
    drawing = time.perf_counter() - start
    print(f"file of {args.gigabytes} GB: a shard of {data.SHARD:,} lines in {loading:.1f} s, "
          f"{data.SHARD / loading:,.0f} lines per second; memory grew by {grown:.2f} GB")
    print(f"batches: {args.steps * config.batch_size / drawing:,.0f} sentences per second")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=["memory", "train", "cross_entropy", "text"])
    parser.add_argument("names", nargs="*", default=["tiny", "base"], help=f"of {list(SHAPES)}")
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20, help="that are measured")
    parser.add_argument("--warmup", type=int, default=5, help="steps before")
    parser.add_argument("--scale", type=int, default=1, help="cross_entropy: times 24 sentences")
    parser.add_argument("--gigabytes", type=float, default=5, help="text: size of the file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what this process measures
    args = parser.parse_args(argv)
    if args.what == "train" and set(args.names) - set(SHAPES):
        raise BadInput(f"{' '.join(args.names)}: choose some of {', '.join(SHAPES)}")
    if args.one and args.what == "train":
        name, bf16, compiled = args.one.split(",")
        return measure_training(name, bf16 == "True", compiled == "True", args)
    if args.one:
        return measure_cross_entropy(args.one, args)
    if args.what in ("memory", "text"):
        return compute_memory() if args.what == "memory" else measure_text(args)
    device = choose_device(args.device)
    if args.what == "train":
        print("| shape | depth | DiT | arithmetic | GB held, computed | GB at most | steps/s |\n"
              "| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        forms = [(False, False)] + [(True, False), (True, True)] * (device.type == "cuda")
        runs = [f"{name},{bf16},{compiled}" for name in args.names for bf16, compiled in forms]
    else:
        print("| cross-entropy | value | norm of the gradient | seconds | GB more at most |\n"
              "| --- | --- | --- | --- | --- |", flush=True)
        runs = ["plain", "chunks"]
    for one in runs:
        command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--one", one]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"benchmark.py: {error}")
