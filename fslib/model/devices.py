"""Where a model runs: processes, threads, devices, their random states, and memory that is freed between steps."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from filelock import BaseFileLock, Timeout
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from fslib.data.batches import Batch
from fslib.errors import FslibError, first_line

T = TypeVar("T")
# what splits weights among processes -> how accelerate is told to use it
SPLITTING = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}


def processes() -> PartialState:
    """Return what this process knows of those that work with it on the same thing, and of its own device.

    Raises FslibError where they cannot be reached, and for what splits weights among processes.
    """
    for name, asked in SPLITTING.items():
        if parse_flag_from_env(asked):
            raise FslibError(
                f"{name} splits weights among processes, and IAT trains single rows of whole ones: use plain data "
                "parallelism (accelerate launch --multi_gpu, torchrun), which gives every process the whole model"
            )
    # where there is no GPU, several processes would else take themselves for one each
    several = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    try:
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or several)
    except (ValueError, RuntimeError, ImportError) as error:
        PartialState._reset_state()  # it would be taken for whole the next time
        raise FslibError(f"the processes that this one belongs to are not found: {first_line(error)}") from error


def is_first() -> bool:
    """Return whether this is the process, of those that work on the same thing, that writes and speaks."""
    return bool(processes().is_main_process)


def from_first(value: T) -> T:
    """Return what the first process gives, in every process."""
    if processes().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def wait_for_all() -> None:
    """Wait until all processes are here."""
    processes().wait_for_everyone()


def leave() -> None:
    """Part from the processes that this one has worked with: its threads that wait for them could abort its end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@cache
def is_first_to_fail() -> bool:
    """Return whether this process asks before others: those fail for the same reason, or since this one did."""
    try:
        if processes().num_processes == 1:
            return True
        return int(_get_default_store().add("fslib/failed", 1)) == 1
    except (RuntimeError, FslibError):  # whoever kept count is gone, or was never there
        return True


@contextmanager
def held_by_first(lock: BaseFileLock) -> Iterator[None]:
    """Hold a lock, in the first process, while any of them is inside the block.

    However long that takes, no process waits for another for more than a minute: it would be given up for lost.
    """
    if processes().num_processes == 1:
        with lock:
            yield
        return
    while not from_first(is_first() and _acquired(lock)):
        pass
    try:
        yield
        wait_for_all()
    finally:
        if is_first():
            lock.release()


def _acquired(lock: BaseFileLock) -> bool:
    try:
        lock.acquire(timeout=60)
    except Timeout:
        return False
    return True


def accelerator(mixed_precision: str | None) -> Accelerator:
    """Return the `Accelerator` that a training runs through: CPU, one GPU or several processes.

    mixed_precision: "bf16" or "fp16", None for what `accelerate` is configured to.
    Raises FslibError for an unknown precision, another one than the process began with, gradient accumulation, and as
    `processes` does.
    """
    processes()  # refuses what splits weights
    # a step leaves the other tasks' classifiers without a gradient
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    # left out, it would be what an earlier training in this process had
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    try:
        made = Accelerator(mixed_precision=precision, kwargs_handlers=handlers)
    except ValueError as error:  # no such precision, or not the one that this process began with
        raise FslibError(f"mixed_precision {precision!r}: {error}") from error
    if made.gradient_accumulation_steps != 1:
        raise FslibError(
            f"gradient accumulation over {made.gradient_accumulation_steps} steps would mix the gradients of "
            "several tasks in one update: set accelerate's to 1, and batch_size as large as memory allows"
        )
    return made


def gather_rows(rows: np.ndarray, batches: list[Batch]) -> np.ndarray:
    """Return (n, ...) with every process's rows in place; `rows` holds this process's, at its batches' indices."""
    if processes().num_processes > 1:
        mine = np.concatenate([batch.indices for batch in batches]) if batches else np.empty(0, dtype=np.int64)
        for indices, values in gather_object([(mine, rows[mine])]):
            rows[indices] = values
    return rows


def partial_mark() -> str:
    """Return the end of the names that this process writes under, until it renames them; `study.files` sweeps them."""
    return f".partial-{platform.node()}-{os.getpid()}"


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Compute with so many threads inside the block, torch as well as numpy's and scipy's linear algebra.

    Their number decides in which order a sum is taken, and so its last bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def cuda_devices() -> list[int]:
    """List the GPUs whose random states belong to a training."""
    return list(range(torch.cuda.device_count()))


def random_state() -> list[Tensor]:
    """Return the state of torch's generators: the CPU's, then each GPU's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda_devices())]


def set_random_state(states: list[Tensor]) -> None:
    """Put torch's generators where `random_state` found them."""
    torch.set_rng_state(states[0])
    for device, state in zip(cuda_devices(), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def keep_freed_memory() -> bool:
    """Let the C library keep memory that a training step frees, for the next step; True if it will.

    glibc hands blocks of more than 32 MB back to the system at once, and the gradient of the word embeddings is such a
    block: every step would wait for the same pages to be mapped and cleared again.
    """
    mmap_max, trim_threshold = -4, -1  # from malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
