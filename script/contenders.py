"""Ways to tune and to score, ours and others', each made ready once and then measured.

What is in TUNING takes a data file and a number of steps, what is in SCORING a data file, a number
of texts and the folder of the models (`make_folders`). Made, each is a function without arguments
that works once and returns how many examples it took, and the seconds.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

BATCH = 32  # rows of a training step, of every way
RECIPE_STEPS = 1  # of the recipe re-created, whose texts all have one length, and whose steps last
PREFIXES = 16  # of a mixed batch


# ------------------------------------------------------------------------------ the ways to tune


def measured(examples: int, seconds: float) -> dict:
    return {"examples": examples, "seconds": seconds}


def settings(data: str, *flags: str) -> argparse.Namespace:
    """Arguments of main.py."""
    from arguments import parse_args

    files = ["--train_file", data, "--output_dir", "unused"]
    return parse_args(["--do_train", *files, *flags])


def texts_to_train_on(args: argparse.Namespace):
    """Source and config of the model, tokenizer, and the encoded training file."""
    import dataset
    from model import loading
    from model.source import locate

    source = locate(args.model_name_or_path)
    config = loading.load_config(source, tuned=False)
    split = dataset.read_splits(args)["train"]
    loading.describe_task(source, config, dataset.label_names(split), args)
    names = loading.list_labels(config)
    length = loading.set_max_seq_length(config, args.max_seq_length)
    tokenizer = loading.load_tokenizer(source, config)
    rows = dataset.encode(tokenizer, split, dataset.label_ids(split, names, False), length)
    return source, config, tokenizer, rows, split


def prepared(args: argparse.Namespace):
    """What main.py makes of its arguments: machine, model, tokenizer, rows to train on."""
    import dataset
    from model import loading
    from runtime.machine import pick_machine

    machine = pick_machine(args.precision)
    source, config, tokenizer, rows, split = texts_to_train_on(args)
    model = loading.make_model(source, config, args, fresh_head=True)
    if args.prefix_init == "text":
        words = dataset.words_to_start_from(loading.list_labels(config), split, args.seed)
        loading.start_from_text(model, tokenizer, words)
    machine.place(model)
    return machine, model, tokenizer, rows


def ours(data: str, steps: int, *flags: str) -> Callable[[], dict]:
    """`main.py` with these flags: `steps` steps of its loop."""
    import trainer
    from model import loading

    args = settings(data, *flags)
    machine, model, _, rows = prepared(args)
    loading.tune_words_in_use(model, rows.token_ids)

    def measure() -> dict:
        ends: list[float] = []

        def stopped() -> int:  # asked after each step
            ends.append(time.perf_counter())
            return len(ends) > steps

        try:
            trainer.train(
                model, rows, None, args, machine,
                record=lambda line: None, save=lambda *state: None, stopped=stopped,
            )  # fmt: skip
        except trainer.Stopped:
            return measured(BATCH * steps, ends[-1] - ends[0])
        raise ValueError(f"{data} has fewer than {steps + 1} batches of {BATCH} rows")

    measure.flops = partial(flops, lambda texts: machine.logits(model, rows, texts), rows, steps)
    return measure


def flops(logits_of: Callable, rows, count: int) -> float:
    """Operations of the matrix products of `count` steps, forward and back, for one example."""
    from torch.utils.flop_counter import FlopCounterMode

    from runtime.batches import training_batches

    batches = training_batches(rows.lengths[rows.text_of_row], BATCH, 42, 0)[:count]
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            logits_of(rows.text_of_row[batch]).sum().backward()
    return counter.get_total_flops() / (count * BATCH)


def hf_trainer(
    data: str, steps: int, *, prefix: int = 0, pad_to: int | None = None, **options
) -> Callable[[], dict]:
    """The Trainer of transformers, over PEFT where there is a `prefix`; `options` are its own.

    pad_to: tokens that every text is padded to, as in the work re-created.
    """
    import torch
    import transformers

    source, _, tokenizer, rows, _ = texts_to_train_on(settings(data))
    transformers.utils.logging.set_verbosity_error()
    # SDPA's backward is slow on CPUs in bfloat16: plain attention is these peers' best
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        source.backbone,
        num_labels=int(rows.labels.max()) + 1, attn_implementation="eager",
    )  # fmt: skip
    if prefix:
        import peft

        way = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=prefix)
        model = peft.get_peft_model(model, way)
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            ends.append(time.perf_counter())

    dataset = [
        {"input_ids": rows.token_ids[text], "labels": int(label)}
        for text, label in zip(rows.text_of_row, rows.labels, strict=True)
    ]
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
    folder = tempfile.mkdtemp()

    def measure() -> dict:
        ends.clear()
        transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder, per_device_train_batch_size=BATCH, max_steps=steps + 1, use_cpu=True,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
                optim="adamw_torch_fused", dataloader_pin_memory=False, **options,
            ),
            train_dataset=dataset,
            data_collator=transformers.DataCollatorWithPadding(tokenizer, **padding),
            callbacks=[Clock()],
        ).train()  # fmt: skip
        return measured(BATCH * steps, ends[-1] - ends[0])

    def logits_of(texts):
        batch = rows.collate(texts)
        if pad_to:
            pad = (0, pad_to - batch["input_ids"].shape[1])
            batch = {name: torch.nn.functional.pad(one, pad) for name, one in batch.items()}
        return model(**batch).logits

    measure.flops = partial(flops, logits_of, rows, steps)
    return measure


# ----------------------------------------------------------------------------- the ways to score


def distinct(data: str, count: int):
    """A file's `Split` of its first `count` distinct texts."""
    import dataset

    split = dataset.read_split(data, text_columns=["text"], labels_required=False)
    return dataclasses.replace(split, texts=list(dict.fromkeys(split.texts))[:count])


def make_folders(data: str, parent: str, names: set[str]) -> None:
    """Models as they are before training: PARENT/full, and prefixes PARENT/0, PARENT/1, ..."""
    from model import loading
    from model.source import locate

    for name in sorted(names):
        args = settings(data, *([] if name == "full" else ["--prefix", "--seed", name]))
        _, model, tokenizer, _ = prepared(args)
        loading.save_model(model, tokenizer, locate(args.model_name_or_path), Path(parent) / name)


def our_scoring(data: str, count: int, parent: str, names: list[str]) -> Callable[[], dict]:
    """`main.py --do_predict` of texts in memory: to tokens, then to logits.

    names: of the folder; with several, they serve the rows in turn.
    """
    import numpy as np

    import dataset
    import trainer
    from model import loading
    from model.prefix_bank import PrefixBank
    from model.source import locate
    from runtime.machine import pick_machine

    source = locate(f"{parent}/{names[0]}")
    config = loading.load_config(source, tuned=True)
    tokenizer = loading.load_tokenizer(source, config)
    if len(names) > 1:
        model = PrefixBank.open([f"{parent}/{name}" for name in names])
    else:
        model = loading.load_model(source, config)
    args = settings(data)
    machine = pick_machine("auto")
    machine.place(model)
    split = distinct(data, count)
    served_by = np.arange(len(split)) % len(names) if len(names) > 1 else None

    def measure() -> dict:
        start = time.perf_counter()
        encoded = dataset.encode(tokenizer, split, None, config.max_seq_length, served_by)
        trainer.predict(model, encoded, args, machine)
        return measured(len(split), time.perf_counter() - start)

    return measure


def hf_pipeline(
    data: str, count: int, parent: str, names: list[str], batch_size: int
) -> Callable[[], dict]:
    """`pipeline("text-classification")` at its best here: bfloat16, plain attention."""
    import torch
    import transformers

    pipe = transformers.pipeline(
        "text-classification", model=f"{parent}/{names[0]}", device="cpu", dtype=torch.bfloat16,
        model_kwargs={"attn_implementation": "eager"},
    )  # fmt: skip
    texts = distinct(data, count).texts

    def measure() -> dict:
        start = time.perf_counter()
        pipe(texts, batch_size=batch_size)
        return measured(len(texts), time.perf_counter() - start)

    return measure


# --------------------------------------------------------------------------------- what is asked

BEST = {"bf16": True, "train_sampling_strategy": "group_by_length"}
# name: how it is made, and the names of the ways that it is compared with
TUNING = {
    "recipe re-created": (
        lambda data, steps: hf_trainer(data, min(steps, RECIPE_STEPS), pad_to=256),
        None,
    ),
    "HF Trainer, bf16, by length": (partial(hf_trainer, **BEST), None),
    "ours, full": (ours, ["recipe re-created", "HF Trainer, bf16, by length"]),
    "PEFT prefix 20": (partial(hf_trainer, prefix=20, **BEST), None),
    "ours, prefix 20": (
        lambda data, steps: ours(data, steps, "--prefix", "--pre_seq_len", "20"),
        ["PEFT prefix 20", "ours, full"],
    ),
    "PEFT prefix 128": (partial(hf_trainer, prefix=128, **BEST), None),
    "ours, prefix 128": (
        lambda data, steps: ours(data, steps, "--prefix"),
        ["PEFT prefix 128", "ours, full"],
    ),
}
SCORING = {
    "HF pipeline": (partial(hf_pipeline, names=["full"], batch_size=64), None),
    "ours, full": (partial(our_scoring, names=["full"]), ["HF pipeline"]),
    "ours, prefix 128": (partial(our_scoring, names=["0"]), ["HF pipeline"]),
    "ours, 16 prefixes mixed": (
        partial(our_scoring, names=[str(number) for number in range(PREFIXES)]),
        ["HF pipeline", "ours, prefix 128"],
    ),
}
