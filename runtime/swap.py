"""Replace some files of a folder by others at once: a reader sees the old or the new ones.

No file system renames many files at once, but any renames one link. So each file is first replaced
by a symbolic link to `unfinished/.current/NAME`, where `.current` leads to a folder with the old
files. Then `.current` is replaced by one that leads to the new files: this is the moment of the
change. At last the files themselves replace their links. After a kill, `settle` restores the old
files or completes the new ones.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from runtime.files import sync

STAGING = "unfinished"  # the subfolder where a run collects its files
# In the project's own subfolder, so that nothing of the user's can have these names.
CURRENT, OLD, NEW, LINK = (f"{STAGING}/.{name}" for name in ("current", "old", "new", "link"))

logger = logging.getLogger(__name__)


def files_of(folder: Path, names: Iterable[str] | None = None) -> set[str]:
    """List the files behind these names, or all, relative to the folder; subfolders are opened."""
    tops = [folder] if names is None else [folder / name for name in names]
    paths = (path for top in tops for path in (top, *top.rglob("*")))
    return {str(path.relative_to(folder)) for path in paths if path.is_file()}


def swap(folder: Path, old: Iterable[str], new: Iterable[str]) -> None:
    """Replace the entries `old` of a folder by the entries `new` of its subfolder `unfinished`.

    The new files must be on the disk already; then a power cut leaves the old or the new ones.
    Raises: OSError if the folder cannot be written to; it still shows the old files.
    """
    old, new = files_of(folder, old), files_of(folder / STAGING, new)
    try:
        point(folder, OLD)
    except OSError:
        logger.warning("warning: no symbolic links in %s: its files change one by one", folder)
        move(folder, folder / STAGING, old | new)
        remove_empty_folders(folder, old)
        return
    try:
        copy_files(folder, old, folder / OLD)
        copy_files(folder / STAGING, new, folder / NEW)
        for name in sorted(old | new):  # links to equal files, and new ones that lead nowhere yet
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            put_link(folder, name, os.path.join(*[".."] * name.count("/"), CURRENT, name))
        sync_folders(folder, old | new)
        point(folder, NEW)
    finally:
        settle(folder)


def copy_files(folder: Path, names: set[str], copy: Path) -> None:
    """Make a folder `copy` with hard links to these files."""
    copy.mkdir()
    for name in sorted(names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, copy / name)
        except OSError:  # a file system without hard links
            shutil.copy2(folder / name, copy / name)
            sync(copy / name)
    sync_folders(copy, names)
    sync(copy.parent)


def point(folder: Path, target: str) -> None:
    """Let all links lead into the subfolder `target`, at once."""
    put_link(folder, CURRENT, Path(target).name)
    sync(folder / STAGING)


def put_link(folder: Path, name: str, target: str) -> None:
    """Replace `folder`/`name` by a symbolic link."""
    os.symlink(target, folder / LINK)
    os.replace(folder / LINK, folder / name)


def settle(folder: Path) -> None:
    """Replace links by the files that they lead to, and remove those that lead nowhere.

    This ends a swap, also one that was interrupted; without one it changes nothing.
    """
    (folder / LINK).unlink(missing_ok=True)
    if (folder / CURRENT).is_symlink():
        names = files_of(folder / OLD) | files_of(folder / NEW)
        links = {name for name in names if (folder / name).is_symlink()}
        move(folder, folder / STAGING / os.readlink(folder / CURRENT), links)
        remove_empty_folders(folder, names)
        (folder / CURRENT).unlink()
        sync(folder / STAGING)
    for copy in (OLD, NEW):
        shutil.rmtree(folder / copy, ignore_errors=True)


def move(folder: Path, source: Path, names: set[str]) -> None:
    """Replace these files by those in `source`, `run.json` last; remove those that it lacks."""
    for name in sorted(names, key=lambda name: (name == "run.json", name)):
        if (source / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, folder / name)
        else:
            (folder / name).unlink()
    sync_folders(folder, names)


def remove_empty_folders(folder: Path, names: set[str]) -> None:
    """Remove the subfolders of these files in which nothing is left."""
    places = {place for name in names for place in Path(name).parents} - {Path()}
    for place in sorted(places, reverse=True):  # the deepest first
        with suppress(OSError):  # something is left
            (folder / place).rmdir()


def sync_folders(folder: Path, names: set[str]) -> None:
    """Flush the folders of these files to the disk."""
    for place in {folder, *((folder / name).parent for name in names)}:
        sync(place)
