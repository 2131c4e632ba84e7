"""Load and check the config, tokenizer and weights of a BERT."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from model.bert import ACTIVATIONS, quiet, read_weights
from model.sequence_classification import POOLINGS, BertForSequenceClassification
from runtime.files import UserError, read_json

WEIGHTS = "model.safetensors"
TUNED = ["BertForSequenceClassification"]  # `architectures` of a model with a head
CAPITALS = 0.01  # share of words with capitals, from which on a vocabulary is cased

Size = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class BertSettings(TypedDict, total=False):
    """The entries of config.json that this program uses, with what they can be."""

    model_type: str
    architectures: list[str] | None
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    type_vocab_size: Size
    hidden_act: Literal[ACTIVATIONS]
    hidden_dropout_prob: Share
    attention_probs_dropout_prob: Share
    classifier_dropout: Share | None
    initializer_range: Annotated[float, Meta(gt=0, le=10)]
    layer_norm_eps: Annotated[float, Meta(gt=0, lt=1)]
    pad_token_id: Annotated[int, Meta(ge=0)] | None
    position_embedding_type: Literal["absolute"]
    is_decoder: Literal[False]
    add_cross_attention: Literal[False]
    quantization_config: None
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None
    num_labels: Annotated[int, Meta(ge=1, le=1_000_000)]
    id2label: Annotated[dict[str, str], Meta(min_length=1)] | None
    max_seq_length: Annotated[int, Meta(ge=3)] | None
    backbone_sha256: str | None
    backbone_path: str | None
    pooling: Literal[tuple(POOLINGS)]
    num_prefixes: Size


class TokenizerSettings(TypedDict, total=False):
    """The entries of tokenizer_config.json and tokenizer.json that are read here."""

    do_lower_case: Any
    normalizer: dict[str, Any] | None


def read_config(folder: Path) -> BertConfig:
    """Read the config of a BERT. Raises: UserError if it is invalid or for another model type.

    Entries that are not in `BertSettings` are left out, since they do not change what is computed.
    """
    path = folder / "config.json"
    kind = read_json(path).get("model_type")
    if kind != "bert":
        raise UserError(f"{folder} has a model of type '{kind}': only 'bert' is supported")
    settings = read_json(path, BertSettings)
    names, count = settings.pop("id2label", None), settings.pop("num_labels", None)
    del settings["model_type"]
    config = BertConfig(**settings)
    if names is None:
        config.num_labels = count or config.num_labels
    else:
        labels = [names.get(str(number)) for number in range(len(names))]
        if None in labels or len(set(labels)) < len(labels) or count not in (None, len(labels)):
            raise UserError(f"{path}: id2label must give 0, 1, 2, ... one name each, all different")
        set_labels(config, labels)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    if (config.pad_token_id or 0) >= config.vocab_size:
        raise UserError(f"{path}: pad_token_id {config.pad_token_id} is not below vocab_size")
    return config


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file. Raises: UserError if it is missing or unreadable."""
    if not path.is_file():
        raise UserError(conversion(path))
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def conversion(path: Path) -> str:
    """Return that weights are missing, with a command that makes them from other files, if any."""
    folder, stem, load = path.parent, path.stem, "torch.load(f, weights_only=True)"
    loads = {f"{stem}-*.safetensors": "safetensors.torch.load_file(f)"}
    loads |= {f"{stem}*.bin": load, f"pytorch_{stem}*.bin": load}
    pattern = next((pattern for pattern in loads if any(folder.glob(pattern))), None)
    if pattern is None:
        return f"{folder} has no {path.name}: copy the whole folder, or pass another model"
    return (
        f"{folder} has its weights as {pattern}, which is not read; to convert them: "
        f'cd {shlex.quote(str(folder))} && python -c "import glob, safetensors.torch, torch; '
        f"safetensors.torch.save_file({{k: v.contiguous().clone() for f in "
        f"glob.glob('{pattern}') for k, v in {loads[pattern]}.items()}}, '{path.name}', "
        "{'format': 'pt'})\""
    )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of weights, by their names in a classifier. Raises: UserError."""
    with opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    backbone = ("embeddings.", "encoder.", "pooler.")
    return {"bert." * name.startswith(backbone) + name: shape for name, shape in shapes.items()}


def check_shapes(folder: Path, config: BertConfig) -> None:
    """Check the sizes in a config before memory is allocated for them.

    Raises: UserError naming an entry of config.json that does not fit model.safetensors.
    """
    shapes, layers = read_shapes(folder / WEIGHTS), config.num_hidden_layers
    sizes = {
        "embeddings.word_embeddings": config.vocab_size,
        "embeddings.position_embeddings": config.max_position_embeddings,
        "embeddings.token_type_embeddings": config.type_vocab_size,
        f"encoder.layer.{layers - 1}.intermediate.dense": config.intermediate_size,
    }
    for name, size in sizes.items():
        shape, right = shapes.get(f"bert.{name}.weight"), (size, config.hidden_size)
        if shape != right:
            fault = f"has the shape {list(shape)}" if shape else "is missing"
            raise UserError(
                f"{folder}: {name}.weight {fault} in {WEIGHTS}, but should have {list(right)} "
                "by config.json"
            )
    if any(name.startswith(f"bert.encoder.layer.{layers}.") for name in shapes):
        raise UserError(
            f"{folder}: {WEIGHTS} has more layers than num_hidden_layers {layers} of config.json"
        )


def list_labels(config: BertConfig) -> list[str]:
    """Return the C labels in the order of their numbers; config.json sorts its keys as text."""
    return [config.id2label[number] for number in range(config.num_labels)]


def set_labels(config: BertConfig, names: list[str]) -> None:
    """Store the labels in a config, numbered in this order."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def set_max_seq_length(config: BertConfig, wanted: int | None) -> None:
    """Set the maximum text length in tokens: `wanted`, or the tuned model's, or 128.

    Raises: UserError if virtual tokens and text together exceed the position embeddings.
    """
    length = wanted or getattr(config, "max_seq_length", None) or 128
    positions, virtual = config.max_position_embeddings, getattr(config, "pre_seq_len", 0)
    if (room := positions - virtual) < length:
        tokens = f"{virtual} virtual tokens and " * bool(virtual) + f"--max_seq_length {length}"
        advice = f"--max_seq_length {room} or less"
        if room < 3:  # leave the text its length, if that is possible at all
            text = min(length, positions - 1)
            advice = f"--pre_seq_len {positions - text} and --max_seq_length {text} or less"
        raise UserError(
            f"{tokens}: more than the {positions} positions of the backbone; pass {advice}"
        )
    config.max_seq_length = length


def load_tokenizer(folder: Path, config: BertConfig) -> PreTrainedTokenizerBase:
    """Load a backbone's fast tokenizer. Raises: UserError if it does not fit the model."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        # transformers would build a tokenizer that knows only the special tokens
        raise UserError(f"{folder} has no tokenizer.json or vocab.txt")
    options = {"do_lower_case": False} if is_cased(folder) else {}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False, **options
            )
    except Exception as error:  # tokenizers has no narrower exception
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} has no usable tokenizer: {first}") from None
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{config.vocab_size} embeddings: they do not belong together"
        )
    tokenizer.model_max_length = config.max_seq_length
    return tokenizer


def is_cased(folder: Path) -> bool:
    """Whether a tokenizer keeps capitals although no `do_lower_case` in its files says so.

    Without that entry transformers lower-cases for every BERT. tokenizer.json decides; without it,
    the words of vocab.txt do: those of BioBERT and SciBERT have capitals, and nothing else says so.
    """
    paths = folder / "tokenizer_config.json", folder / "tokenizer.json"
    settings, whole = (read_json(p, TokenizerSettings) if p.is_file() else None for p in paths)
    if "do_lower_case" in (settings or {}):
        return False
    if whole is not None:
        return (whole.get("normalizer") or {}).get("lowercase") is False
    words = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    capitals = sum(word != word.lower() and word[0] not in "[<" for word in words)
    return capitals > CAPITALS * len(words)


def separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what joins the columns of a text: the tokenizer's separator, such as ` [SEP] `."""
    return f" {tokenizer.sep_token} " if tokenizer.sep_token else " "


def load_weights(
    cls: type[BertForSequenceClassification],
    folder: Path,
    config: BertConfig,
    may_lack: Callable[[str], bool],
    strict: bool,
) -> BertForSequenceClassification:
    """Build a `cls` with the weights in `folder`.

    may_lack: whether the parameter of a name may be missing; it is then drawn from torch's
    generator, normal with the backbone's initializer_range. strict: no other weights may be there.

    Raises: UserError if other weights are missing, have the wrong shape, are not finite or are not
        in safetensors.
    """
    check_shapes(folder, config)
    try:
        model, fresh, unused = read_weights(cls, folder, config)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} has no usable model.safetensors: {first}") from None
    if lost := [name for name in sorted(fresh) if not may_lack(name)]:
        raise UserError(
            f"{folder} lacks {len(lost)} of the weights, or has them in other shapes: "
            f"{', '.join(lost[:5])}; is this a model folder?"
        )
    if strict and unused:
        raise UserError(
            f"{folder} has weights that do not belong to a classifier: "
            f"{', '.join(sorted(unused)[:5])}"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{folder}: {name} has values that are not finite: the model is broken")
        # a copy outside the mapped file, which may change, and where weights start at any byte:
        # some kernels round otherwise there
        parameter.data = parameter.data.clone()
    return model
