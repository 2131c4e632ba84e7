"""The machine: where and in what precision to compute."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from runtime.batches import Encoded
from runtime.processes import ALONE, Group


@dataclass(frozen=True)
class Machine:
    """Where and in what precision to compute."""

    device: torch.device
    precision: str  # "fp32", or "bf16": matrix products run in bfloat16, tuned weights are float32
    group: Group = ALONE  # of processes; the first one shows progress

    def place(self, model: nn.Module) -> None:
        """Move a model here. What is frozen is cast once, not in each step; to the same bits."""
        model.to(self.device)
        if self.precision == "bf16":
            for module in model.modules():
                frozen = not any(weight.requires_grad for weight in module.parameters())
                if isinstance(module, nn.Linear) and frozen:
                    module.to(torch.bfloat16)
            for weight in model.parameters():
                if not weight.requires_grad:  # else the file, mapped into memory, stays for these
                    weight.data = weight.data.clone()

    def logits(self, model: nn.Module, data: Encoded, texts: np.ndarray) -> torch.Tensor:
        """Classify the given distinct texts of `data`: float [B, C], on the device."""
        batch = {name: tensor.to(self.device) for name, tensor in data.collate(texts).items()}
        bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return model(**batch).logits.float()


def keep_freed_memory() -> None:
    """Have glibc keep blocks that are freed, where it is the C library.

    Each step asks for the same large blocks again. Given back in between, every page of them costs
    a fault: a tenth of the time of a step of full fine-tuning.
    """
    mmap_threshold, trim_threshold = -3, -1  # of mallopt(3)
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(mmap_threshold, 2**30)
    libc.mallopt(trim_threshold, 2**31 - 1)


def pick_machine(precision: str, group: Group = ALONE) -> Machine:
    """CUDA, then MPS, then the CPU; `auto` is bf16 where the processor computes in bfloat16."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" and torch.backends.mps.is_available() and group.size == 1:  # gloo has no MPS
        name = "mps"
    if precision == "auto":
        if name == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has = torch.cpu.get_capabilities()
            fast = name == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16"))
        precision = "bf16" if fast else "fp32"
    return Machine(torch.device(name), precision, group)
