"""The device and the precision to compute with."""

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from runtime.batches import Encoded
from runtime.files import UserError, name_list
from runtime.processes import ALONE, Group

Item, Result = TypeVar("Item"), TypeVar("Result")

CGROUP = Path("/sys/fs/cgroup")
MOST_WORKERS = 8  # Python's lock would keep more waiting
ENGINES = ("auto", "torch", "openvino")
SMALL = 2**19  # bytes of texts: a graph for OpenVINO takes a second or two to make
FEWER = 1.3  # fewer threads must be this many times as fast
CASTS = 1.3  # bfloat16 products must be this many times as fast, to make up for casts


@dataclass(frozen=True)
class Machine:
    """The device, the precision and the processes of a run."""

    device: torch.device
    precision: str  # "fp32", or "bf16": matrix products in bfloat16, trainable weights in float32
    group: Group = ALONE  # of processes; the main one shows progress
    workers: int = 1  # batches that are scored at once, see `in_workers`
    engine: str = "torch"  # that predicts with tuned models; "openvino" only on a CPU
    int8: bool = False  # whether the engine multiplies in 8 bits

    def __str__(self) -> str:
        several = f", {self.group.size} processes that share each batch" * (self.group.size > 1)
        threads = f", {torch.get_num_threads()} threads" * (self.device.type == "cpu")
        threads += f", scoring with {self.workers} workers" * (self.workers > 1)
        engine = f", engine {self.engine}" * (self.engine != "torch") + ", int8" * self.int8
        return f"device {self.device}{threads}, precision {self.precision}{engine}{several}"

    @property
    def dtype(self) -> torch.dtype:
        """The type of matrix products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def describe(self) -> dict:
        """Return the machine's part of a run's settings."""
        size = self.group.size
        engine = None if self.engine == "torch" else self.engine  # as before there was another
        facts = {"device": str(self.device), "precision": self.precision, "processes": size}
        return facts | {"engine": engine}

    def place(self, model: nn.Module) -> None:
        """Move a model to the device.

        Frozen weights of matrix products are cast once, not at every step, with the same bits.
        """
        model.to(self.device)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for weight in (weight for module in linear for weight in module.parameters()):
            if not weight.requires_grad:
                weight.data = weight.data.to(self.dtype)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device; a GPU takes it from pinned memory while Python goes on."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def logits(self, model: nn.Module, data: Encoded, texts: np.ndarray) -> torch.Tensor:
        """Classify the given distinct texts of `data`: float [B, C], on the device."""
        batch = {name: self.send(tensor) for name, tensor in data.collate(texts).items()}
        bf16 = torch.bfloat16
        with torch.autocast(self.device.type, dtype=bf16, enabled=self.dtype == bf16):
            return model(**batch).logits.float()


def cpu_quota(cgroup: Path = CGROUP) -> float:
    """Return how many cores a container may use, by its control group; infinity without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # v2, v1
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return int(quota) / int(period)
    return math.inf


@cache
def bfloat16_gain() -> float:
    """Measure how many times as fast products in bfloat16 are as in float32, on this processor.

    Its flags do not tell: on some Intel processors without AMX they take twice as long. Other
    processes hardly change the result: the best of several, in turn, of one thread's own time.
    """

    def seconds(dtype: torch.dtype) -> float:
        matrix, began = torch.ones(512, 512, dtype=dtype), time.thread_time()
        matrix @ matrix
        return time.thread_time() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds = [(seconds(torch.float32), seconds(torch.bfloat16)) for _ in range(6)]
    torch.set_num_threads(threads)
    float32, bfloat16 = map(min, zip(*rounds, strict=True))
    return float32 / bfloat16


def product_seconds(threads: int) -> float:
    """Measure the wall time of ten products of matrices by several threads."""
    torch.set_num_threads(threads)
    matrix, began = torch.ones(384, 384), time.perf_counter()
    for _ in range(10):
        (matrix @ matrix).relu_()
    return time.perf_counter() - began


def fastest_threads() -> int:
    """Measure how many threads compute fastest, beside whatever else this machine does.

    After each product the threads wait for the slowest; beside other processes, which take turns
    with it, one thread is often faster than several. Fewer must be much faster: equal runs should
    use equally many, since their number changes how sums are rounded.
    """
    most = torch.get_num_threads()
    counts = sorted({most, max(1, most // 2), 1}, reverse=True)
    rounds = [[product_seconds(count) for count in counts] for _ in range(5)]
    torch.set_num_threads(most)
    medians = dict(zip(counts, np.median(rounds, axis=0), strict=True))
    fastest = min(counts, key=medians.__getitem__)
    return fastest if medians[most] > FEWER * medians[fastest] else most


def set_up_process() -> None:
    """Choose the threads and kernels of this process: for a program, not for a call from another.

    Threads beyond a container's share of the cores would wait for each other.
    """
    if "OMP_NUM_THREADS" not in os.environ and (quota := cpu_quota()) < torch.get_num_threads():
        torch.set_num_threads(max(1, math.floor(quota)))
    if torch.cuda.is_available():  # a resumed run repeats the bytes; float32 products in TF32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to repeat
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a safeguard that takes time
        torch.set_float32_matmul_precision("high")


def pick_machine(
    precision: str, group: Group = ALONE, engine: str = "torch", int8: bool = False
) -> Machine:
    """Pick CUDA, else MPS, else the CPU; "auto" is bf16 if its products are faster there.

    engine: to predict with; "auto" is OpenVINO on a CPU, else torch. int8: needs OpenVINO.
    Raises: UserError for an unknown precision or engine, and for OpenVINO if there is a GPU.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision '{precision}' is unknown: pass auto, fp32 or bf16")
    if engine not in ENGINES:
        raise UserError(f"engine '{engine}' is unknown: pass {name_list(ENGINES)}")
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" and torch.backends.mps.is_available() and group.size == 1:  # gloo has no MPS
        name = "mps"
    workers = min(torch.get_num_threads(), MOST_WORKERS) if name == "cpu" else 1
    if precision == "auto":
        fast = name == "cpu" and bfloat16_gain() > CASTS
        if name == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = group.from_main("bf16" if fast else "fp32")
    installed = importlib.util.find_spec("openvino") is not None
    if int8 and (name != "cpu" or engine == "torch"):
        raise UserError("--int8 needs OpenVINO and a CPU without a GPU: omit it")
    if engine == "openvino" and name != "cpu":
        raise UserError("--engine openvino is for CPUs, and this machine has a GPU: omit it")
    if (engine == "openvino" or int8) and not installed:
        raise UserError("openvino is not installed: run pip install -r requirements.txt")
    if engine == "auto":
        engine = "openvino" if name == "cpu" and installed else "torch"
    return Machine(torch.device(name), precision, group, workers, engine, int8)


def engine_for(choice: str | None, int8: bool, size: int) -> str:
    """Return the engine to predict files of `size` bytes with, unless one is chosen."""
    return choice or ("auto" if int8 or size > SMALL else "torch")


@cache
def pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return `workers` threads, each of which computes with `threads` threads of its own."""
    return ThreadPoolExecutor(workers, "worker", torch.set_num_threads, (threads,))


def in_workers(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield the result for each item, in order; `workers` of them are computed at once.

    A batch on all threads has a barrier after every operation, where each waits for the slowest.
    Beside other processes a thread often waits for a core, and the rest for it. Workers, each on
    threads of its own, need no barriers.
    """
    if workers == 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    try:
        yield from pool(workers, max(1, threads // workers)).map(function, items)
    finally:
        torch.set_num_threads(threads)  # else threads that start later would have a worker's number
