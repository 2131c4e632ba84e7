"""Processes that tune one model together: `torchrun --nproc_per_node=N main.py ...`.

Each process has the whole model and all the data, and computes its share of every batch; gradients
are summed over all processes. A single process is a group of one. Also handles stop signals.
"""

import ctypes
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from runtime.files import UserError
from runtime.record import differences

Value = TypeVar("Value")
# How long to wait for a process that is busy alone, such as the main one while it saves a large
# model. A process that has died is noticed at once.
PATIENCE = timedelta(minutes=30)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PRCTL, PR_SET_PDEATHSIG = getattr(ctypes.CDLL(None), "prctl", None), 1  # Linux has it


@dataclass(frozen=True)
class Group:
    """The rank of this process in a group of `size` processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == 0

    def share(self, items):
        """Return this process's share of a sequence that all processes have in the same order."""
        return items[self.rank :: self.size]

    def all_reduce_sum(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, bit-identical in all of them."""
        if self.size > 1:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(together)
            parts = together.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: Value) -> list[Value]:
        """Return the values that the processes pass, in the order of their ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, prepare: Callable[[], Value], compared: Callable[[Value], dict]) -> Value:
        """Return what `prepare` returns, if `compared` makes the same of it in all processes.

        Raises: UserError of the first process that fails or differs; SystemExit in the others.
        """
        value, problem = None, None
        try:
            value = prepare()
        except UserError as error:
            problem = str(error)
        outcomes = self.gather((problem, {} if problem else compared(value)))
        for rank, (problem, record) in enumerate(outcomes):
            if not problem and (fields := differences(outcomes[0][1], record)):
                problem = f"{', '.join(fields)} differ from the first process's: start all "
                problem += "processes with the same flags, files and model"
            if problem and self.is_main:
                raise UserError(f"process {rank}: {problem}" if rank else problem)
            if problem:
                raise SystemExit(2)
        return value

    def from_main(self, value: Value) -> Value:
        """Return the value that the main process passes."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def tensors_from_main(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of the main process; while one is sent, it is in memory many times."""
        names = self.from_main([*tensors])
        return {name: self.from_main(tensors.get(name)) for name in names}


ALONE = Group()


def is_lost(error: Exception) -> bool:
    """Whether the error means that another process of the group no longer answers."""
    said = str(error).lower()
    return "WORLD_SIZE" in os.environ and ("gloo" in said or "nccl" in said)


@contextmanager
def joined() -> Iterator[Group]:
    """Join torchrun's process group for the duration of a run; only its main process logs."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())
    if on_gpus := torch.cuda.is_available():
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= count:
            raise UserError(f"more processes than GPUs: start {count} or fewer (--nproc_per_node)")
        torch.cuda.set_device(number)
    try:
        dist.init_process_group("nccl" if on_gpus else "gloo", timeout=PATIENCE)
    except ValueError as error:  # a variable of torchrun's is missing or wrong
        raise UserError(
            f"{error}: start several processes with torchrun, or unset WORLD_SIZE"
        ) from None
    group = Group(dist.get_rank(), dist.get_world_size())
    if not group.is_main:
        logging.disable(logging.WARNING)
    try:
        yield group
    finally:
        dist.destroy_process_group()


def end_with_parent(parent: int) -> None:
    """Let the kernel send this process SIGTERM when its parent ends, even by SIGKILL. Linux only.

    parent: the process id of the parent, which may have ended already. To the kernel, the parent is
    the thread that started this process, so start it from one that lives as long as it should.
    """
    if PRCTL:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Note the first stop signal, so that a step can finish; a second one kills at once.

    Yields a function that returns the signal's number, or 0. A signal that is ignored, as SIGHUP
    under nohup, stays so.
    """
    received: list[int] = []

    def note(number: int, _) -> None:
        received.append(number)
        for stop in usual:
            signal.signal(stop, signal.SIG_DFL)

    noted = (stop for stop in STOPS if signal.getsignal(stop) != signal.SIG_IGN)
    usual = {stop: signal.signal(stop, note) for stop in noted}
    try:
        yield lambda: max(received, default=0)
    finally:
        for stop, handler in usual.items():
            signal.signal(stop, handler)
