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
from multiprocessing.connection import Connection
from pathlib import Path

from script import contenders

STEPS = 50  # of a measurement: one sorted group of the Trainer's, so that no way gets easy lengths
TEXTS = 2048  # of a measurement of scoring
THREADS = 2


# ------------------------------------------------------------------------------------ processes


def worker(pipe: Connection, spawned: float, make: str, name: str, what: tuple) -> None:
    """Make one way, say when it was ready, then measure whenever asked."""
    import torch

    logging.disable(logging.INFO)
    torch.set_num_threads(THREADS)
    measure = getattr(contenders, make)[name][0](*what)
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
    for name in getattr(contenders, make):
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


def table(title: str, found: dict[str, dict], made: dict, peak: float) -> str:
    """Lines of text: rates, ratios of medians, memory, share of the peak, start-up."""
    lines = [f"\n{title:28} per s  of peak  memory  start-up  ratio"]
    for name, one in found.items():
        share = f"{one['flops'] * one['rate'] / peak:5.0%}" if one.get("flops") else "     "
        base = [other for other in made[name][1] or () if other in found]
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

    import trainer
    from model import loading
    from runtime import batches

    def step_time(args, machine, model, rows, batch) -> float:
        optimizer = trainer.build_optimizer(model.train(), args)
        times = []
        for number in range(20):
            start = time.perf_counter()
            trainer.training_step(model, optimizer, rows, batch, number, args, machine)
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times[2:]) / len(batch)

    found: dict[str, dict[str, dict[int, float]]] = {}
    flags = {"ours, full": [], "ours, prefix 128": ["--prefix"]}
    for name, way in flags.items():
        args = contenders.settings(data, *way)
        machine, model, _, rows = contenders.prepared(args)
        loading.tune_words_in_use(model, rows.token_ids)
        some = np.concatenate(rows.token_ids)[: 128 * contenders.BATCH]
        measure = found[name] = {"text length": {}, "threads": {}, "rows": {}}
        for length in (8, 16, 32, 64, 128):
            ids = np.resize(some, (contenders.BATCH, length)).tolist()
            fixed = dataclasses.replace(
                rows, token_ids=ids, text_of_row=np.arange(contenders.BATCH)
            )
            batch = np.arange(contenders.BATCH)
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
        args = contenders.settings(data, "--prefix", "--pre_seq_len", str(virtual))
        machine, model, _, rows = contenders.prepared(args)
        batch = batches.training_batches(rows.lengths[rows.text_of_row], contenders.BATCH, 42, 0)[0]
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
                axis.plot(*zip(*points, strict=True), look, label=name, clip_on=False)
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
    parser.add_argument("--output_dir", default="checkpoints/benchmark")
    parser.add_argument("--growth", action="store_true", help="measure how cost grows too")
    args = parser.parse_args()
    peak = peak_flops()
    print(f"{THREADS} threads, matrix products in bfloat16: {peak / 1e9:.0f} GFLOP/s at best")
    results = {"threads": THREADS, "peak_flops": peak, "data": args.data, "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as parent:
        wanted = [make for name, (make, _) in contenders.SCORING.items() if asked(name, args.only)]
        names = {name for make in wanted for name in make.keywords["names"]}
        maker = multiprocessing.get_context("spawn").Process(
            target=contenders.make_folders, args=(args.data, parent, names)
        )
        maker.start()
        maker.join()
        for make, title, what in (
            ("TUNING", "tuning", (args.data, args.steps)),
            ("SCORING", "scoring distinct texts", (args.data, args.texts, parent)),
        ):
            results[title] = in_turn(make, what, args.rounds, args.only)
            print(table(title, results[title], getattr(contenders, make), peak), flush=True)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.growth:
        results["growth"] = growth(args.data)
        picture(results["growth"], folder / "benchmark.svg")
    (folder / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nall figures: {folder / 'benchmark.json'}")


if __name__ == "__main__":
    main()
