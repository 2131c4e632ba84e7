"""Kill a small training again and again, resume it until it has finished, and compare the results.

    .venv/bin/python -m tests.killing --kills 2000 --seed 0 --power_cuts 200

Each attempt is a forked child that calls `main.main`, so it takes a fraction of a second. How it
dies, and every flag that may change between attempts, is drawn at random. Half of the runs replace
the results of an earlier run; then a reader must see the old or the new results at any time.
Power cuts are simulated by tests/power.py.
"""

# ruff: noqa: E402 - the path is set before the project is imported

import json
import os
import random
import resource
import shutil
import signal
import socket
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
from runtime.flags import Parser
from runtime.processes import STOPS, end_with_parent

TIMES = set(
    "samples_per_second eta_seconds train_runtime train_samples_per_second peak_memory_bytes "
    "predict_samples_per_second".split()
)
# Audit events of file operations: a process is killed before one of them. Python has none for
# fsync, see `audited_fsync`.
OPERATIONS = set(
    "open os.mkdir os.rename os.remove os.rmdir os.link os.symlink os.chmod shutil.rmtree "
    "shutil.copyfile killing.fsync".split()
)
SMALL_PREFIX = "--prefix --pre_seq_len 3"
METHODS = {
    "full": "",
    "prefix": SMALL_PREFIX,
    "probe": "--tuning_method probe",
    "bias": "--tuning_method bias",
    "lora": "--tuning_method lora --lora_r 2",
    "two prefixes": f"{SMALL_PREFIX} --num_prefixes 2",
    "projected prefix": f"{SMALL_PREFIX} --prefix_projection --prefix_hidden_size 4",
    "input prefix, bfloat16": f"{SMALL_PREFIX} --prefix_depth input --precision bf16",
    "full, stopped early": "--early_stopping_patience 1 --learning_rate 1e-9",
    "full, two processes": "",
}
# Flags that may change from attempt to attempt without a change of the results.
SAVING = [
    "",
    "--save_steps 1",
    "--save_steps 2 --save_total_limit 1",
    "--save_steps 1 --save_total_limit 2",
    "--save_strategy epoch",
    "--save_strategy no",
]
LATE = ("swap.settle", "swap.move", "swap.remove_empty_folders", "output_folder.is_finished")
# A checkpoint that cannot be written is removed.
ON_FULL_DISK = ("checkpoint.write: os.rmdir", "checkpoint.write: shutil.rmtree")
ENOUGH = 20  # kills before each kind of file operation
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


# -------------------------------------------------------------------------------- one attempt


def kill_point(event: str) -> str:
    """Name a file operation by the function of the project that is about to do it."""
    frame, others = sys._getframe(2), (f"{conftest.ROOT}/tests/", f"{conftest.ROOT}/.venv/")
    while frame and (
        not frame.f_code.co_filename.startswith(f"{conftest.ROOT}/")
        or frame.f_code.co_filename.startswith(others)
    ):
        frame = frame.f_back
    if frame is None:
        return f"a library: {event}"
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}: {event}"


def watch_operations(folder: Path, log: Path, act) -> None:
    """Call `act` before each file operation in a folder, with its name; note all names in `log`."""
    seen, usual = set(), os.fsync

    def audited_fsync(descriptor: int) -> None:
        sys.audit("killing.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        usual(descriptor)

    def note(event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or str(folder) not in str(arguments):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        point = kill_point(event.removeprefix("killing."))
        if point not in seen:
            seen.add(point)
            limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)  # the disk is not full for us
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            os.write(names, f"{point}\n".encode())
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        act(point)

    os.fsync = audited_fsync
    names = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sys.addaudithook(note)


def fork_main(
    argv: list[str], folder: Path, death: tuple | None, log: Path, said=os.devnull, **env: str
) -> int:
    """Run main in a child, which `death` may end from within; returns its process id.

    said: the file to which it appends what it prints.
    """
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    status = 1
    try:
        end_with_parent(parent)
        os.environ |= env
        sink = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        # pytest's own streams are files, which cannot grow on a full disk
        sys.stdout = sys.stderr = open(said, "a")  # noqa: SIM115
        watch_operations(folder, log, arm(death))
        status = main.main(argv)
    except SystemExit as error:
        status = error.code
    except KeyboardInterrupt:  # a second one; Python itself would end by the signal
        status = 130
    finally:
        sys.stdout.flush()
        os._exit(status)


def attempt(
    argv: list[str], folder: Path, death: tuple | None, log: Path, said=os.devnull, **env: str
) -> int:
    """Run main in a child that `death` (kind and details) ends; returns its wait status."""
    child = fork_main(argv, folder, death, log, said, **env)
    if death and death[0] in ("time", "signal"):
        time.sleep(death[1])
        for number in death[2]:
            os.kill(child, number)
            time.sleep(0.001)
    if death and death[0] == "staging":
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if holds(folder, "saving-"):
                time.sleep(death[1])
                os.kill(child, signal.SIGKILL)
                break
        else:
            return ended[1]
    return os.waitpid(child, 0)[1]


def arm(death: tuple | None):
    """Return the function that a child calls before each file operation."""
    kind, *details = death or ("none",)
    left = [details[-1]] if kind in ("point", "disk") else [0]

    def act(point: str) -> None:
        if kind == "point" and details[0] in ON_FULL_DISK and point == "checkpoint.write: os.mkdir":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        if kind == "point" and point == details[0]:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        if kind == "disk":  # files cannot grow beyond a limit, as if the disk were full
            left[0] -= 1
            if left[0] == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (details[0], resource.RLIM_INFINITY))

    return act


def ranks() -> list[dict[str, str]]:
    """Return the variables that torchrun would set for each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [env | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def attempt_together(
    argv: list[str], folder: Path, death: tuple | None, log: Path, said=os.devnull
) -> int:
    """Run main in two processes; `death` is for the first, the second ends as under torchrun."""
    first, env = ranks()
    second = fork_main(argv, folder, None, log, said, **env)
    status = attempt(argv, folder, death, log, said, **first)
    deadline = time.monotonic() + 1
    while os.waitpid(second, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(second, signal.SIGKILL)
            os.waitpid(second, 0)
            break
        time.sleep(0.005)
    return status


# ---------------------------------------------------------------------------------- many kills


class Points:
    """The kill points seen so far, and how often a process was killed at each."""

    def __init__(
        self, log: Path, hits: Counter | None = None, aim: list[str] | None = None
    ) -> None:
        self.aim = aim
        self.log, self.hits = log, Counter() if hits is None else hits
        self.missed: Counter = Counter()

    def draw(self, chance: random.Random, late: bool) -> str | None:
        """Draw one of the points that were hit least; late: those that end an interrupted swap."""
        known = sorted(set(self.log.read_text().splitlines())) if self.log.exists() else []
        for name in known:
            self.hits.setdefault(name, 0)
        if self.aim:
            return chance.choice(self.aim)
        if late:
            known = [name for name in known if name.startswith(LATE)] or known
        chance.shuffle(known)
        return min(
            known[: max(3, len(known) // 2)],
            key=lambda name: self.hits[name] + self.missed[name] / 2,
            default=None,
        )

    def report(self) -> str:
        """Say how many points are covered, and which are not."""
        few = {name: count for name, count in self.hits.items() if count < ENOUGH}
        return (
            f"kill points hit {ENOUGH} times or more: {len(self.hits) - len(few)} of "
            f"{len(self.hits)}; the others: {few or 'none'}"
        )


def draw_death(chance: random.Random, points: Points, late: bool) -> tuple:
    """Draw how an attempt ends."""
    kind = chance.choices(["time", "staging", "signal", "disk", "point"], [1, 1, 1, 1, 6])[0]
    point = points.draw(chance, late)
    if kind == "point" and point:
        first = late or point in ON_FULL_DISK
        return "point", point, 1 if first else chance.choice([1, 1, 2, 3, 5])
    if kind == "signal":
        stop = chance.choice(STOPS)
        return "signal", chance.uniform(0, 0.5), chance.choice([[stop], [stop, stop]])
    if kind == "disk":
        return "disk", chance.choice([0, 10, 3000, 20_000]), chance.randrange(1, 80)
    if kind == "staging":
        return "staging", chance.uniform(0, 0.01)
    return "time", chance.uniform(0, 0.6), [signal.SIGKILL]


def kill_until_done(
    argv: list[str],
    folder: Path,
    chance: random.Random,
    kills: int,
    points: Points,
    start=attempt,
) -> Counter:
    """Kill a run up to `kills` times, then let it finish. Counts kills by kind, and resumptions."""
    counts: Counter = Counter()
    argv = [*argv, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    argv += ["--overwrite_output_dir"]
    old = visible(folder)
    for _ in range(kills):
        changed = visible(folder).get("run.json") != old.get("run.json")
        death = draw_death(
            chance, points, changed or (folder / "unfinished" / ".current").is_symlink()
        )
        counts["resumptions"] += holds(folder, "checkpoint-")
        flags = chance.choice(SAVING).split()
        status = start([*argv, *flags], folder, death, points.log)
        check_old_or_new(folder, old)
        code = os.waitstatus_to_exitcode(status)
        if death[0] == "point":
            (points.hits if code == -9 else points.missed)[death[1]] += 1
        if code == 0:
            counts["ended before the kill"] += 1
            break
        expected = {"disk": (2,), "signal": (143, 130, 129, -15, -2, -1)}.get(death[0], (-9,))
        expected += (1,) if start is attempt_together else ()  # the other process was lost
        if death[0] == "point" and death[1] in ON_FULL_DISK and code == 2:
            continue  # the disk was full elsewhere
        assert code in expected, f"{death} after {dict(counts)}: status {code}"
        counts["full disk" if death[0] == "disk" else f"killed by {death[0]}"] += 1
        counts["kills"] += death[0] != "disk"
    else:
        assert start([*argv, *SAVING[0].split()], folder, None, points.log) == 0
    assert start([*argv, *SAVING[0].split()], folder, None, points.log) == 0  # it stays finished
    return counts


def visible(folder: Path) -> dict[str, bytes]:
    """Read what a reader of the results sees: all files but hidden and unfinished ones."""
    names = os.listdir(folder) if folder.is_dir() else ()
    names = [name for name in names if not name.startswith(".") and name != "unfinished"]
    paths = (path for name in names for path in (folder / name, *(folder / name).rglob("*")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def check_old_or_new(folder: Path, old: dict[str, bytes]) -> None:
    """Check that a reader sees the old results, or all of the new ones and nothing else."""
    now = visible(folder)
    if now != old:
        listed = json.loads(now["run.json"])["files"]
        shown = {name.split("/")[0] for name in now}
        assert shown == set(listed), f"{folder} shows a mixture: {shown ^ set(listed)}"
        assert all(now[n] != data for n, data in old.items() if n == "predictions.csv")


def check_end(folder: Path, expected: dict[str, object], checkpoints: bool = True) -> None:
    """Check a folder. Raises: AssertionError naming missing, extra and different files.

    checkpoints: False if it does not matter which checkpoints are kept.
    """
    found = comparable(folder)
    if not checkpoints:
        found = {k: v for k, v in found.items() if not k.startswith("checkpoint-")}
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    assert not names, f"{folder} differs in {', '.join(names)}"


def command(backbone: str, files: list[str], method: str) -> list[str]:
    """Return the arguments of a small run with all the state that resuming must restore."""
    flags = (
        "--do_train --do_eval --do_predict --num_train_epochs 3 --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 2 --hidden_dropout_prob 0.1 "
        f"--max_seq_length 16 --logging_steps 2 {METHODS[method]}"
    )
    precision = [] if "--precision" in flags else ["--precision", "fp32"]
    return [*flags.split(), *precision, *files, "--model_name_or_path", backbone]


def thousands() -> None:
    """Run from the command line."""
    parser = Parser("python -m tests.killing", __doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--aim", nargs="+", metavar="POINT", help="kill only at these points")
    parser.add_argument("--power_cuts", type=int, default=0, help="needs strace")
    args = parser.parse_args()
    begin, chance, total = time.perf_counter(), random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as parent:
        parent = Path(parent)
        backbone = conftest.make_backbone(parent / "backbone")
        files = conftest.make_files(parent)
        hits: Counter = Counter()
        for number, method in enumerate(METHODS):
            start = attempt_together if "two processes" in method else attempt
            argv, (whole, old) = command(backbone, files, method), (parent / method, parent / "old")
            shutil.rmtree(old, ignore_errors=True)
            points = Points(parent / f"points of {method}", hits, args.aim)
            assert start([*argv, "--output_dir", str(whole)], whole, None, points.log) == 0
            again = [*argv, "--seed", "1", "--output_dir", str(old), "--save_strategy", "epoch"]
            assert start(again, old, None, points.log) == 0
            expected, counts = comparable(whole), Counter()
            while total["kills"] + counts["kills"] < args.kills * (number + 1) / len(METHODS):
                folder = Path(tempfile.mkdtemp(dir=parent))
                if chance.random() < 0.5:
                    shutil.copytree(old, folder, dirs_exist_ok=True)
                kills = chance.randrange(1, 30)
                counts += kill_until_done(argv, folder, chance, kills, points, start)
                check_end(folder, expected, checkpoints=False)
                shutil.rmtree(folder)
                counts["byte-equal ends"] += 1
            print(method, dict(sorted(counts.items())), flush=True)
            total += counts
        if args.power_cuts:
            import power

            total["power cuts"] = power.cut(parent, backbone, files, args.power_cuts, chance)
    print(points.report())
    print(
        f"seed {args.seed}: {total['kills']} kills, {total['full disk']} full disks, "
        f"{total['power cuts']} power cuts, {total['resumptions']} resumptions, "
        f"{total['byte-equal ends']} finished runs, all identical byte for byte; "
        f"{time.perf_counter() - begin:.0f} s"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    thousands()
