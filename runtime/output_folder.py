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
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from runtime import checkpoint
from runtime.files import UserError, read_json, sync, to_json, write_text, writing
from runtime.record import RUN_FILE, read_record, same_run
from runtime.swap import settle, swap

METRICS = "metrics.jsonl"
PROCESS = "process"  # file with the id of the running process, for messages
# Everything that a run may leave in its folder.
OWN_FILE = re.compile(
    r"README\.md|report\.html|(adapter_)?config\.json|(adapter_)?model\.safetensors|"
    r"tokenizer(_config)?\.json|(run|all_results|evaluation)\.json|metrics\.jsonl|"
    r"(validation_)?predictions\.csv|tensorboard|checkpoint-\d+|prefix-\d+"
)
# What else a killed run may leave in `unfinished`; safetensors writes into `.tmp...` first.
PARTIAL_FILE = re.compile(
    r"saving-checkpoint-\d+|[a-z_]+\.(json|html)\.new|README\.md\.new|process|\.tmp\w+"
)
os.umask(UMASK := os.umask(0o022))  # the umask can only be read by setting it

logger = logging.getLogger(__name__)


@contextmanager
def opened(args: Namespace, is_main: bool = True) -> Iterator["OutputFolder"]:
    """Open the output folder of a run, so that a bad path fails at once.

    Processes other than the main one write to a temporary folder.
    """
    path = args.output_dir
    with ExitStack() as stack:
        if not is_main:
            path = stack.enter_context(TemporaryDirectory())
        folder = OutputFolder(path, args.overwrite_output_dir, args.resume_from_checkpoint)
        yield stack.enter_context(folder)


class OutputFolder:
    """Collects the files of one run; `publish` makes them the folder's results."""

    def __init__(self, path: str, overwrite: bool, resume: str | None = None) -> None:
        """Lock the folder for this process; nothing in it changes before `start`.

        Raises: UserError if it is in use, cannot be written to, or contains results, an unfinished
            run or foreign files that must not be replaced.
        """
        self.path, self.overwrite = Path(path), overwrite
        self.staging = self.path / "unfinished"
        inside = bool(resume) and Path(resume).resolve().parent == self.staging.resolve()
        self.auto, self.resumes_here = resume == "auto", resume == "auto" or inside
        try:
            self.created = not self.path.exists()
            self.staging.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"--output_dir {path}: {error.strerror}") from None
        try:
            self.acquire_lock()
        except UserError:
            os.close(self.lock)
            raise
        try:
            remove(self.staging / PROCESS)  # whatever it is: a pipe would be waited for
            (self.staging / PROCESS).write_text(str(os.getpid()))
            settle(self.path)  # a killed process may have left a swap
            self.check()
        except (OSError, UserError) as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise UserError(f"--output_dir {path}: {error.strerror}") from None
            raise

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):  # read-only; or the folder is gone, or not empty
            (self.staging / PROCESS).unlink(missing_ok=True)
            self.staging.rmdir()
            if self.created:  # and nothing was written
                self.path.rmdir()
        os.close(self.lock)

    def acquire_lock(self) -> None:
        """Lock the folder; the kernel releases the lock however the process ends."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                holder = f"process {(self.staging / PROCESS).read_text()}"
            except OSError:
                holder = "another process"
            raise UserError(
                f"{self.path} is in use by {holder}: wait for it, or choose another --output_dir"
            ) from None
        except OSError as error:  # a file system without locks
            raise UserError(f"{self.path} cannot be locked: {error.strerror}") from None

    def check(self) -> None:
        """Reject a folder that contains anything that must not be replaced."""
        self.finished = read_record(self.path / RUN_FILE)
        self.unfinished = read_record(self.staging / RUN_FILE)
        self.earlier = set(filter(OWN_FILE.fullmatch, self.finished.get("files", ())))
        if not self.auto:  # with "auto" the results may be this run's, see `is_finished`
            self.refuse_earlier()
        here = {entry.name for entry in self.path.iterdir()}
        foreign = sorted(filter(OWN_FILE.fullmatch, here - self.earlier))
        foreign += [
            f"unfinished/{entry.name}"
            for entry in self.staging.iterdir()
            if not (OWN_FILE.fullmatch(entry.name) or PARTIAL_FILE.fullmatch(entry.name))
        ]
        if foreign:
            raise UserError(
                f"{self.path} contains files this program did not write: {', '.join(foreign)}; "
                "choose another --output_dir"
            )
        if checkpoint.steps(self.staging) and not (self.overwrite or self.resumes_here):
            raise UserError(
                f"{self.path} contains an unfinished run: resume it with --resume_from_checkpoint "
                "auto, or start over with --overwrite_output_dir"
            )

    def precision(self, choice: str) -> str:
        """Return that of the run to resume, for "auto": measured again, it may differ."""
        earlier = (self.unfinished or self.finished).get("settings", {})
        return earlier.get("precision", choice) if self.auto and choice == "auto" else choice

    def is_finished(self, record: dict) -> bool:
        """Whether the run is to be resumed but its folder already contains all its results.

        If so, leftovers of publishing are removed; another run's unfinished work is kept.
        Raises: UserError if the results belong to another run and must not be replaced.
        """
        if not self.auto:
            return False
        others = bool(self.unfinished) and not same_run(self.unfinished, record)
        complete = all((self.path / name).exists() for name in self.finished.get("files", ()))
        if self.finished and same_run(self.finished, record) and complete:
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
            text = metrics.read_bytes() if metrics and metrics.exists() else None
            for entry in list(self.staging.iterdir()):
                match = checkpoint.NAME.fullmatch(entry.name)
                kept = match and self.resumes_here and resumed and int(match[1]) <= resumed.step
                if kept and not checkpoint.looks_whole(entry):  # perhaps half removed by `prune`
                    logger.warning("warning: removing %s, which is damaged", entry)
                    remove(entry)
                elif not kept and entry.name not in (RUN_FILE, PROCESS):
                    if match and resumed:
                        logger.warning("warning: removing %s, later than the resumed one", entry)
                    remove(entry)
            if text is not None:
                (self.staging / METRICS).write_bytes(text)
        self.write_json(RUN_FILE, {**record, "files": []})

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        write_text(self.staging / name, text)

    def write_json(self, name: str, content: dict) -> None:
        """Write an indented JSON file."""
        self.write_text(name, to_json(content))

    def read_json(self, name: str) -> dict:
        """Read back a JSON file that this run wrote."""
        return read_json(self.staging / name)

    def read_results(self) -> dict:
        """Read the all_results.json of the finished run."""
        return read_json(self.path / "all_results.json")

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
        names = {entry.name for entry in self.staging.iterdir()} - {PROCESS} | {RUN_FILE}
        checkpoints = {name for name in names if checkpoint.NAME.fullmatch(name)}
        names -= set() if keep_checkpoints else checkpoints
        kept = set(filter(checkpoint.NAME.fullmatch, self.earlier - names))
        kept = kept if self.resumed and same_run(self.finished, record) else set()
        self.write_json(RUN_FILE, {**record, "files": sorted(names | kept)})
        with writing(self.path):
            self.sync_staged(names)
            swap(self.path, self.staging, self.earlier - kept, names)
            shutil.rmtree(self.staging)
            sync(self.path)

    def sync_staged(self, names: set[str]) -> None:
        """Flush these staged files to the disk, and give them the usual permissions."""
        for staged in map(self.staging.joinpath, names):
            for path in (staged, *staged.rglob("*")):
                # safetensors creates files that only their owner can read
                if path.is_file() and not path.stat().st_mode & 0o077:
                    path.chmod(0o666 & ~UMASK)
                sync(path)


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


def remove(entry: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
