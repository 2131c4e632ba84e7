"""Measures speed and memory on this machine: ours and others' in turn, in one call.

Every way of working has a process of its own, and only one works at a time. Tables are printed;
benchmark.json holds all figures, benchmark.svg shows how cost grows.

    bash script/benchmark.sh [--data FILE] [--rounds N] [--only NAME...] [--growth]
"""

import argparse
import dataclasses
import json
import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

BATCH = 32  # rows of a training step, of every way
STEPS = 50  # of a measurement: one sorted group of the Trainer's, so that no way gets easy lengths
RECIPE_STEPS = 1  # of the recipe re-created, whose texts all have one length, and whose steps last
TEXTS = 2048  # of a measurement of scoring
PREFIXES = 16  # of a mixed batch
THREADS = 2


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
    from model import utils
    from model.source import locate

    source = locate(args.model_name_or_path)
    config = utils.load_config(source, tuned=False)
    split = dataset.read_splits(args)["train"]
    utils.describe_task(source, config, dataset.label_names(split), args)
    names = utils.list_labels(config)
    length = utils.set_max_seq_length(config, args.max_seq_length)
    tokenizer = utils.load_tokenizer(source, config)
    rows = dataset.encode(tokenizer, split, dataset.label_ids(split, names, False), length)
    return source, config, tokenizer, rows, split


def prepared(args: argparse.Namespace):
    """What main.py makes of its arguments: machine, model, tokenizer, rows to train on."""
    import dataset
    import trainer
    from model import utils

    machine = trainer.pick_machine(args.precision)
    source, config, tokenizer, rows, split = texts_to_train_on(args)
    model = utils.make_model(source, config, args, fresh_head=True)
    if args.prefix_init == "text":
        words = dataset.words_to_start_from(utils.list_labels(config), split, args.seed)
        utils.start_from_text(model, tokenizer, words)
    machine.place(model)
    return machine, model, tokenizer, rows


def ours(data: str, steps: int, *flags: str) -> Callable[[], dict]:
    """`main.py` with these flags: `steps` steps of its loop."""
    import trainer
    from model import utils

    args = settings(data, *flags)
    machine, model, _, rows = prepared(args)
    utils.tune_words_in_use(model, rows.token_ids)

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

    import dataset

    batches = dataset.training_batches(rows.lengths[rows.text_of_row], BATCH, 42, 0)[:count]
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
    from model import utils
    from model.source import locate

    for name in sorted(names):
        args = settings(data, *([] if name == "full" else ["--prefix", "--seed", name]))
        _, model, tokenizer, _ = prepared(args)
        utils.save_model(model, tokenizer, locate(args.model_name_or_path), Path(parent) / name)


def our_scoring(data: str, count: int, parent: str, names: list[str]) -> Callable[[], dict]:
    """`main.py --do_predict` of texts in memory: to tokens, then to logits.

    names: of the folder; with several, they serve the rows in turn.
    """
    import numpy as np

    import dataset
    import trainer
    from model import utils
    from model.prefix_bank import PrefixBank
    from model.source import locate

    source = locate(f"{parent}/{names[0]}")
    config = utils.load_config(source, tuned=True)
    tokenizer = utils.load_tokenizer(source, config)
    if len(names) > 1:
        model = PrefixBank.open([f"{parent}/{name}" for name in names])
    else:
        model = utils.load_model(source, config)
    args = settings(data)
    machine = trainer.pick_machine("auto")
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
# name: how it is made, and the name of the way that it is compared with
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


# ------------------------------------------------------------------------------------ processes


def worker(pipe: Connection, spawned: float, make: str, name: str, what: tuple) -> None:
    """Make one way, say when it was ready, then measure whenever asked."""
    import torch

    logging.disable(logging.INFO)
    torch.set_num_threads(THREADS)
    measure = globals()[make][name][0](*what)
    pipe.send({"start_up": time.time() - spawned})
    while pipe.recv():
        figures = measure()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send({**figures, "peak_memory_bytes": peak})
    pipe.send({"flops": measure.flops() if hasattr(measure, "flops") else None})


def asked(name: str, only: list[str]) -> bool:
    """Whether a way is to be measured."""
    return not only or any(part in name for part in only)


def in_turn(make: str, what: tuple, rounds: int, only: list[str]) -> dict[str, dict]:
    """Measure every way of TUNING or SCORING `rounds` times, one after the other each time.

    what: data file, number of steps or texts, and for scoring the folder of the models.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, found = {}, {}
    for name in globals()[make]:
        if asked(name, only):
            pipes[name], end = spawn.Pipe()
            process = spawn.Process(target=worker, args=(end, time.time(), make, name, what))
            process.daemon = True
            process.start()
            end.close()
            found[name] = pipes[name].recv() | {"rates": []}
            print(f"{name}: ready after {found[name]['start_up']:.1f} s", flush=True)
    for number in range(rounds + 1):  # the first warms up
        for name, pipe in pipes.items():
            pipe.send(True)
            figures = pipe.recv()
            found[name]["peak_memory_bytes"] = figures["peak_memory_bytes"]
            if number:
                found[name]["rates"].append(figures["examples"] / figures["seconds"])
        if number:
            print(f"round {number} of {rounds} done", flush=True)
    for name, pipe in pipes.items():
        pipe.send(False)
        found[name] |= pipe.recv()
        found[name]["rate"] = statistics.median(found[name]["rates"])
    return found


def peak_flops() -> float:
    """What a large matrix product reaches on this machine in bfloat16, per second."""
    import torch

    torch.set_num_threads(THREADS)
    one = torch.randn(4096, 4096).bfloat16()
    times = []
    for _ in range(6):
        start = time.perf_counter()
        one @ one
        times.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(times)


def table(title: str, found: dict[str, dict], ways: dict, peak: float) -> str:
    """Lines of text: rates, ratios of medians, memory, share of the peak, start-up."""
    lines = [f"\n{title:28} per s  of peak  memory  start-up  ratio"]
    for name, one in found.items():
        share = f"{one['flops'] * one['rate'] / peak:5.0%}" if one.get("flops") else "     "
        base = [other for other in ways[name][1] or () if other in found]
        one["ratios"] = {other: one["rate"] / found[other]["rate"] for other in base}
        memory = one["peak_memory_bytes"] / 2**30
        shown = ", ".join(f"{ratio:.2f}x {other}" for other, ratio in one["ratios"].items())
        lines.append(
            f"{name:28} {one['rate']:5.0f}    {share} {memory:5.2f} G  {one['start_up']:5.1f} s   "
            f"{shown}"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- growth


def growth(data: str) -> dict[str, dict[str, dict[int, float]]]:
    """Milliseconds for one example by what grows: of `ours, full` and `ours, prefix 128`."""
    import numpy as np
    import torch

    import dataset
    import trainer
    from model import utils

    def step_time(args, machine, model, rows, batch) -> float:
        optimizer = trainer.build_optimizer(model.train(), args)
        times = []
        for number in range(8):
            start = time.perf_counter()
            trainer.training_step(model, optimizer, rows, batch, number, args, machine)
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times[2:]) / len(batch)

    found: dict[str, dict[str, dict[int, float]]] = {}
    flags = {"ours, full": [], "ours, prefix 128": ["--prefix"]}
    for name, way in flags.items():
        args = settings(data, *way)
        machine, model, _, rows = prepared(args)
        utils.tune_words_in_use(model, rows.token_ids)
        some = np.concatenate(rows.token_ids)[: 128 * BATCH]
        measure = found[name] = {"text length": {}, "threads": {}, "rows": {}}
        for length in (8, 16, 32, 64, 128):
            ids = np.resize(some, (BATCH, length)).tolist()
            fixed = dataclasses.replace(rows, token_ids=ids, text_of_row=np.arange(BATCH))
            batch = np.arange(BATCH)
            measure["text length"][length] = step_time(args, machine, model, fixed, batch)
            if length == 16:
                for threads in range(1, THREADS + 1):
                    torch.set_num_threads(threads)
                    measure["threads"][threads] = step_time(args, machine, model, fixed, batch)
        for count in (1000, 4000, 16000):  # rows to score, all of them distinct
            ids = [rows.token_ids[number % len(rows.token_ids)] for number in range(count)]
            many = dataclasses.replace(rows, token_ids=ids, text_of_row=np.arange(count))
            start = time.perf_counter()
            trainer.predict(model, many, args, machine)
            measure["rows"][count] = 1000 * (time.perf_counter() - start) / count
    measure = found["ours, prefix 128"]["prefix length"] = {}
    for virtual in (4, 8, 16, 32, 64, 128):
        args = settings(data, "--prefix", "--pre_seq_len", str(virtual))
        machine, model, _, rows = prepared(args)
        batch = dataset.training_batches(rows.lengths[rows.text_of_row], BATCH, 42, 0)[0]
        measure[virtual] = step_time(args, machine, model, rows, batch)
    return found


def picture(found: dict[str, dict], path: Path) -> None:
    """A panel for each thing that grows."""
    import matplotlib.pyplot as plt

    titles = {
        "text length": "tuning, tokens of each text",
        "prefix length": "tuning, virtual tokens",
        "threads": "tuning, threads",
        "rows": "scoring, rows",
    }
    figure, axes = plt.subplots(1, len(titles), figsize=(12, 3), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for (name, curves), look in zip(found.items(), ("o-C0", "s-C1"), strict=True):
            if key in curves:
                points = list(curves[key].items())
                axis.plot(*zip(*points, strict=True), look, label=name)
        axis.set(title=title, xscale="log", ylim=0, xticks=[x for x, _ in points])
        axis.set_xticklabels([f"{x:,}" for x, _ in points])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms for each example")
    axes[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="csv/train_simple.csv", help="with `text` and `label`")
    parser.add_argument("--steps", type=int, default=STEPS, help="of tuning, each time")
    parser.add_argument("--texts", type=int, default=TEXTS, help="to score, each time")
    parser.add_argument("--rounds", type=int, default=5, help="alternations; medians are shown")
    parser.add_argument("--only", nargs="+", default=[], help="ways whose names hold one of these")
    parser.add_argument("--output_dir", default="results")
    parser.add_argument("--growth", action="store_true", help="measure how cost grows too")
    args = parser.parse_args()
    peak = peak_flops()
    print(f"{THREADS} threads, matrix products in bfloat16: {peak / 1e9:.0f} GFLOP/s at best")
    results = {"threads": THREADS, "peak_flops": peak, "data": args.data, "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as parent:
        ways = [make for name, (make, _) in SCORING.items() if asked(name, args.only)]
        names = {name for make in ways for name in make.keywords["names"]}
        maker = multiprocessing.get_context("spawn").Process(
            target=make_folders, args=(args.data, parent, names)
        )
        maker.start()
        maker.join()
        for make, title, what in (
            ("TUNING", "tuning", (args.data, args.steps)),
            ("SCORING", "scoring distinct texts", (args.data, args.texts, parent)),
        ):
            results[title] = in_turn(make, what, args.rounds, args.only)
            print(table(title, results[title], globals()[make], peak), flush=True)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.growth:
        results["growth"] = growth(args.data)
        picture(results["growth"], folder / "benchmark.svg")
    (folder / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nall figures: {folder / 'benchmark.json'}")


if __name__ == "__main__":
    main()
