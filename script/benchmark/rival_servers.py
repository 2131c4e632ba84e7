"""Other ways to serve many classifiers of one backbone, behind the same web framework.

    python -m script.benchmark.rival_servers pipelines|lora MODEL COUNT PORT

pipelines: COUNT copies of the full model MODEL, a transformers pipeline each; two requests at once,
on one thread each. lora: COUNT LoRA adapters of rank 8 on the backbone of MODEL in PEFT, with
`adapter_names` for each row, behind this project's queue.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from runtime.machine import Machine, pick_machine, set_up_process
from serving.app import create_app
from serving.endpoints import ClassifyRequest
from serving.engine import Settings
from serving.models import Model, Registry


def pipelines(folder: str, count: int) -> FastAPI:
    """One pipeline for each model."""
    app, streams = FastAPI(), pick_machine("auto").streams
    threads = torch.get_num_threads() // streams
    pool = ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(threads,))
    dtype = torch.bfloat16 if pick_machine("auto").precision == "bf16" else torch.float32
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

    def __init__(self, model, pad: int, machine: Machine) -> None:
        self.model, self.pad, self.machine = model, pad, machine

    def prepare(self, model: Model) -> str:
        """Return the adapter's name."""
        return model.name

    @torch.inference_mode()
    def logits(self, token_ids: list[list[int]], prepared: list[str]) -> list[torch.Tensor]:
        """Score rows: for each, its logits, float32 [1, C]."""
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(one) for one in token_ids], batch_first=True, padding_value=self.pad
        )
        lengths = torch.tensor([len(one) for one in token_ids])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        names, bf16 = [f"m{name}" for name in prepared], self.machine.precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            found = self.model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        return list(found.float()[:, None])


def lora(folder: str, count: int) -> FastAPI:
    """One PEFT model with many adapters."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    model = get_peft_model(base, config, adapter_name="m0")
    for number in range(1, count):
        model.add_adapter(f"m{number}", config)
    # PEFT hooks the adapters of a batch into the model, so there is one batch at a time
    machine = replace(pick_machine("auto"), streams=1)
    registry = Registry(machine, 1)
    backend = LoraBackbone(model.eval(), tokenizer.pad_token_id, machine)
    labels = [base.config.id2label[number] for number in range(base.config.num_labels)]
    for name in map(str, range(count)):
        registry.models[name] = Model(
            name, Path(folder), labels, False, 128, "LoRA", tokenizer, backend
        )
    return create_app(registry, Settings())


if __name__ == "__main__":
    kind, folder, count, port = sys.argv[1:]
    set_up_process()
    app = {"pipelines": pipelines, "lora": lora}[kind](folder, int(count))
    uvicorn.run(app, port=int(port), log_level="warning", access_log=False)
