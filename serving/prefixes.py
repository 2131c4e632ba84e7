"""The prefixes in memory. There may be many, so only those that were used last stay."""

import contextlib
import ctypes
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from transformers import BertConfig

from model.adapter import WEIGHTS
from model.folders import ADAPTER_CONFIG, stamp_of
from model.prefix_bank import TunedPrefix
from model.prefix_tuning import read_prefix
from runtime.machine import Machine

READS_TO_TRIM = 200  # prefixes read until the heap is trimmed, which takes 30 ms


class Changed(Exception):
    """A folder is not what it was when the model was loaded, so it cannot be read again."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapter folder of one prefix; its weights are read when they are needed."""

    folder: Path
    config: BertConfig
    stamps: list[tuple[int, ...]]  # of its files when the model was loaded

    def read(self, machine: Machine) -> TunedPrefix:
        """Read the weights. Raises: Changed or UserError if they are not those that were loaded."""
        if stamps_of(self.folder) != self.stamps:
            raise Changed
        tuned = read_prefix(self.folder, self.config, machine.device, machine.dtype)
        if stamps_of(self.folder) != self.stamps:
            raise Changed
        return tuned


def stamps_of(folder: Path) -> list[tuple[int, ...]]:
    """Return what changes if a file of an adapter folder is replaced or written again."""
    return [stamp_of(folder / name) for name in (WEIGHTS, ADAPTER_CONFIG, "config.json")]


def trim_heap() -> None:
    """Return the gaps that prefixes left on the heap to the system, if the C library can."""
    with contextlib.suppress(AttributeError):  # it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


class PrefixCache:
    """The prefixes in memory: those that were used last, up to a number of bytes."""

    def __init__(self, max_bytes: int, machine: Machine) -> None:
        self.max_bytes, self.machine, self.bytes, self.reads = max_bytes, machine, 0, 0
        self.found: OrderedDict[Adapter, TunedPrefix] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, one: Adapter) -> TunedPrefix:
        """Return a prefix, from memory if possible. Raises: Changed or UserError."""
        with self.lock:
            if one in self.found:
                self.found.move_to_end(one)
                return self.found[one]
        tuned = one.read(self.machine)
        self.put(one, tuned)
        return tuned

    def put(self, one: Adapter, tuned: TunedPrefix) -> None:
        """Keep a prefix; those that were not used for longest leave."""
        trim = False
        with self.lock:
            if one not in self.found:
                self.found[one] = tuned
                self.bytes, self.reads = self.bytes + tuned.nbytes, self.reads + 1
                trim = self.reads % READS_TO_TRIM == 0
            while self.bytes > self.max_bytes and len(self.found) > 1:
                self.bytes -= self.found.popitem(last=False)[1].nbytes
        if trim:
            trim_heap()

    def retire(self, adapters: list[Adapter]) -> None:
        """Let the prefixes of a model that is no longer served leave first.

        Its last requests may still need them, and the folder may have changed.
        """
        with self.lock:
            for one in adapters:
                if one in self.found:
                    self.found.move_to_end(one, last=False)
