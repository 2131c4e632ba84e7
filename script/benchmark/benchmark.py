"""Compare this project's speed and memory with its rivals' on this machine.

    bash script/benchmark.sh [--data FILE] [--rounds N] [--only NAME...]
    bash script/benchmark.sh --tokens 128 --steps 5 --texts 128 [--neighbours 1]

The rivals are HF Trainer, PEFT, pipeline, OpenVINO and onnxruntime, each in its best precision on
this machine. Each contender has its own process, and they run in turn, one at a time. Prints two
tables, writes all figures to benchmark.json and plots the rates in benchmark.svg.
"""

import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from arguments import DIR, FILE
from runtime.files import UserError, run_and_report
from runtime.flags import Parser
from script.benchmark import contenders

THREADS = 2
STEPS = 50  # one of the groups that the Trainer sorts by length: no contender gets easy lengths
SPAWN = multiprocessing.get_context("spawn")


def worker(pipe: Connection, spawned: float, contender, arguments: tuple) -> None:
    """Set up a contender, send its start-up time, then measure on request."""
    import torch  # imported here, so that the start-up time includes it

    logging.disable(logging.INFO)
    torch.set_num_threads(THREADS)
    measure = contender(*arguments)
    pipe.send(time.time() - spawned)
    while True:
        pipe.recv()
        rate = measure()
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((rate, peak))


def child(parent: int, function, *arguments) -> None:
    """Call a function in a process that ends with its parent, whatever the function does."""
    from runtime.processes import end_with_parent  # loads torch, as every contender does

    end_with_parent(parent)
    sys.exit(run_and_report(function, *arguments))


@contextmanager
def started(function, *arguments) -> Iterator[multiprocessing.Process]:
    """Call a function in a process of its own, which is killed at the end of the block."""
    process = SPAWN.Process(target=child, args=(os.getpid(), function, *arguments))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run(function, *arguments) -> None:
    """Call a function in a process of its own, which keeps its memory out of this one."""
    with started(function, *arguments) as process:
        process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def multiply() -> None:
    """Keep a core busy with matrix products, as a neighbour on a shared machine would."""
    import torch

    torch.set_num_threads(1)
    matrix = torch.eye(512)
    while True:
        matrix @ matrix


def alternate(table: dict[str, tuple], arguments: tuple, rounds: int) -> dict[str, dict]:
    """Measure every contender of a table `rounds` times, one after the other in each round.

    arguments: passed to every contender. Returns for each its `start_up` (seconds),
    `peak_memory_bytes`, `rates` (examples per second), their median `rate`, and the `ratios` of
    that rate to its rivals' rates. Raises: UserError if a contender's process ended.
    """
    pipes, found = {}, {}
    with ExitStack() as workers:
        for name, (contender, _) in table.items():
            pipes[name], end = SPAWN.Pipe()
            workers.enter_context(started(worker, end, time.time(), contender, arguments))
            end.close()
            found[name] = {"start_up": pipes[name].recv(), "rates": []}
            print(f"{name}: ready after {found[name]['start_up']:.1f} s", flush=True)
        for number in range(rounds + 1):
            for name, pipe in pipes.items():
                try:
                    pipe.send("measure")
                    rate, found[name]["peak_memory_bytes"] = pipe.recv()
                except (BrokenPipeError, EOFError):
                    raise UserError(
                        f"{name} ended, probably out of memory: measure fewer at once (--only)"
                    ) from None
                if number:  # round 0 warms up
                    found[name]["rates"].append(rate)
            print(f"round {number} of {rounds} done", flush=True)
    for name in pipes:
        rate = found[name]["rate"] = statistics.median(found[name]["rates"])
        rivals = [rival for rival in table[name][1] if rival in found]
        found[name]["ratios"] = {rival: rate / found[rival]["rate"] for rival in rivals}
    return found


def format_table(title: str, found: dict[str, dict]) -> str:
    """Format rates, memory, start-up times and ratios as a table."""
    lines = [f"\n{title:28} per s  memory  start-up  ratio"]
    for name, one in found.items():
        ratios = ", ".join(f"{ratio:.2f}x {rival}" for rival, ratio in one["ratios"].items())
        memory = one["peak_memory_bytes"] / 2**30
        lines.append(
            f"{name:28} {one['rate']:5.0f} {memory:5.2f} G  {one['start_up']:5.1f} s   {ratios}"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Draw the rates, one panel per table."""
    import matplotlib.pyplot as plt  # not in the workers, which import this module

    figure, axes = plt.subplots(1, len(results), figsize=(10, 2.8), layout="constrained")
    for axis, (title, found) in zip(axes, results.items(), strict=True):
        colors = ["C0" if name.startswith("ours") else "0.6" for name in found]
        bars = axis.barh(list(found), [one["rate"] for one in found.values()], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.invert_yaxis()
        axis.set(xlabel=f"{title}, examples per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.savefig(path)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("bash script/benchmark.sh", __doc__)
    add = parser.add_argument
    add("--data", **FILE, default="csv/train_simple.csv", help="CSV of the columns text and label")
    add("--steps", type=int, default=STEPS, help="training steps per measurement [%(default)s]")
    add("--texts", type=int, default=2048, help="texts scored per measurement [%(default)s]")
    add("--rounds", type=int, default=5, help="rounds, reported by their median [%(default)s]")
    add("--tokens", type=int, help="tokens of every text; by default those of the data")
    add("--neighbours", type=int, default=0, help="other busy processes [%(default)s]")
    add("--only", nargs="+", default=[""], help="contenders to run, by parts of their names")
    add("--output_dir", **DIR, default="checkpoints/benchmark")
    return run_and_report(compare, parser.parse_args(argv))


def compare(args: Namespace) -> None:
    """Measure the contenders, print the tables, and write the figures and their plot."""
    tuning, scoring = (
        {name: table[name] for name in table if any(part in name for part in args.only)}
        for table in (contenders.TUNING, contenders.SCORING)
    )
    if args.tokens:  # the recipe pads all texts to the same length
        tuning.pop("original recipe", None)
    if contenders.best()[0]:
        scoring = {k: one for k, one in scoring.items() if one[0].func not in contenders.CPU_ONLY}
    results = {}
    with tempfile.TemporaryDirectory() as parent, ExitStack() as neighbours:
        data = args.data
        if args.tokens:
            data = f"{parent}/data.csv"
            run(contenders.fill, args.data, args.tokens, data)
        names = {name for contender, _ in scoring.values() for name in contender.keywords["names"]}
        run(contenders.make_folders, data, parent, names)
        for _ in range(args.neighbours):
            neighbours.enter_context(started(multiply))
        for title, table, arguments in (
            ("tuning", tuning, (data, args.steps)),
            ("scoring distinct texts", scoring, (data, args.texts, parent)),
        ):
            results[title] = alternate(table, arguments, args.rounds)
            print(format_table(title, results[title]), flush=True)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    draw(results, output_dir / "benchmark.svg")
    settings = {name: getattr(args, name) for name in ("data", "tokens", "neighbours", "rounds")}
    figures = {"threads": THREADS, "precision": contenders.best()[1], **settings, **results}
    path = output_dir / "benchmark.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nall figures: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
