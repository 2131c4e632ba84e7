"""Compare this project's speed and memory with its rivals' on this machine.

    bash script/benchmark.sh [--data FILE] [--rounds N] [--only NAME...] [--neighbours N]
    bash script/benchmark.sh --whole_runs DIR [--rounds N] [--only NAME...]

The rivals are HF Trainer, PEFT, pipeline, OpenVINO and onnxruntime, each in its best precision on
this machine. Each contender has its own process, and they run in turn, one at a time. Prints three
tables and writes all figures to benchmark.json.

--whole_runs compares what a user waits for instead: whole runs on the three split files of a
folder, with evaluation. Writes whole_runs.json.
"""

import resource
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack
from pathlib import Path

from runtime.files import UserError, run_and_report
from runtime.flags import DIR, FILE, Parser
from script.benchmark import contenders
from script.benchmark.contenders import Contender, Measure
from script.benchmark.processes import format_table, started, worker, write_figures
from script.benchmark.scoring import SCORING, SINGLE

THREADS = 2
STEPS = 50  # one of the groups that the Trainer sorts by length: no contender gets easy lengths
COLUMNS = {
    "per s": lambda row: f"{row['rate']:.0f}",
    "memory": lambda row: f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
    "ratio": lambda row: ", ".join(f"{x:.2f}x {name}" for name, x in row["ratios"].items()),
}
RUN_COLUMNS = {
    "seconds": lambda row: f"{row['seconds']:.0f}",
    "validation": lambda row: f"{row['eval_accuracy']:.4f}",
    "test": lambda row: f"{row['test_accuracy']:.4f}",
}
measures: list[Measure] = []  # of this process: that of its contender


def set_up(contender: Callable[..., Measure], arguments: tuple) -> None:
    """Set up the contender of this process."""
    import torch

    torch.set_num_threads(THREADS)
    measures[:] = [contender(*arguments)]


def measure() -> tuple[float | dict, int]:
    """Measure the contender of this process: see `Measure`, and peak memory in bytes."""
    import torch

    rate = measures[0]()
    if torch.cuda.is_available():
        return rate, torch.cuda.max_memory_allocated()
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def multiply() -> None:
    """Keep a core busy with matrix products, as a neighbour on a shared machine would."""
    import torch

    torch.set_num_threads(1)
    matrix = torch.eye(512)
    while True:
        matrix @ matrix


def alternate(
    table: dict[str, Contender], arguments: tuple, parent: str, rounds: int
) -> dict[str, dict]:
    """Measure every contender of a table `rounds` times, one after the other in each round.

    arguments: passed to every contender, with the folders of its models in `parent`. Returns for
    each its `peak_memory_bytes`, `rates` (examples per second), their median `rate`, and the
    `ratios` of that rate to its rivals' rates. Raises: UserError if a contender's process ended.
    """
    workers, figures = {}, {}
    with ExitStack() as stack:
        try:
            for name, contender in table.items():
                workers[name] = stack.enter_context(worker())
                folders = [f"{parent}/{model}" for model in contender.models]
                workers[name].submit(set_up, contender.set_up, (*arguments, folders)).result()
                figures[name] = {"rates": []}
                print(f"{name}: ready", flush=True)
            for number in range(rounds + 1):
                for name, process in workers.items():
                    rate, figures[name]["peak_memory_bytes"] = process.submit(measure).result()
                    figures[name]["rates"] += [rate] if number else []  # round 0 warms up
                print(f"round {number} of {rounds} done", flush=True)
        except BrokenExecutor:
            raise UserError(
                f"{name} ended, probably out of memory: measure fewer at once (--only)"
            ) from None
    for name, row in figures.items():
        row["rate"] = statistics.median(row["rates"])
        rivals = [rival for rival in table[name].rivals if rival in figures]  # listed above it
        row["ratios"] = {rival: row["rate"] / figures[rival]["rate"] for rival in rivals}
    return figures


def whole_runs(args: Namespace, parent: str, about: dict) -> None:
    """Time whole runs, one after the other in each round; writes the figures after each.

    They are medians, with the `runs` behind them. about: is written, too.
    """
    figures: dict[str, dict] = {}
    for number in range(args.rounds):
        for name, contender in contenders.WHOLE.items():
            if any(part in name for part in args.only):
                arguments = (args.whole_runs, [f"{parent}/{model}" for model in contender.models])
                with worker() as process:
                    process.submit(set_up, contender.set_up, arguments).result()
                    found, memory = process.submit(measure).result()
                row = figures.setdefault(name, {"runs": []})
                row["runs"].append(found | {"peak_memory_bytes": memory})
                row |= {key: statistics.median(run[key] for run in row["runs"]) for key in found}
                print(f"round {number + 1} of {args.rounds}, {name}: done", flush=True)
                write_figures(args.output_dir, "whole_runs.json", about | figures)
    print("", format_table(figures, RUN_COLUMNS), sep="\n")


def compare(args: Namespace) -> None:
    """Measure the contenders, print the tables, and write the figures."""
    on_gpu, precision, _ = contenders.best()
    if args.whole_runs:
        data = f"{args.whole_runs}/{contenders.FILES['train']}"
        with tempfile.TemporaryDirectory() as parent:
            with worker() as process:
                process.submit(contenders.make_models, data, Path(parent), set()).result()
            return whole_runs(args, parent, {"threads": THREADS, "precision": precision})
    tuning, scoring, single = (
        {name: table[name] for name in table if any(part in name for part in args.only)}
        for table in (contenders.TUNING, SCORING, SINGLE)
    )
    if on_gpu:  # the engines that are pinned here compute on the CPU
        parts = ("OpenVINO", "onnxruntime", "int8")
        scoring = {k: row for k, row in scoring.items() if not any(part in k for part in parts)}
    models = {model for row in scoring.values() for model in row.models}
    texts, results = contenders.distinct(args.data, args.texts), {}
    with tempfile.TemporaryDirectory() as parent, ExitStack() as neighbours:
        with worker() as process:  # keeps its memory out of this process
            process.submit(contenders.make_models, args.data, Path(parent), models).result()
        for _ in range(args.neighbours):
            neighbours.enter_context(started(multiply))
        for title, table, arguments in (
            ("tuning", tuning, (args.data, args.steps)),
            ("scoring distinct texts", scoring, (texts,)),
            ("scoring one text at a time, on one thread", single, (texts,)),
        ):
            results[title] = alternate(table, arguments, parent, args.rounds)
            print(f"\n{title}", format_table(results[title], COLUMNS), sep="\n", flush=True)
    settings = {name: getattr(args, name) for name in ("data", "neighbours", "rounds")}
    figures = {"threads": THREADS, "precision": precision, **settings, **results}
    write_figures(args.output_dir, "benchmark.json", figures)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("bash script/benchmark.sh", __doc__)
    add = parser.add_argument
    add("--data", **FILE, default="csv/train_simple.csv", help="CSV of the columns text and label")
    add("--whole_runs", **DIR, help="time whole runs on this folder's split files instead")
    add("--steps", type=int, default=STEPS, help="training steps per measurement [%(default)s]")
    add("--texts", type=int, default=2048, help="texts scored per measurement [%(default)s]")
    add("--rounds", type=int, default=5, help="rounds, reported by their median [%(default)s]")
    add("--neighbours", type=int, default=0, help="other busy processes [%(default)s]")
    add("--only", nargs="+", default=[""], help="contenders to run, by parts of their names")
    add("--output_dir", **DIR, default="checkpoints/benchmark")
    return run_and_report(compare, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
