"""Kill a small training again and again, resume it until it has finished, and compare the results.

    .venv/bin/python -m tests.killing --kills 300

Each attempt is a forked child that calls `main.main`, so it takes a fraction of a second. It is
killed by SIGKILL at a random time, as soon as the folder of an unfinished checkpoint exists, or
before a file operation drawn at random.
"""

# ruff: noqa: E402 - the path is set before the project is imported

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch

import conftest
import dataset  # noqa: F401 - everything is imported here once, not in each child
import main
import trainer  # noqa: F401
from evaluation import pages, tables  # noqa: F401
from model import prefix_bank  # noqa: F401

TIMES = set(
    "samples_per_second eta_seconds train_runtime train_samples_per_second peak_memory_bytes "
    "predict_samples_per_second".split()
)
OPERATIONS = set("open os.mkdir os.rename os.remove os.rmdir shutil.rmtree shutil.copyfile".split())
SMALL_PREFIX = "--prefix --pre_seq_len 3"
METHODS = {
    "full": "--save_steps 1",
    "prefix": f"{SMALL_PREFIX} --save_steps 1",
    "probe": "--tuning_method probe --save_steps 1",
    "bias": "--tuning_method bias --save_steps 1",
    "full, defaults of saving": "",
    "prefix, one kept, bfloat16": f"{SMALL_PREFIX} --save_steps 1 --save_total_limit 1 "
    "--precision bf16",
    "full, stopped early": "--early_stopping_patience 1 --learning_rate 1e-9 --save_steps 2",
}

# These contain times, folders or commands.
NOT_COMPARED = ("run.json", "README.md", "report.html", "state.json", "manifest.json")


def comparable(folder: Path) -> dict[str, object]:
    """Return what must not change: the contents of all files, without times."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name in ("metrics.jsonl", "all_results.json"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            parsed = [json.loads(line) for line in lines]
            found[name] = [{k: v for k, v in p.items() if k not in TIMES} for p in parsed]
        elif path.name not in NOT_COMPARED:
            found[name] = path.read_bytes()
    return found


def holds(folder: Path, start: str) -> bool:
    """Return whether an unfinished run has a file named `start`...; it may finish at any time."""
    try:
        return any(name.startswith(start) for name in os.listdir(folder / "unfinished"))
    except FileNotFoundError:
        return False


def attempt(argv: list[str], folder: Path, death: tuple[str, float] | None) -> int:
    """Run main in a child that `death` (kind and number) kills; returns its wait status."""
    child = os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if death and death[0] == "operation":
            left = [int(death[1])]

            def die_before(event: str, arguments: tuple) -> None:
                if event in OPERATIONS and str(folder) in str(arguments[0]):
                    left[0] -= 1
                    if left[0] <= 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(die_before)
        status = 1
        try:
            status = main.main(argv)
        finally:
            os._exit(status)
    if death and death[0] == "time":
        time.sleep(death[1])
        os.kill(child, signal.SIGKILL)
    if death and death[0] == "staging":
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if holds(folder, "saving-"):
                time.sleep(death[1])
                os.kill(child, signal.SIGKILL)
                return os.waitpid(child, 0)[1]
        return ended[1]
    return os.waitpid(child, 0)[1]


def kill_until_done(argv: list[str], folder: Path, chance: random.Random, kills: int) -> Counter:
    """Kill a run up to `kills` times, then let it finish. Counts kills by kind, and resumptions."""
    counts: Counter = Counter()
    again = [*argv, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    for _ in range(kills):
        kind = chance.choice(["time", "staging", "operation", "operation"])
        sizes = {"time": chance.uniform(0, 0.6), "staging": chance.uniform(0, 0.01)}
        size = (sizes | {"operation": chance.randrange(1, 60)})[kind]
        counts["resumptions"] += holds(folder, "checkpoint-")
        status = attempt(again, folder, (kind, size))
        if os.WIFSIGNALED(status):
            counts[f"killed by {kind}"] += 1
            counts["kills"] += 1
        elif status:
            raise AssertionError(f"an attempt after {dict(counts)} ended with status {status}")
        else:
            counts["ended before the kill"] += 1
            break
    else:
        assert attempt(again, folder, None) == 0
    assert attempt(again, folder, None) == 0  # a finished run stays finished
    return counts


def check_end(folder: Path, expected: dict[str, object]) -> None:
    """Check a folder. Raises: AssertionError naming missing, extra and different files."""
    found = comparable(folder)
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    assert not names, f"{folder} differs in {', '.join(names)}"


def command(backbone: str, files: list[str], method: str) -> list[str]:
    """Return the arguments of a small run with all the state that resuming must restore."""
    flags = (
        "--do_train --do_eval --do_predict --num_train_epochs 3 --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 2 --hidden_dropout_prob 0.1 --precision fp32 "
        f"--max_seq_length 16 --logging_steps 2 {METHODS[method]}"
    )
    return [*flags.split(), *files, "--model_name_or_path", backbone]


def hundreds() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as parent:
        backbone = conftest.make_backbone(Path(parent) / "backbone")
        files = conftest.make_files(Path(parent))
        for method in METHODS:
            argv = command(backbone, files, method)
            assert attempt([*argv, "--output_dir", f"{parent}/{method}"], Path(parent), None) == 0
            expected = comparable(Path(parent) / method)
            counts: Counter = Counter()
            while counts["kills"] < args.kills / len(METHODS):
                folder = Path(tempfile.mkdtemp(dir=parent))
                counts += kill_until_done(argv, folder, chance, chance.randrange(1, 30))
                check_end(folder, expected)
                counts["byte-equal ends"] += 1
            print(method, dict(sorted(counts.items())), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    hundreds()
