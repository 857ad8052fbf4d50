"""Where a program runs: on which device, in how many processes of torchrun, one for each GPU."""
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing.files import BadInput, first_line


def choose_device(name: str) -> torch.device:
    """auto: cuda, else mps, else cpu; cuda is the one of this process of torchrun.

    Matrix products that are not in bf16, so all of sampling and reading, are TF32 on CUDA.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape: 0.3 s a step
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r} cannot be used ({first_line(error)}); try --device cpu"
                       ) from error


def start_ranks(device: torch.device) -> None:
    """Under torchrun this process and the others begin to work together."""
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(timeout=timedelta(days=1))  # while the first downloads


def stop_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """Rank of this process, number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def first_rank_first():
    """The first process alone; then all others."""
    rank, n_ranks = world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and n_ranks > 1:
        dist.barrier()


def average_gradients(model: torch.nn.Module) -> None:
    """Gradients become their mean over all processes."""
    for p in model.parameters() if world()[1] > 1 else ():
        dist.all_reduce(p.grad.div_(world()[1]))
