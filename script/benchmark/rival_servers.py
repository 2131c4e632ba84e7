"""Other ways to serve many classifiers of one backbone, behind the same web framework.

pipelines: COUNT copies of the full model MODEL, a transformers pipeline each; two requests at once,
on one thread each. lora: COUNT LoRA adapters of rank 8 on the backbone of MODEL in PEFT, with
`adapter_names` for each row, behind this project's queue.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import uvicorn
from fastapi import FastAPI
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    pipeline,
)

from runtime.machine import Machine, pick_machine, set_up_process
from serving.app import create_app
from serving.endpoints import ClassifyRequest
from serving.engine import Settings
from serving.models import Model, Registry


def pipelines(folder: str, count: int) -> FastAPI:
    """Return a server with a pipeline for each model."""
    app, machine = FastAPI(), pick_machine("auto")
    threads = torch.get_num_threads() // machine.workers
    pool = ThreadPoolExecutor(machine.workers, "rival", torch.set_num_threads, (threads,))
    dtype = torch.bfloat16 if machine.precision == "bf16" else torch.float32
    pipes = [
        pipeline("text-classification", model=folder, top_k=None, truncation=True, dtype=dtype)
        for _ in range(count)
    ]

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest) -> list:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, pipes[int(body.model)], body.input)

    return app


class LoraBackbone:
    """PEFT's batches of mixed adapters, in place of our mixed prefixes."""

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, machine: Machine) -> None:
        self.model, self.tokenizer, self.machine = model, tokenizer, machine

    def prepare(self, model: Model) -> str:
        """Return the adapter's name."""
        return f"m{model.name}"

    @torch.inference_mode()
    def logits(self, token_ids: list[list[int]], prepared: list[str]) -> list[torch.Tensor]:
        """Score rows: for each, its logits, float32 [1, C]."""
        inputs = self.tokenizer.pad({"input_ids": token_ids}, return_tensors="pt")
        bf16 = self.machine.precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = self.model(**inputs, adapter_names=prepared).logits
        return list(logits.float()[:, None])


def lora(folder: str, count: int) -> FastAPI:
    """Return a server with one PEFT model with many adapters."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    model = get_peft_model(base, config, adapter_name="m0")
    for number in range(1, count):
        model.add_adapter(f"m{number}", config)
    # PEFT hooks the adapters of a batch into the model, so there is one batch at a time
    machine = replace(pick_machine("auto"), workers=1)
    registry = Registry(machine, 1)
    backend = LoraBackbone(model.eval(), tokenizer, machine)
    labels = [base.config.id2label[number] for number in range(base.config.num_labels)]
    for name in map(str, range(count)):
        registry.models[name] = Model(name, labels, False, 128, backend)
    return create_app(registry, Settings())


def serve(kind: str, folder: str, count: int, port: int) -> None:
    """Serve the rival of this kind until the process is killed."""
    set_up_process()
    app = {"pipelines": pipelines, "lora": lora}[kind](folder, count)
    uvicorn.run(app, port=port, log_level="warning", access_log=False)
