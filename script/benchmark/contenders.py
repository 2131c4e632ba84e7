"""Contenders of the benchmark: ours and its rivals, set up, then timed.

A tuning contender takes a data file and a number of steps; a scoring contender takes a data file,
a number of texts and the folder of the models (see `make_folders`). Each returns a function that
runs one measurement and returns the examples per second.

Imports are inside the functions, since a contender's start-up time and memory are measured: it
must load only what it needs.
"""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

BATCH = 32  # rows of a training step, for every contender
SCORING_BATCH = 64  # texts
MOST_TOKENS = 384  # of a text; with a prefix of 128, BERT has no more positions
CALIBRATION_TEXTS = 300  # of int8

Measure = Callable[[], float]  # examples per second


def prepared(data: str, *flags: str):
    """Read data and tokenizer as main.py does before it builds a model.

    Returns arguments, start, data, tokenizer and the encoded training file.
    """
    import dataset
    from arguments import parse_args
    from model.schedule import fill_schedule
    from model.source import new_model
    from runtime.batches import encode
    from runtime.columns import fill_format

    fixed = "--num_train_epochs 1 --hidden_dropout_prob 0 --rdrop_alpha 0".split()
    fixed += ["--max_seq_length", str(MOST_TOKENS)]
    args = parse_args(
        ["--do_train", "--train_file", data, "--output_dir", "unused", *fixed, *flags]
    )
    form = fill_format(vars(args))
    start = new_model(vars(args))
    splits = dataset.read_splits({"train": data}, form)
    start.set_labels(dataset.label_names(splits["train"], args.label_names))
    files = dataset.prepare(form, splits, start.labels)
    fill_schedule(vars(args), files.seen_share, start.config.hidden_size)
    start.set_dropout(args.hidden_dropout_prob, args.attention_probs_dropout_prob)
    tokenizer = start.tokenizer
    rows = encode(tokenizer, files.train, start.config.max_seq_length)
    return args, start, files, tokenizer, rows


def fill(data: str, tokens: int, path: str) -> None:
    """Write a data file of the same rows whose texts fill up to `tokens` tokens with whole words.

    A text goes on with the words of the texts after it, so all are different.
    """
    import pandas as pd

    tokenizer = prepared(data)[3]
    table = pd.read_csv(data, dtype=str, keep_default_na=False)
    texts = table["text"].str.split()
    words = [word for text in texts for word in text]
    costs = [len(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]]

    def filled(first: int) -> str:
        room = tokens - tokenizer.num_special_tokens_to_add()
        for number in itertools.count(first):
            room -= costs[number % len(words)]
            if room < 0:
                return " ".join(words[place % len(words)] for place in range(first, number))

    table["text"] = (texts.str.len().cumsum() - texts.str.len()).map(filled)
    table.to_csv(path, index=False)


def best() -> tuple[bool, str, str]:
    """Return how the rivals are fastest here: whether on a GPU, the precision, the attention."""
    from runtime.machine import pick_machine, set_up_process

    set_up_process()
    machine = pick_machine("auto")
    on_gpu = machine.device.type == "cuda"
    return on_gpu, machine.precision, "sdpa" if on_gpu else "eager"


def note_step(ends: list[float], steps: int) -> None:
    """Note the time after a step; at both ends of the timed steps a GPU is waited for."""
    import torch

    if len(ends) in (0, steps) and torch.cuda.is_available():
        torch.cuda.synchronize()
    ends.append(time.perf_counter())


def ours(data: str, steps: int, flags: Sequence[str] = ()) -> Measure:
    """Time `steps` training steps of `main.py` with these flags."""
    import trainer
    from model.bert import train_words_in_use
    from runtime.machine import pick_machine, set_up_process

    args, start, files, tokenizer, rows = prepared(data, *flags)
    model = start.build_trainable(args.seed, args.gradient_checkpointing)
    start.method.initialise(model, tokenizer, vars(args), files.train.texts)
    set_up_process()
    machine = pick_machine(args.precision)
    machine.place(model)
    train_words_in_use(model, rows.token_ids)

    def measure() -> float:
        ends: list[float] = []

        def stop_requested() -> int:  # called after each step
            note_step(ends, steps)
            return len(ends) > steps

        calls = {"write_metrics": lambda line: None, "save": lambda *state: None}
        try:
            trainer.train(model, rows, None, args, machine, stop_requested=stop_requested, **calls)
        except trainer.Stopped:
            return BATCH * steps / (ends[-1] - ends[0])
        raise ValueError(f"{data} has fewer than {steps + 1} batches of {BATCH} rows")

    return measure


def hf_trainer(
    data: str, steps: int, *, prefix: int = 0, pad_to: int | None = None, **options
) -> Measure:
    """Time the Trainer of transformers with `options`, with a PEFT prefix if `prefix` is above 0.

    pad_to: pad every text to this many tokens, as in the original recipe. All steps are then
        equally slow, so only one is measured.
    """
    import transformers

    _, start, _, tokenizer, rows = prepared(data)
    transformers.utils.logging.set_verbosity_error()
    on_gpu, precision, attention = best()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        start.folders[0].backbone, num_labels=len(start.labels), attn_implementation=attention
    )
    if prefix:
        import peft

        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=prefix)
        model = peft.get_peft_model(model, config)
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            note_step(ends, steps)

    examples = [
        {"input_ids": rows.token_ids[text], "labels": int(label)}
        for text, label in zip(rows.text_index, rows.labels, strict=True)
    ]
    steps = 1 if pad_to else steps
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
    options |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
    options |= {"use_cpu": not on_gpu, "disable_tqdm": True, "dataloader_pin_memory": on_gpu}
    options |= {"per_device_train_batch_size": BATCH, "optim": "adamw_torch_fused"}
    options |= {"bf16": precision == "bf16" and not pad_to}
    folder = tempfile.mkdtemp()

    def measure() -> float:
        ends.clear()
        transformers.Trainer(
            model,
            transformers.TrainingArguments(folder, max_steps=steps + 1, **options),
            train_dataset=examples,
            data_collator=transformers.DataCollatorWithPadding(tokenizer, **padding),
            callbacks=[Clock()],
        ).train()
        return BATCH * steps / (ends[-1] - ends[0])

    return measure


def make_folders(data: str, parent: str, names: set[str]) -> None:
    """Write untrained models: PARENT/full, and with a prefix PARENT/0, PARENT/1, ...

    PARENT/openvino, PARENT/int8 and PARENT/ort-int8 have the first one for other engines.
    """
    for name in sorted(names):  # so "full" comes before those that are made from it
        if name in ("int8", "openvino", "ort-int8"):
            write_engine(data, parent, name)
            continue
        flags = [] if name == "full" else ["--prefix", "--seed", name]
        args, start, files, tokenizer, _ = prepared(data, *flags)
        model = start.build_trainable(args.seed, args.gradient_checkpointing)
        start.method.initialise(model, tokenizer, vars(args), files.train.texts)
        folder = Path(parent) / name
        folder.mkdir()
        start.save(model, tokenizer, folder)


def write_engine(data: str, parent: str, name: str) -> None:
    """Write PARENT/full as PARENT/NAME/model.xml (OpenVINO) or .onnx, if "int8" then quantized."""
    import nncf
    import numpy as np
    import openvino
    from onnxruntime.quantization import quantize_dynamic

    from model import load
    from script import export

    classifier, path = load(f"{parent}/full", "fp32"), Path(parent) / f"{name}.onnx"
    export.write(classifier, path)
    folder = Path(parent) / name
    folder.mkdir()
    if name == "ort-int8":
        # reduce_range: 8-bit products overflow on processors without VNNI
        quantize_dynamic(path, folder / "model.onnx", per_channel=True, reduce_range=True)
        return
    model = openvino.Core().read_model(path)
    if name == "int8":
        texts = distinct(data, CALIBRATION_TEXTS).texts
        cut = {"truncation": True, "max_length": MOST_TOKENS}
        encoded = [classifier.tokenizer(text, **cut) for text in texts]
        rows = [{key: np.array([one[key]]) for key in export.INPUTS} for one in encoded]
        options = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(rows)}
        model = nncf.quantize(model, nncf.Dataset(rows), **options)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def distinct(data: str, count: int):
    """Return a `Split` of the first `count` distinct texts of a file."""
    import dataset
    from runtime.file_format import FileFormat

    split = dataset.read_split(data, FileFormat(), labels_required=False)
    return dataclasses.replace(split, texts=list(dict.fromkeys(split.texts))[:count])


def our_scoring(data: str, count: int, parent: str, names: list[str]) -> Measure:
    """Time `main.py --do_predict` on texts in memory: tokenizing and computing the logits.

    names: the model or adapter folders; if there are several, the rows use them in turn.
    """
    import numpy as np

    from model.classifier import Classifier
    from model.source import open_model
    from runtime.machine import pick_machine, set_up_process

    folders, split, index = [f"{parent}/{name}" for name in names], distinct(data, count), None
    if len(names) > 1:
        index = np.arange(len(split)) % len(names)
    set_up_process()
    source = open_model(folders if len(names) > 1 else folders[0], by_row=len(names) > 1)
    classifier = Classifier.from_source(source, pick_machine("auto"))

    def measure() -> float:
        began = time.perf_counter()
        classifier.logits(split, index)
        return len(split) / (time.perf_counter() - began)

    return measure


def hf_pipeline(
    data: str, count: int, parent: str, names: list[str], *, compiled: bool = False
) -> Measure:
    """Time `pipeline("text-classification")` at its fastest."""
    import torch
    import transformers

    on_gpu, precision, attention = best()
    pipe = transformers.pipeline(
        "text-classification",
        model=f"{parent}/{names[0]}",
        device="cuda" if on_gpu else "cpu",
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        model_kwargs={"attn_implementation": attention},
    )
    if compiled:
        pipe.model.forward = torch.compile(pipe.model.forward, dynamic=True)
    texts = distinct(data, count).texts

    def measure() -> float:
        began = time.perf_counter()
        pipe(texts, batch_size=SCORING_BATCH)
        return len(texts) / (time.perf_counter() - began)

    return measure


def batches(parent: str, texts: list[str]) -> Iterator[dict]:
    """Tokenize texts for other engines, and yield batches of similar length."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{parent}/full/tokenizer.json")
    tokenizer.enable_truncation(MOST_TOKENS)
    rows = sorted((one.ids for one in tokenizer.encode_batch(texts)), key=len)
    for first in range(0, len(rows), SCORING_BATCH):
        batch = rows[first : first + SCORING_BATCH]
        ids = np.zeros((len(batch), len(batch[-1])), dtype=np.int64)
        for row, words in zip(ids, batch, strict=True):
            row[: len(words)] = words
        yield {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


def openvino_scoring(data: str, count: int, parent: str, names: list[str]) -> Measure:
    """Time OpenVINO in its throughput mode, with batches of texts of similar length in flight."""
    import openvino

    hint = {"fp32": "f32"}.get(best()[1], "bf16")
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": hint}
    compiled = openvino.Core().compile_model(f"{parent}/{names[-1]}/model.xml", "CPU", settings)
    texts = distinct(data, count).texts

    def measure() -> float:
        began = time.perf_counter()
        queue, found = openvino.AsyncInferQueue(compiled), {}

        def keep(request, number: int) -> None:
            found[number] = request.get_output_tensor(0).data.copy()

        queue.set_callback(keep)
        for number, batch in enumerate(batches(parent, texts)):
            queue.start_async(batch, number)
        queue.wait_all()
        assert sum(map(len, found.values())) == len(texts)
        return len(texts) / (time.perf_counter() - began)

    return measure


def onnxruntime_scoring(data: str, count: int, parent: str, names: list[str]) -> Measure:
    """Time onnxruntime with two batches of similar length in flight, on one thread each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = f"{parent}/{names[-1]}/model.onnx"
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    texts, threads = distinct(data, count).texts, ThreadPoolExecutor(2)

    def measure() -> float:
        began = time.perf_counter()
        found = list(threads.map(partial(session.run, None), batches(parent, texts)))
        assert sum(len(logits) for (logits,) in found) == len(texts)
        return len(texts) / (time.perf_counter() - began)

    return measure


BEST = {"train_sampling_strategy": "group_by_length"}
CPU_ONLY = (openvino_scoring, onnxruntime_scoring)  # the packages that are pinned here
MIXED = [str(number) for number in range(16)]
# name: (contender, rivals listed above it that it is compared with)
# fmt: off
TUNING = {
    "original recipe": (partial(hf_trainer, pad_to=256), []),
    "HF Trainer, by length": (partial(hf_trainer, **BEST), []),
    "ours, full": (ours, ["original recipe", "HF Trainer, by length"]),
    "PEFT prefix 20": (partial(hf_trainer, prefix=20, **BEST), []),
    "ours, prefix 20": (
        partial(ours, flags=["--prefix", "--pre_seq_len", "20"]), ["PEFT prefix 20", "ours, full"]
    ),
    "PEFT prefix 128": (partial(hf_trainer, prefix=128, **BEST), []),
    "ours, prefix 128": (partial(ours, flags=["--prefix"]), ["PEFT prefix 128", "ours, full"]),
}
SCORING = {
    "HF pipeline": (partial(hf_pipeline, names=["full"]), []),
    "HF pipeline, compiled": (partial(hf_pipeline, names=["full"], compiled=True), []),
    "OpenVINO": (partial(openvino_scoring, names=["full", "openvino"]), []),
    "OpenVINO, int8": (partial(openvino_scoring, names=["full", "int8"]), []),
    "onnxruntime, int8": (partial(onnxruntime_scoring, names=["full", "ort-int8"]), []),
    "ours, full": (
        partial(our_scoring, names=["full"]),
        ["HF pipeline", "HF pipeline, compiled", "OpenVINO", "OpenVINO, int8", "onnxruntime, int8"],
    ),
    "ours, prefix 128": (partial(our_scoring, names=["0"]), ["HF pipeline"]),
    "ours, 16 prefixes mixed": (
        partial(our_scoring, names=MIXED), ["HF pipeline", "ours, prefix 128"]
    ),
}
# fmt: on
