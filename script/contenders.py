"""Contenders of the benchmark: ours, HF Trainer, PEFT, pipeline and OpenVINO, set up, then timed.

A tuning contender takes a data file and a number of steps; a scoring contender takes a data file,
a number of texts and the folder of the models (see `make_folders`). Each returns a function that
runs one measurement and returns the examples per second.

Imports are inside the functions, since a contender's start-up time and memory are measured: it
must load only what it needs.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

BATCH = 32  # rows of a training step, for every contender
CALIBRATION_TEXTS = 300  # of int8

Measure = Callable[[], float]  # examples per second


def prepared(data: str, *flags: str):
    """Read data and tokenizer as main.py does before it builds a model.

    Returns arguments, start, data, tokenizer and the encoded training file.
    """
    import dataset
    from arguments import fill_schedule, parse_args
    from model.start import Start
    from runtime.batches import encode
    from runtime.columns import fill_columns

    fixed = "--num_train_epochs 1 --hidden_dropout_prob 0 --rdrop_alpha 0".split()
    args = parse_args(
        ["--do_train", "--train_file", data, "--output_dir", "unused", *fixed, *flags]
    )
    fill_columns(args)
    start = Start(args)
    settings = start.settings(args)
    splits = dataset.read_splits(args, settings)
    start.set_labels(dataset.label_names(splits["train"], args.label_names))
    files = dataset.prepare(args, settings, splits, start.labels)
    fill_schedule(args, files.seen_share)
    start.set_dropout(args)
    tokenizer = start.tokenizer()
    rows = encode(tokenizer, files.train, start.config.max_seq_length)
    return args, start, files, tokenizer, rows


def ours(data: str, steps: int, flags: Sequence[str] = ()) -> Measure:
    """Time `steps` training steps of `main.py` with these flags."""
    import trainer
    from model.sequence_classification import train_words_in_use
    from runtime.machine import pick_machine

    args, start, files, tokenizer, rows = prepared(data, *flags)
    model = start.build(args)
    start.method.initialise(model, tokenizer, args, files.train.texts)
    machine = pick_machine(args.precision)
    machine.place(model)
    train_words_in_use(model, rows.token_ids)

    def measure() -> float:
        ends: list[float] = []

        def stop_requested() -> int:  # called after each step
            ends.append(time.perf_counter())
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
    # SDPA's backward pass is slow on CPUs in bfloat16: eager attention is fastest for these rivals
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        start.source.backbone, num_labels=len(start.labels), attn_implementation="eager"
    )
    if prefix:
        import peft

        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=prefix)
        model = peft.get_peft_model(model, config)
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            ends.append(time.perf_counter())

    examples = [
        {"input_ids": rows.token_ids[text], "labels": int(label)}
        for text, label in zip(rows.text_index, rows.labels, strict=True)
    ]
    steps = 1 if pad_to else steps
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
    options |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
    options |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    options |= {"per_device_train_batch_size": BATCH, "optim": "adamw_torch_fused"}
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

    PARENT/onnx and PARENT/int8 have the first one for OpenVINO, with weights of 32 and of 8 bits.
    """
    for name in sorted(names):  # so "full" comes before those that are made from it
        if name in ("int8", "onnx"):
            write_openvino(data, parent, name)
            continue
        flags = [] if name == "full" else ["--prefix", "--seed", name]
        args, start, files, tokenizer, _ = prepared(data, *flags)
        model = start.build(args)
        start.method.initialise(model, tokenizer, args, files.train.texts)
        folder = Path(parent) / name
        folder.mkdir()
        start.save(model, tokenizer, folder)


def write_openvino(data: str, parent: str, name: str) -> None:
    """Write PARENT/full for OpenVINO as PARENT/NAME/model.xml, quantized if `name` is "int8"."""
    import nncf
    import numpy as np
    import openvino

    from model import load
    from script import export

    classifier, path = load(f"{parent}/full", "fp32"), Path(parent) / f"{name}.onnx"
    export.write(classifier, path)
    model = openvino.Core().read_model(path)
    if name == "int8":
        texts = distinct(data, CALIBRATION_TEXTS).texts
        encoded = [classifier.tokenizer(text, truncation=True, max_length=128) for text in texts]
        rows = [{key: np.array([one[key]]) for key in export.INPUTS} for one in encoded]
        options = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(rows)}
        model = nncf.quantize(model, nncf.Dataset(rows), **options)
    openvino.save_model(model, Path(parent) / name / "model.xml", compress_to_fp16=False)


def distinct(data: str, count: int):
    """Return a `Split` of the first `count` distinct texts of a file."""
    import dataset

    split = dataset.read_split(data, text_columns=["text"], labels_required=False)
    return dataclasses.replace(split, texts=list(dict.fromkeys(split.texts))[:count])


def our_scoring(data: str, count: int, parent: str, names: list[str]) -> Measure:
    """Time `main.py --do_predict` on texts in memory: tokenizing and computing the logits.

    names: the model or adapter folders; if there are several, the rows use them in turn.
    """
    import numpy as np

    from arguments import parse_args
    from model.bank_start import find_start
    from model.classifier import predict
    from runtime.batches import encode
    from runtime.machine import pick_machine

    flags, folders = ["--do_predict", "--output_dir", "unused"], [f"{parent}/{n}" for n in names]
    split, index = distinct(data, count), None
    if len(names) == 1:
        args = parse_args([*flags, "--model_name_or_path", *folders])
    else:
        args = parse_args([*flags, "--prefix_paths", *folders, "--prefix_column", "unused"])
        index = np.arange(len(split)) % len(names)
    start = find_start(args)
    tokenizer, model = start.tokenizer(), start.build(args)
    machine = pick_machine(args.precision)
    machine.place(model)

    def measure() -> float:
        began = time.perf_counter()
        encoded = encode(tokenizer, split, start.config.max_seq_length, index)
        predict(model, encoded, args.per_device_eval_batch_size, machine)
        return len(split) / (time.perf_counter() - began)

    return measure


def hf_pipeline(data: str, count: int, parent: str, names: list[str]) -> Measure:
    """Time `pipeline("text-classification")` at its fastest: bfloat16, eager attention."""
    import torch
    import transformers

    pipe = transformers.pipeline(
        "text-classification",
        model=f"{parent}/{names[0]}",
        device="cpu",
        dtype=torch.bfloat16,
        model_kwargs={"attn_implementation": "eager"},
    )
    texts = distinct(data, count).texts

    def measure() -> float:
        began = time.perf_counter()
        pipe(texts, batch_size=64)
        return len(texts) / (time.perf_counter() - began)

    return measure


def openvino_scoring(data: str, count: int, parent: str, names: list[str]) -> Measure:
    """Time OpenVINO in its throughput mode, with batches of texts of similar length in flight."""
    import numpy as np
    import openvino
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{parent}/full/tokenizer.json")
    tokenizer.enable_truncation(128)
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "bf16"}
    compiled = openvino.Core().compile_model(f"{parent}/{names[-1]}/model.xml", "CPU", settings)
    texts = distinct(data, count).texts

    def measure() -> float:
        began = time.perf_counter()
        queue, found = openvino.AsyncInferQueue(compiled), {}

        def keep(request, number: int) -> None:
            found[number] = request.get_output_tensor(0).data.copy()

        queue.set_callback(keep)
        rows = sorted((one.ids for one in tokenizer.encode_batch(texts)), key=len)
        for first in range(0, len(rows), 64):
            batch = rows[first : first + 64]
            ids = np.zeros((len(batch), len(batch[-1])), dtype=np.int64)
            for row, words in zip(ids, batch, strict=True):
                row[: len(words)] = words
            queue.start_async({"input_ids": ids, "attention_mask": (ids > 0).astype(int)}, first)
        queue.wait_all()
        assert sum(map(len, found.values())) == len(texts)
        return len(texts) / (time.perf_counter() - began)

    return measure


BEST = {"bf16": True, "train_sampling_strategy": "group_by_length"}
MIXED = [str(number) for number in range(16)]
# name: (contender, rivals listed above it that it is compared with)
# fmt: off
TUNING = {
    "original recipe": (partial(hf_trainer, pad_to=256), []),
    "HF Trainer, bf16, by length": (partial(hf_trainer, **BEST), []),
    "ours, full": (ours, ["original recipe", "HF Trainer, bf16, by length"]),
    "PEFT prefix 20": (partial(hf_trainer, prefix=20, **BEST), []),
    "ours, prefix 20": (
        partial(ours, flags=["--prefix", "--pre_seq_len", "20"]), ["PEFT prefix 20", "ours, full"]
    ),
    "PEFT prefix 128": (partial(hf_trainer, prefix=128, **BEST), []),
    "ours, prefix 128": (partial(ours, flags=["--prefix"]), ["PEFT prefix 128", "ours, full"]),
}
SCORING = {
    "HF pipeline": (partial(hf_pipeline, names=["full"]), []),
    "OpenVINO, bf16": (partial(openvino_scoring, names=["full", "onnx"]), []),
    "OpenVINO, int8": (partial(openvino_scoring, names=["full", "int8"]), []),
    "ours, full": (
        partial(our_scoring, names=["full"]), ["HF pipeline", "OpenVINO, bf16", "OpenVINO, int8"]
    ),
    "ours, prefix 128": (partial(our_scoring, names=["0"]), ["HF pipeline"]),
    "ours, 16 prefixes mixed": (
        partial(our_scoring, names=MIXED), ["HF pipeline", "ours, prefix 128"]
    ),
}
# fmt: on
