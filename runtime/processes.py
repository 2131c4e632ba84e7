"""Processes that tune one model together: `torchrun --nproc_per_node=N main.py ...`.

Each has all of the model and the data, computes its share of every batch, and adds its gradient
to the others'. One process alone is a group of one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")
# With a process that works on its own, such as the first one while it saves a large model. One that
# has ended is seen at once.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Group:
    """This process's number among all."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    def share(self, items):
        """This process's part of a sequence, which all processes hold in the same order."""
        return items[self.rank :: self.size]

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes: to the same bits everywhere."""
        if self.size > 1:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(together)
            parts = together.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def highest(self, number: int) -> int:
        """Of the numbers that all processes give."""
        return max(self.gather(number)) if self.size > 1 else number

    def gather(self, value: Value) -> list[Value]:
        """What each process gives, in the order of their numbers."""
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Value) -> Value:
        """What the first process gives."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


ALONE = Group()


def is_lost(error: Exception) -> bool:
    """Whether it says that another process of the group does not answer."""
    said = str(error).lower()
    return "WORLD_SIZE" in os.environ and ("gloo" in said or "nccl" in said)


@contextmanager
def joined() -> Iterator[Group]:
    """The group that torchrun describes in the environment, for the time of a run."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
