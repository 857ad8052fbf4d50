"""Where a program runs: on which device, in how many processes of torchrun, one for each GPU."""
import math
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from plumbing.errors import BadInput, first_line

try:
    import resource
except ImportError:  # Windows
    resource = None

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose_device(name: str) -> torch.device:
    """auto: cuda, else mps, else cpu; cuda is this process's own GPU under torchrun.

    Matrix products that are not in bf16, so all of sampling and reading, are TF32 on CUDA.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape: 0.3 s a step
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        x = torch.zeros(1, device=name)
        x.item()  # not on "meta"
        return x.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise BadInput(f"device {name!r} cannot be used ({first_line(error)}); try --device cpu"
                       ) from error


def has_bf16(device: torch.device) -> bool:
    """Whether it multiplies matrices faster in bf16: CUDA from Ampere on, and CPUs as measured.

    A step of the official base takes 0.7 of its time on AMD's CPUs with AVX512-BF16, but 1.4 on
    Intel's that have it without AMX.
    """
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    is_amd = cpu.get("avx512_bf16") and "AMD" in cpu.get("cpu_name", "")
    return device.type == "cpu" and bool(cpu.get("amx_bf16") or is_amd)


@contextmanager
def mixed_precision(device: torch.device, width: int):
    """Matrix products in bf16 where that is faster; on a CPU with matrices of 384 or more only."""
    on_cpu = device.type == "cpu"
    fast = has_bf16(device) and (width >= 384 or not on_cpu)
    # On a CPU the backward pass of flash attention takes five times as long in bf16, save in long
    # sequences: FrozenWhisper.encode_mel uses it.
    with (sdpa_kernel(KERNELS[1:] if on_cpu and fast else KERNELS),
          torch.autocast(device.type, torch.bfloat16, enabled=fast)):
        yield


def peak_memory(device: torch.device) -> float:
    """The most memory that was ever taken, in GB: of a CUDA GPU, or of this process; nan: unknown.

    On Linux a process begins with the peak of the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def start_ranks(device: torch.device, batch_size: int) -> tuple[int, int]:
    """Under torchrun all processes begin to work together -> rank of this one, their number."""
    n_ranks = os.environ.get("WORLD_SIZE", "1")
    n_ranks = max(1, int(n_ranks)) if n_ranks.isdecimal() else 1
    if batch_size % n_ranks:
        raise BadInput(f"--batch_size {batch_size} cannot be shared by {n_ranks} processes; give a "
                       "multiple of their number")
    if n_ranks == 1:
        return 0, 1
    if device.type == "mps":
        raise BadInput(f"{n_ranks} processes cannot work together on mps; give --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if os.environ.get("RANK") == "0":
        print(f"note: waiting for {n_ranks} processes", file=sys.stderr)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))  # while the first downloads
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"WORLD_SIZE is {n_ranks}, but {first_line(error)}; start it by torchrun"
                       ) from error
    return dist.get_rank(), n_ranks


def workers(device: torch.device, n_ranks: int) -> dict:
    """For a DataLoader: beside a GPU other processes make the batches ahead."""
    if device.type != "cuda" or not hasattr(os, "fork"):
        return {}
    n = max(1, min(4, (os.cpu_count() or 1) // (2 * n_ranks)))
    return dict(num_workers=n, multiprocessing_context="fork", worker_init_fn=begin_worker)


def begin_worker(_) -> None:
    """Outlive a SIGTERM to all processes: the parent still needs batches. It ends with the parent,
    whose lock of the folder it holds, too."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stop_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_rank_first(rank: int):
    """The first process alone, then all others; those go on if it fails, and fail too."""
    if rank > 0:
        wait_for_all()
    try:
        yield
    finally:
        if rank == 0:
            wait_for_all()


def shard(batch: "data.Batch", rank: int, n_ranks: int) -> "data.Batch":  # noqa: F821
    """Every n_ranks-th item; what does not divide is left out, but each process has one."""
    n = len(batch.sentences)
    part = slice(rank % n, n - n % n_ranks or n, n_ranks)
    fields = batch._asdict()
    cond = {name: x[part] for name, x in fields.pop("cond").items()}
    return batch._replace(cond=cond, **{name: x if x is None else x[part]
                                        for name, x in fields.items()})


def average_gradients(model: torch.nn.Module, stop: bool) -> bool:
    """Gradients become their mean over all processes -> whether one of these is to stop."""
    if not dist.is_initialized():
        return stop
    stops = torch.tensor(float(stop), device=next(model.parameters()).device)
    for x in [*(p.grad for p in model.parameters() if p.grad is not None), stops]:
        dist.all_reduce(x.div_(dist.get_world_size()))
    return bool(stops > 0)


@contextmanager
def catch_interrupts():
    """A list to which Ctrl-C, SIGTERM, a closed terminal add; raised at the end, if nothing was."""
    stops, kinds = [], [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        kinds.append(signal.SIGHUP)
    before = [signal.signal(kind, lambda *_: stops.append(True)) for kind in kinds]
    try:
        yield stops
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
    if stops:  # after the last step
        raise KeyboardInterrupt
