"""Simulate power cuts: replay the system calls of a run without what was not synced.

`strace` (apt install strace) records the calls that change an output folder. A cut at a random call
leaves a journalling file system (ext4, xfs, btrfs) with

- the changes of names up to a random one between the last synced folder and the cut, in order;
- of each file, what it contained when it was last synced, or at random what was written since.

From each such folder the run must resume and end with the same bytes. A replay without a cut must
give the real folder, which shows that the simulation misses no call.
"""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import conftest
import killing

CALLS = (
    "openat,write,ftruncate,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,"
    "linkat,symlink,symlinkat,fsync,fdatasync,sendfile,copy_file_range"
)
KINDS = [("full", False), ("prefix", True), ("full", True), ("prefix", False)]
WRITTEN = re.compile(r', (".*"), [0-9]+$')
LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += (\d+)")
RUN = "import sys; sys.path[:0] = ['.', 'tests']; import killing; killing.torch.set_num_threads(1)"
RUN += "; sys.exit(killing.main.main(sys.argv[1:]))"


@dataclass
class File:
    """A file's content, as a reader sees it and as it is on the disk."""

    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


class Disk:
    """Names, and the files behind them; names change in order, contents when they are synced."""

    def __init__(self) -> None:
        self.names: dict[str, File | str | None] = {}  # a file, a link's target, None: a folder

    def load(self, folder: Path) -> None:
        """Start with a folder, all on the disk."""
        self.names["."] = None
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            data = path.read_bytes() if path.is_file() else None
            self.names[name] = None if data is None else File(bytearray(data), data)

    def apply(self, change: tuple) -> None:
        """Change names."""
        kind, name, *rest = change
        if kind == "remove":
            del self.names[name]
        elif kind == "rename":
            self.names[rest[0]] = self.names.pop(name)
            for below in [one for one in self.names if one.startswith(f"{name}/")]:
                self.names[f"{rest[0]}{below.removeprefix(name)}"] = self.names.pop(below)
        else:
            self.names[name] = rest[0]

    def write(self, folder: Path, chance: random.Random | None) -> None:
        """Write everything to a folder; with `chance`, of each file only what is on the disk."""
        for name, what in sorted(self.names.items()):
            path = folder / name
            if what is None:
                path.mkdir(exist_ok=True)
            elif isinstance(what, str):
                path.symlink_to(what)
            elif chance is None or chance.random() < 0.3:
                path.write_bytes(what.content)
            else:
                path.write_bytes(what.synced)


class Replay:
    """The calls of a trace, up to one of them."""

    def __init__(self, before: Path, folder: Path, trace: list[str]) -> None:
        self.before, self.folder, self.trace = before, str(folder), trace

    def until(self, stop: int, chance: random.Random | None, target: Path) -> None:
        """Write to `target` what is left of the folder after a cut before call number `stop`."""
        now, disk = Disk(), Disk()
        now.load(self.before)
        disk.names = dict(now.names)
        changes, synced, opened = [], 0, {}

        def change(*what) -> None:
            now.apply(what)
            changes.append(what)

        for line in self.trace[:stop]:
            call, text, result = LINE.match(line).groups()
            # paths, in quotes or after a descriptor; what lies elsewhere is None
            paths = [self.inside(one) for one in re.findall(r'"((?:[^"\\]|\\.)*)"', text)]
            number = text.split("<")[0]
            if call == "openat":
                name = paths[0]
                if "O_CREAT" in text and name not in now.names:
                    change("create", name, File())
                opened.pop(result, None)
                if isinstance(now.names.get(name), File):
                    file = now.names[name]
                    if "O_TRUNC" in text:
                        file.content.clear()
                    opened[result] = [file, len(file.content) if "O_APPEND" in text else 0]
            elif call == "write" and number in opened:
                put(opened[number], ast.literal_eval("b" + WRITTEN.search(text)[1]))
            elif call in ("sendfile", "copy_file_range") and number in opened:
                source = opened[re.findall(r"(\d+)<", text)[1]]
                put(opened[number], source[0].content[source[1] : source[1] + int(result)])
                source[1] += int(result)
            elif call == "ftruncate" and number in opened:
                size = int(text.split(", ")[-1])
                content = opened[number][0].content
                content[:] = content[:size].ljust(size, b"\0")
            elif call in ("fsync", "fdatasync"):
                name = self.inside(re.search(r"<(.*)>", text)[1])
                what = now.names[name]
                if isinstance(what, File):
                    what.synced = bytes(what.content)
                else:
                    synced = len(changes)
            elif call in ("mkdir", "mkdirat"):
                change("create", paths[-1], None)
            elif call.startswith("symlink"):
                target_text = re.findall(r'"((?:[^"\\]|\\.)*)"', text)[0]
                change("create", paths[-1], target_text)
            elif call.startswith("link"):
                change("create", paths[1], now.names[paths[0]])
            elif call.startswith("rename"):
                change("rename", paths[0], paths[1])
            elif call in ("unlink", "rmdir"):
                change("remove", paths[0])
            elif call == "unlinkat":
                inside = re.search(r"<(.*?)>, \"(.*?)\"", text)
                change("remove", self.inside(os.path.join(inside[1], inside[2])))
        left = len(changes) if chance is None else chance.randint(synced, len(changes))
        for what in changes[:left]:
            disk.apply(what)
        disk.write(target, chance)

    def inside(self, path: str) -> str | None:
        """Return a path relative to the folder; None outside of it."""
        path = os.path.normpath(path)
        if path == self.folder:
            return "."
        below = path.startswith(f"{self.folder}/")
        return path.removeprefix(f"{self.folder}/") if below else None


def put(opened: list, data: bytes) -> None:
    """Write data to an open file, a pair of a File and a position."""
    file, at = opened
    file.content[at : at + len(data)] = data
    opened[1] = at + len(data)


def record(argv: list[str], folder: Path, trace: Path) -> list[str]:
    """Run main under strace; returns the successful calls that concern the folder."""
    strace = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "10000000", "-o", str(trace)]
    strace += ["-e", f"trace={CALLS}"]
    done = subprocess.run(
        [*strace, sys.executable, "-c", RUN, *argv, "--output_dir", str(folder)],
        cwd=conftest.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines, begun = [], {}
    for line in trace.read_text().splitlines():
        process = line.split()[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>")
            continue
        if " resumed>" in line:
            line = begun.pop(process) + line.split(" resumed>", 1)[1]
        if str(folder) in line and LINE.match(line):
            lines.append(line)
    return lines


def cut(
    parent: Path,
    backbone: str,
    files: list[str],
    cuts: int,
    chance: random.Random,
    kinds: Sequence[tuple[str, bool]] = KINDS,
) -> int:
    """Simulate `cuts` power cuts, each followed by a resumed run; returns their number.

    kinds: methods of tuning, and whether such a run replaces the results of an earlier one.
    """
    done, log = 0, parent / "points of power cuts"
    for number, (method, replaces) in enumerate(kinds):
        argv = [*killing.command(backbone, files, method), "--save_steps", "2"]
        argv += ["--overwrite_output_dir", "--resume_from_checkpoint", "auto"]
        before, folder = (parent / f"{name} {number}" for name in ("before", "traced"))
        before.mkdir()
        if replaces:
            old = [*argv, "--seed", "1", "--output_dir", str(before)]
            assert killing.attempt(old, before, None, log) == 0
            shutil.copytree(before, folder)
        trace = record(argv, folder, parent / "trace")
        replay = Replay(before, folder, trace)
        (again := parent / f"replayed {number}").mkdir()
        replay.until(len(trace), None, again)
        assert killing.visible(again) == killing.visible(folder), "the simulation misses a call"
        expected = {
            k: v for k, v in killing.comparable(folder).items() if not k.startswith("checkpoint-")
        }
        old = killing.visible(before)
        while done < cuts * (number + 1) / len(kinds):
            (left := parent / f"cut {done}").mkdir()
            replay.until(chance.randrange(len(trace)), chance, left)
            killing.check_old_or_new(left, old)
            status = killing.attempt([*argv, "--output_dir", str(left)], left, None, log)
            assert status == 0, f"{left}: status {status}"
            killing.check_end(left, expected, checkpoints=False)
            shutil.rmtree(left)
            done += 1
        print(
            f"power cuts: {method}, replacing results: {replaces}, {len(trace)} calls", flush=True
        )
    return done
