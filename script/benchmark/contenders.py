"""Contenders of the benchmark: ours and its rivals, set up, then timed.

A tuning contender takes a data file and a number of steps; a scoring contender takes texts and the
folder of the models (see `make_folders`). Each returns a function that runs one measurement and
returns the examples per second.

Imports are inside the functions, since a contender's start-up time and memory are measured: it
must load only what it needs.
"""

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
ENGINES = ("int8", "openvino", "ort-int8")  # other than torch

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
    room = tokens - tokenizer.num_special_tokens_to_add()

    def filled(first: int) -> str:
        ends = itertools.accumulate(itertools.islice(itertools.cycle(costs), first, None))
        count = sum(1 for _ in itertools.takewhile(lambda end: end <= room, ends))
        return " ".join(itertools.islice(itertools.cycle(words), first, first + count))

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


def timed(work: Callable[[], object], count: int) -> Measure:
    """Return a function that times `work`, which handles `count` texts."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return count / (time.perf_counter() - start)

    return measure


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
    steps = 1 if pad_to else steps

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            note_step(ends, steps)

    examples = [
        {"input_ids": rows.token_ids[text], "labels": int(label)}
        for text, label in zip(rows.text_index, rows.labels, strict=True)
    ]
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps + 1,
        per_device_train_batch_size=BATCH,
        optim="adamw_torch_fused",
        bf16=precision == "bf16" and not pad_to,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        **options,
    )

    def measure() -> float:
        ends.clear()
        transformers.Trainer(
            model,
            arguments,
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
        folder = Path(parent) / name
        folder.mkdir()
        if name in ENGINES:
            write_engine(data, f"{parent}/full", folder)
            continue
        flags = [] if name == "full" else ["--prefix", "--seed", name]
        args, start, files, tokenizer, _ = prepared(data, *flags)
        model = start.build_trainable(args.seed, args.gradient_checkpointing)
        start.method.initialise(model, tokenizer, vars(args), files.train.texts)
        start.save(model, folder)


def write_engine(data: str, full: str, folder: Path) -> None:
    """Write a model for OpenVINO, as model.xml, or for onnxruntime; "int8" is quantized."""
    import nncf
    import openvino
    from onnxruntime.quantization import quantize_dynamic

    from model import load
    from script import export

    classifier, path = load(full, "fp32"), folder.with_suffix(".onnx")
    export.write(classifier, path)
    if folder.name == "ort-int8":
        # reduce_range: 8-bit products overflow on processors without VNNI
        quantize_dynamic(path, folder / "model.onnx", per_channel=True, reduce_range=True)
        return
    model = openvino.Core().read_model(path)
    if folder.name == "int8":
        cut = {"truncation": True, "max_length": MOST_TOKENS}
        texts = distinct(data, CALIBRATION_TEXTS)
        encoded = [classifier.tokenizer(text, return_tensors="np", **cut) for text in texts]
        rows = [{key: row[key] for key in export.INPUTS} for row in encoded]
        options = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(rows)}
        model = nncf.quantize(model, nncf.Dataset(rows), **options)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def distinct(data: str, count: int) -> list[str]:
    """Return the first `count` distinct texts of a file."""
    import dataset
    from runtime.file_format import FileFormat

    split = dataset.read_split(data, FileFormat(), labels_required=False)
    return list(dict.fromkeys(split.texts))[:count]


def our_scoring(texts: list[str], parent: str, names: list[str]) -> Measure:
    """Time `main.py --do_predict` on texts in memory: tokenizing and computing the logits.

    names: the model or adapter folders; if there are several, the rows use them in turn.
    """
    import numpy as np

    from model.classifier import Classifier
    from model.source import open_model
    from runtime.batches import rows_of
    from runtime.machine import pick_machine, set_up_process

    folders, index = [f"{parent}/{name}" for name in names], None
    if len(names) > 1:
        index = np.arange(len(texts)) % len(names)
    set_up_process()
    source = open_model(folders if len(names) > 1 else folders[0], by_row=len(names) > 1)
    classifier = Classifier.from_source(source, pick_machine("auto"))
    return timed(lambda: classifier.logits(rows_of(texts), index), len(texts))


def hf_pipeline(texts: list[str], parent: str, names: list[str], compiled: bool = False) -> Measure:
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
    return timed(lambda: pipe(texts, batch_size=SCORING_BATCH), len(texts))


def batches(parent: str, texts: list[str]) -> Iterator[dict]:
    """Tokenize texts for other engines, and yield batches of similar length."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{parent}/full/tokenizer.json")
    tokenizer.enable_truncation(MOST_TOKENS)
    rows = sorted(tokenizer.encode_batch(texts), key=len)
    for first in range(0, len(rows), SCORING_BATCH):
        batch = rows[first : first + SCORING_BATCH]
        for row in batch:
            row.pad(len(batch[-1]))
        ids, mask = ([row.ids for row in batch], [row.attention_mask for row in batch])
        yield {"input_ids": np.array(ids), "attention_mask": np.array(mask)}


def openvino_scoring(texts: list[str], parent: str, names: list[str]) -> Measure:
    """Time OpenVINO in its throughput mode, with batches of texts of similar length in flight."""
    import openvino

    hint = {"fp32": "f32"}.get(best()[1], "bf16")
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": hint}
    compiled = openvino.Core().compile_model(f"{parent}/{names[-1]}/model.xml", "CPU", settings)

    def work() -> None:
        queue, logits = openvino.AsyncInferQueue(compiled), {}

        def keep(request, number: int) -> None:
            logits[number] = request.get_output_tensor(0).data.copy()

        queue.set_callback(keep)
        for number, batch in enumerate(batches(parent, texts)):
            queue.start_async(batch, number)
        queue.wait_all()
        assert sum(map(len, logits.values())) == len(texts)

    return timed(work, len(texts))


def onnxruntime_scoring(texts: list[str], parent: str, names: list[str]) -> Measure:
    """Time onnxruntime with two batches of similar length in flight, on one thread each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = f"{parent}/{names[-1]}/model.onnx"
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    threads = ThreadPoolExecutor(2)

    def work() -> None:
        results = list(threads.map(partial(session.run, None), batches(parent, texts)))
        assert sum(len(logits) for (logits,) in results) == len(texts)

    return timed(work, len(texts))


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
