"""Compare this project's speed and memory with its rivals' on this machine.

    bash script/benchmark.sh [--data FILE] [--rounds N] [--only NAME...]
    bash script/benchmark.sh --tokens 128 --steps 5 --texts 128 [--neighbours 1]

The rivals are HF Trainer, PEFT, pipeline, OpenVINO and onnxruntime, each in its best precision on
this machine. Each contender has its own process, and they run in turn, one at a time. Prints two
tables, writes all figures to benchmark.json and plots the rates in benchmark.svg.
"""

import resource
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from arguments import DIR, FILE
from runtime.files import UserError, run_and_report
from runtime.flags import Parser
from script.benchmark import contenders
from script.benchmark.processes import SPAWN, started, write_figures

THREADS = 2
STEPS = 50  # one of the groups that the Trainer sorts by length: no contender gets easy lengths


def worker(pipe: Connection, contender, arguments: tuple) -> None:
    """Set up a contender and say so, then measure on request."""
    import torch  # imported here, so that the start-up time includes it

    torch.set_num_threads(THREADS)
    measure = contender(*arguments)
    pipe.send("ready")
    while True:
        pipe.recv()
        rate = measure()
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((rate, peak))


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
    pipes, figures = {}, {}
    with ExitStack() as workers:
        try:
            for name, (contender, _) in table.items():
                start = time.perf_counter()
                pipes[name], end = SPAWN.Pipe()
                workers.enter_context(started(worker, end, contender, arguments))
                end.close()
                pipes[name].recv()
                figures[name] = {"start_up": time.perf_counter() - start, "rates": []}
                print(f"{name}: ready after {figures[name]['start_up']:.1f} s", flush=True)
            for number in range(rounds + 1):
                for name, pipe in pipes.items():
                    pipe.send("measure")
                    rate, figures[name]["peak_memory_bytes"] = pipe.recv()
                    figures[name]["rates"] += [rate] if number else []  # round 0 warms up
                print(f"round {number} of {rounds} done", flush=True)
        except (BrokenPipeError, EOFError):
            raise UserError(
                f"{name} ended, probably out of memory: measure fewer at once (--only)"
            ) from None
    for row in figures.values():
        row["rate"] = statistics.median(row["rates"])
    for name, row in figures.items():
        rivals = [rival for rival in table[name][1] if rival in figures]
        row["ratios"] = {rival: row["rate"] / figures[rival]["rate"] for rival in rivals}
    return figures


def format_table(title: str, figures: dict[str, dict]) -> str:
    """Format rates, memory, start-up times and ratios as a table."""
    lines = [f"\n{title:28} per s  memory  start-up  ratio"]
    for name, row in figures.items():
        ratios = ", ".join(f"{ratio:.2f}x {rival}" for rival, ratio in row["ratios"].items())
        memory = f"{row['peak_memory_bytes'] / 2**30:5.2f} G"
        lines.append(f"{name:28} {row['rate']:5.0f} {memory}  {row['start_up']:5.1f} s   {ratios}")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Draw the rates, one panel per table."""
    import matplotlib.pyplot as plt  # not in the workers, which import this module

    figure, axes = plt.subplots(1, len(results), figsize=(10, 2.8), layout="constrained")
    for axis, (title, rows) in zip(axes, results.items(), strict=True):
        colors = ["C0" if name.startswith("ours") else "0.6" for name in rows]
        bars = axis.barh(list(rows), [row["rate"] for row in rows.values()], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.invert_yaxis()
        axis.set(xlabel=f"{title}, examples per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.savefig(path)


def compare(args: Namespace) -> None:
    """Measure the contenders, print the tables, and write the figures and their plot."""
    on_gpu, precision, _ = contenders.best()
    tuning, scoring = (
        {name: table[name] for name in table if any(part in name for part in args.only)}
        for table in (contenders.TUNING, contenders.SCORING)
    )
    if args.tokens:  # the recipe pads all texts to the same length
        tuning.pop("original recipe", None)
    if on_gpu:
        scoring = {k: row for k, row in scoring.items() if row[0].func not in contenders.CPU_ONLY}
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
            ("scoring distinct texts", scoring, (contenders.distinct(data, args.texts), parent)),
        ):
            results[title] = alternate(table, arguments, args.rounds)
            print(format_table(title, results[title]), flush=True)
    settings = {name: getattr(args, name) for name in ("data", "tokens", "neighbours", "rounds")}
    figures = {"threads": THREADS, "precision": precision, **settings, **results}
    write_figures(args.output_dir, "benchmark.json", figures)
    draw(results, Path(args.output_dir) / "benchmark.svg")


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
