"""Where a model runs: its device, threads, random states, and memory freed between steps."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn


def best_device() -> torch.device:
    """Return the device that a unit of work runs on: an accelerator, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model's weights are on."""
    return next(model.parameters()).device


def partial_mark() -> str:
    """Return the end of the names of files that this process has not yet written whole.

    They are renamed when they are whole; `study.files` sweeps what is left of killed processes.
    """
    return f".partial-{platform.node()}-{os.getpid()}"


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Compute with so many threads inside the block: torch, and numpy's and scipy's algebra.

    Their number decides in which order a sum is taken, and so its last bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def random_state() -> list[Tensor]:
    """Return the state of torch's generators: the CPU's, then each GPU's."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(states: list[Tensor]) -> None:
    """Put torch's generators where `random_state` found them."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])


def keep_freed_memory() -> bool:
    """Let the C library keep memory that a training step frees; True if it will.

    glibc hands blocks of more than 32 MB back to the system at once, and the gradient of the word
    embeddings is such a block: every step would wait for the same pages to be mapped and cleared
    again, which takes 3 to 10 % of a small model's step.
    """
    mmap_max, trim_threshold = -4, -1  # from malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
