"""Contenders of the benchmark that predict: ours and its rivals. See `contenders`."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from script.benchmark.contenders import (
    MIXED,
    MOST_TOKENS,
    SCORING_BATCH,
    SINGLE_TEXTS,
    Contender,
    Measure,
    best,
    timed,
)


def our_scoring(
    texts: list[str], folders: list[str], engine: str = "auto", int8: bool = False
) -> Measure:
    """Time `main.py --do_predict` on texts in memory: tokenizing and computing the logits.

    If there are several folders, the rows use them in turn.
    """
    import numpy as np

    from model.classifier import Classifier
    from model.source import open_model
    from runtime.batches import rows_of
    from runtime.machine import pick_machine, set_up_process
    from runtime.processes import ALONE

    set_up_process()
    mixed = len(folders) > 1
    source = open_model(folders if mixed else folders[0], by_row=mixed)
    classifier = Classifier(source, pick_machine("auto", ALONE, engine, int8))
    index = np.arange(len(texts)) % len(folders) if mixed else None
    return timed(lambda: classifier.logits(rows_of(texts), index), len(texts))


def ours_alone(texts: list[str], folders: list[str]) -> Measure:
    """Time `model.load` on one text after the other, on one thread."""
    import torch

    from model import load

    torch.set_num_threads(1)
    classifier, texts = load(folders[0]), texts[:SINGLE_TEXTS]
    return timed(lambda: [classifier(text) for text in texts], len(texts))


def hf_pipeline(
    texts: list[str], folders: list[str], compiled: bool = False, alone: bool = False
) -> Measure:
    """Time `pipeline("text-classification")` at its fastest; alone: see `ours_alone`."""
    import torch
    import transformers

    on_gpu, precision, attention = best()
    pipe = transformers.pipeline(
        "text-classification",
        model=folders[0],
        device="cuda" if on_gpu else "cpu",
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        model_kwargs={"attn_implementation": attention},
    )
    if alone:
        torch.set_num_threads(1)
        texts = texts[:SINGLE_TEXTS]
        return timed(lambda: [pipe(text) for text in texts], len(texts))
    if compiled:
        pipe.model.forward = torch.compile(pipe.model.forward, dynamic=True)
    return timed(lambda: pipe(texts, batch_size=SCORING_BATCH), len(texts))


def timed_batches(
    texts: list[str], folder: str, run: Callable[[Iterator[dict]], Iterable]
) -> Measure:
    """Time another engine: tokenizing, and `run`, which turns batches into arrays of logits.

    The batches have texts of similar length.
    """
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(MOST_TOKENS)

    def batches() -> Iterator[dict]:
        rows = sorted(tokenizer.encode_batch(texts), key=len)
        for first in range(0, len(rows), SCORING_BATCH):
            batch = rows[first : first + SCORING_BATCH]
            for row in batch:
                row.pad(len(batch[-1]))
            ids, mask = ([row.ids for row in batch], [row.attention_mask for row in batch])
            yield {"input_ids": np.array(ids), "attention_mask": np.array(mask)}

    def work() -> None:
        assert sum(map(len, run(batches()))) == len(texts)

    return timed(work, len(texts))


def openvino_scoring(texts: list[str], folders: list[str]) -> Measure:
    """Time OpenVINO in its throughput mode, with several batches in flight."""
    import openvino

    hint = {"fp32": "f32"}.get(best()[1], "bf16")
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": hint}
    if folders[0].endswith("int8 weights"):
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "32"
    model = openvino.Core().compile_model(f"{folders[0]}/model.xml", "CPU", settings)

    def run(batches: Iterator[dict]) -> Iterable:
        queue, logits = openvino.AsyncInferQueue(model), {}

        def keep(request, number: int) -> None:
            logits[number] = request.get_output_tensor(0).data.copy()

        queue.set_callback(keep)
        for number, batch in enumerate(batches):
            queue.start_async(batch, number)
        queue.wait_all()
        return logits.values()

    return timed_batches(texts, folders[0], run)


def onnxruntime_scoring(texts: list[str], folders: list[str]) -> Measure:
    """Time onnxruntime with two batches in flight, on one thread each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = f"{folders[0]}/model.onnx"
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    threads = ThreadPoolExecutor(2)

    def run(batches: Iterator[dict]) -> Iterable:
        return (logits for (logits,) in threads.map(partial(session.run, None), batches))

    return timed_batches(texts, folders[0], run)


SCORING = {
    "HF pipeline": Contender(hf_pipeline),
    "HF pipeline, compiled": Contender(partial(hf_pipeline, compiled=True)),
    "OpenVINO": Contender(openvino_scoring, ["openvino"]),
    "OpenVINO, int8": Contender(openvino_scoring, ["int8"]),
    "OpenVINO, int8 weights": Contender(openvino_scoring, ["int8 weights"]),
    "onnxruntime, int8": Contender(onnxruntime_scoring, ["ort-int8"]),
}
ours_int8 = partial(our_scoring, engine="openvino", int8=True)
SCORING |= {
    "ours, full": Contender(our_scoring, rivals=list(SCORING)),
    "ours, full, torch": Contender(partial(our_scoring, engine="torch"), rivals=["HF pipeline"]),
    "ours, full, int8": Contender(ours_int8, rivals=list(SCORING)),
    "ours, prefix 128": Contender(our_scoring, ["0"], ["HF pipeline"]),
    "ours, 16 prefixes mixed": Contender(our_scoring, MIXED, ["HF pipeline", "ours, prefix 128"]),
}
SINGLE = {
    "HF pipeline": Contender(partial(hf_pipeline, alone=True)),
    "ours": Contender(ours_alone, rivals=["HF pipeline"]),
}
