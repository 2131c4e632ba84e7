"""The output folder: results appear at the end, and only files that this program wrote are removed.

A run writes into the subfolder `unfinished`; at the very end its files replace those of an earlier
run, all at once. `run.json` lists them. A failed run leaves the earlier results unchanged.
"""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runtime import checkpoint
from runtime.files import UserError, read_json, sync, to_json, write_text, writing
from runtime.record import RUN_FILE, read_record, run_differences
from runtime.swap import STAGING, settle, swap

METRICS = "metrics.jsonl"
# Everything that a run may leave in its folder.
OWN_FILE = re.compile(
    r"README\.md|report\.html|(adapter_)?config\.json|(adapter_)?model\.safetensors|"
    r"tokenizer(_config)?\.json|(run|all_results|evaluation)\.json|metrics\.jsonl|"
    r"(validation_)?predictions\.csv|tensorboard|checkpoint-\d+|prefix-\d+"
)
# What else a killed run may leave in `unfinished`; safetensors writes into `.tmp...` first, and
# earlier versions noted their process.
PARTIAL_FILE = re.compile(
    r"saving-checkpoint-\d+|[a-z_]+\.(json|html)\.new|README\.md\.new|process|\.tmp\w+"
)
os.umask(UMASK := os.umask(0o022))  # the umask can only be read by setting it

logger = logging.getLogger(__name__)


@contextmanager
def opened(
    path: str, overwrite: bool = False, resume: str | None = None, is_main: bool = True
) -> Iterator["OutputFolder"]:
    """Open the output folder of a run, so that a bad path fails at once.

    Processes other than the main one write to a temporary folder.
    """
    with nullcontext(path) if is_main else TemporaryDirectory() as place:
        folder = OutputFolder(place, overwrite, resume)
        try:
            yield folder
        finally:
            folder.close()


class OutputFolder:
    """Collects the files of one run; `publish` makes them the folder's results."""

    def __init__(self, path: str, overwrite: bool = False, resume: str | None = None) -> None:
        """Lock the folder for this process; nothing in it changes before `start`.

        Raises: UserError if it is in use, cannot be written to, or contains results, an unfinished
            run or foreign files that must not be replaced.
        """
        self.path, self.overwrite = Path(path), overwrite
        self.staging = self.path / STAGING
        inside = bool(resume) and Path(resume).resolve().parent == self.staging.resolve()
        self.auto, self.resumes_here = resume == "auto", resume == "auto" or inside
        try:
            self.created = not self.path.exists()
            self.staging.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path, os.O_RDONLY)
            self.acquire_lock()
            try:
                settle(self.path)  # a killed process may have left a swap
                self.check()
            except (OSError, UserError):
                self.close()
                raise
        except OSError as error:
            raise UserError(f"--output_dir {path}: {error.strerror}") from None

    def close(self) -> None:
        """Release the folder, and remove it if nothing was written."""
        with suppress(OSError):  # read-only; or the folder is gone, or not empty
            self.staging.rmdir()
            if self.created:
                self.path.rmdir()
        os.close(self.lock)

    def acquire_lock(self) -> None:
        """Lock the folder; the kernel releases the lock however the process ends."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.lock)
            what = f"cannot be locked: {error.strerror}"  # a file system without locks
            if isinstance(error, BlockingIOError):
                what = "is in use by another process: wait for it, or choose another --output_dir"
            raise UserError(f"{self.path} {what}") from None

    def check(self) -> None:
        """Reject a folder that contains anything that must not be replaced."""
        self.finished = read_record(self.path / RUN_FILE)
        self.unfinished = read_record(self.staging / RUN_FILE)
        self.earlier = set(filter(OWN_FILE.fullmatch, self.finished.get("files", ())))
        if not self.auto:  # with "auto" the results may be this run's, see `is_finished`
            self.refuse_earlier()
        foreign = [n for n in set(os.listdir(self.path)) - self.earlier if OWN_FILE.fullmatch(n)]
        foreign += [
            f"{STAGING}/{name}"
            for name in os.listdir(self.staging)
            if not (OWN_FILE.fullmatch(name) or PARTIAL_FILE.fullmatch(name))
        ]
        if foreign:
            raise UserError(
                f"{self.path} contains files this program did not write: "
                f"{', '.join(sorted(foreign))}; choose another --output_dir"
            )
        if checkpoint.steps(self.staging) and not (self.overwrite or self.resumes_here):
            raise UserError(
                f"{self.path} contains an unfinished run: resume it with --resume_from_checkpoint "
                "auto, or start over with --overwrite_output_dir"
            )

    def measured(self, name: str) -> Any:
        """Return a setting of the run to resume, if any: measured again, it may differ."""
        earlier = (self.unfinished or self.finished).get("settings", {})
        return earlier.get(name) if self.auto else None

    def is_finished(self, record: dict) -> bool:
        """Whether the run is to be resumed but its folder already contains all its results.

        If so, leftovers of publishing are removed; another run's unfinished work is kept.
        Raises: UserError if the results belong to another run and must not be replaced.
        """
        if not self.auto:
            return False
        others = bool(self.unfinished and run_differences(self.unfinished, record))
        complete = all((self.path / name).exists() for name in self.finished.get("files", ()))
        if self.finished and complete and not run_differences(self.finished, record):
            if not others:
                shutil.rmtree(self.staging)
            return True
        if not self.unfinished or others:
            self.refuse_earlier()
        return False

    def refuse_earlier(self) -> None:
        """Reject a folder with results that must not be replaced. Raises: UserError."""
        if self.earlier and not self.overwrite:
            raise UserError(
                f"{self.path} contains the results of an earlier run: choose another --output_dir, "
                "or replace them with --overwrite_output_dir"
            )

    def start(self, record: dict, resumed: checkpoint.Checkpoint | None = None) -> None:
        """Remove the leftovers of killed runs, and write the record of this run.

        resumed: the checkpoint to resume from; its metrics are restored. Later checkpoints are
        removed: they are damaged, or the user chose an earlier one.
        """
        self.resumed = resumed is not None
        with writing(self.staging):
            if not resumed and (lost := checkpoint.steps(self.staging)):
                logger.warning(
                    "warning: discarding an unfinished run in %s (saved up to step %d); "
                    "--resume_from_checkpoint auto would have resumed it",
                    self.path,
                    max(lost),
                )
            metrics = resumed.path / METRICS if resumed else None
            lines = metrics.read_bytes() if metrics and metrics.exists() else b""
            for entry in list(self.staging.iterdir()):
                match = resumed and checkpoint.NAME.fullmatch(entry.name)
                earlier = match and self.resumes_here and int(match[1]) <= resumed.state["step"]
                # a damaged one was perhaps half removed by `prune`
                if entry.name == RUN_FILE or (earlier and checkpoint.looks_whole(entry)):
                    continue
                if match:
                    why = "which is damaged" if earlier else "later than the resumed one"
                    logger.warning("warning: removing %s, %s", entry, why)
                (shutil.rmtree if entry.is_dir() else os.unlink)(entry)
            if lines:
                (self.staging / METRICS).write_bytes(lines)
        self.write_json(RUN_FILE, {**record, "files": []})

    def write_json(self, name: str, content: dict) -> None:
        """Write an indented JSON file."""
        write_text(self.staging / name, to_json(content))

    def append_metrics(self, line: dict) -> None:
        """Append a line to metrics.jsonl."""
        path = self.staging / METRICS
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict]:
        """Read the lines that this run has appended to metrics.jsonl."""
        return read_json(self.staging / METRICS, lines=True)

    def copy_metrics(self, folder: Path) -> None:
        """Copy metrics.jsonl into a checkpoint."""
        if (self.staging / METRICS).exists():
            shutil.copyfile(self.staging / METRICS, folder / METRICS)

    def publish(self, record: dict, keep_checkpoints: bool = False) -> None:
        """Replace an earlier run's files with this run's; `record` becomes run.json.

        The folder shows the earlier files or the new ones at any time, see `runtime.swap`. A run
        that is killed before the change can publish again; afterwards it is complete. If a
        finished run was resumed, its checkpoints stay, unless new ones replace them.

        Raises: UserError if the folder cannot be written to; the new files stay in `unfinished`.
        """
        is_checkpoint, kept = checkpoint.NAME.fullmatch, set()
        names = set(os.listdir(self.staging))
        if not keep_checkpoints:
            names -= set(filter(is_checkpoint, names))
        if self.resumed and not run_differences(self.finished, record):
            kept = set(filter(is_checkpoint, self.earlier - names))
        self.write_json(RUN_FILE, {**record, "files": sorted(names | kept)})
        with writing(self.path):
            for staged in map(self.staging.joinpath, names):
                for path in (staged, *staged.rglob("*")):
                    # safetensors creates files that only their owner can read
                    if path.is_file() and not path.stat().st_mode & 0o077:
                        path.chmod(0o666 & ~UMASK)
                    sync(path)
            swap(self.path, self.earlier - kept, names)
            shutil.rmtree(self.staging)
            sync(self.path)


def recorder(output: OutputFolder, report_to: str) -> Callable[[dict], None]:
    """Return a function that appends a line to metrics.jsonl and, if requested, to TensorBoard."""
    if report_to == "none":
        return output.append_metrics
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    board = SummaryWriter(output.staging / "tensorboard")

    def show(line: dict) -> None:
        for name, value in line.items():
            if name != "step":
                board.add_scalar(name, value, line["step"])
        board.flush()

    for line in output.read_metrics():  # earlier lines of a resumed run
        show(line)

    def record(line: dict) -> None:
        output.append_metrics(line)
        show(line)

    return record
