"""The prefixes in memory. There may be many, so only those that were used last stay."""

import ctypes
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import BertConfig

from model.adapter import WEIGHTS
from model.folders import ADAPTER_CONFIG, stamp_of
from model.prefix_bank import TunedPrefix
from model.prefix_tuning import read_prefix
from runtime.files import UserError
from runtime.machine import Machine

READS_TO_TRIM = 200  # prefixes read until the heap is trimmed, which takes 30 ms


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapter folder of one prefix; its weights are read when they are needed."""

    folder: Path
    config: BertConfig
    stamps: list[tuple[int, ...]]  # of its files when the model was loaded

    def read(self, machine: Machine) -> TunedPrefix:
        """Read the weights. Raises: UserError if they are not those that were loaded."""
        self.check()
        tuned = read_prefix(self.folder, self.config, machine.device, machine.dtype)
        self.check()
        return tuned

    def check(self) -> None:
        """Raises: UserError if a file is not the one that was loaded."""
        if stamps_of(self.folder) != self.stamps:
            raise UserError(f"{self.folder} has changed: load it again")


def stamps_of(folder: Path) -> list[tuple[int, ...]]:
    """Return what changes if a file of an adapter folder is replaced or written again."""
    return [stamp_of(folder / name) for name in (WEIGHTS, ADAPTER_CONFIG, "config.json")]


class PrefixCache:
    """The prefixes in memory: those that were used last, up to a number of bytes."""

    def __init__(self, max_bytes: int, machine: Machine) -> None:
        self.max_bytes, self.machine, self.bytes, self.reads = max_bytes, machine, 0, 0
        self.prefixes: OrderedDict[Adapter, TunedPrefix] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, adapter: Adapter) -> TunedPrefix:
        """Return a prefix, from memory if possible. Raises: UserError."""
        with self.lock:
            if adapter in self.prefixes:
                self.prefixes.move_to_end(adapter)
                return self.prefixes[adapter]
        prefix = adapter.read(self.machine)
        with self.lock:
            if adapter in self.prefixes:  # another worker was faster
                return self.prefixes[adapter]
            self.prefixes[adapter] = prefix
            self.bytes, self.reads = self.bytes + prefix.nbytes, self.reads + 1
            trim = self.reads % READS_TO_TRIM == 0
            while self.bytes > self.max_bytes and len(self.prefixes) > 1:
                self.bytes -= self.prefixes.popitem(last=False)[1].nbytes
        if trim:  # return the gaps that prefixes left on the heap to the system
            with suppress(AttributeError):  # it is not glibc
                ctypes.CDLL(None).malloc_trim(0)
        return prefix
