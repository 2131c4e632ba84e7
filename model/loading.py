"""Load and check the config, tokenizer and weights of a BERT."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from model.bert import ACTIVATIONS, quiet, read_weights
from model.folders import check_weights
from model.sequence_classification import POOLINGS, BertForSequenceClassification
from runtime.files import UserError, read_json

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
    settings = {k: v for k, v in read_json(path, BertSettings).items() if k != "model_type"}
    names = settings.pop("id2label", None)
    count = settings.pop("num_labels", None)
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


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the weights in a model folder, by their names in a classifier.

    Raises: UserError if there is no readable model.safetensors.
    """
    path = folder / "model.safetensors"
    check_weights(folder, path.name)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} has no usable model.safetensors: {error}") from None
    backbone = ("embeddings.", "encoder.", "pooler.")
    return {f"bert.{k}" if k.startswith(backbone) else k: one for k, one in shapes.items()}


def check_shapes(folder: Path, config: BertConfig) -> None:
    """Check the sizes in a config before memory is allocated for them.

    Raises: UserError naming an entry of config.json that does not fit model.safetensors.
    """
    shapes, width, last = read_shapes(folder), config.hidden_size, config.num_hidden_layers - 1
    sizes = {
        "embeddings.word_embeddings.weight": config.vocab_size,
        "embeddings.position_embeddings.weight": config.max_position_embeddings,
        "embeddings.token_type_embeddings.weight": config.type_vocab_size,
        f"encoder.layer.{last}.intermediate.dense.weight": config.intermediate_size,
    }
    for name, size in sizes.items():
        found = shapes.get(f"bert.{name}")
        if found != (size, width):
            found = "is missing" if found is None else f"has the shape {list(found)}"
            raise UserError(
                f"{folder}: {name} {found} in model.safetensors, but should have {[size, width]} "
                "by config.json"
            )
    if any(name.startswith(f"bert.encoder.layer.{last + 1}.") for name in shapes):
        raise UserError(
            f"{folder}: model.safetensors has more layers than num_hidden_layers "
            f"{last + 1} of config.json"
        )


def list_labels(config: BertConfig) -> list[str]:
    """Return the C labels in the order of their numbers; config.json sorts its keys as text."""
    return [config.id2label[number] for number in range(config.num_labels)]


def set_labels(config: BertConfig, names: list[str]) -> None:
    """Store the labels in a config, numbered in this order."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def problem_type(config: BertConfig, wanted: str | None, folder: Path) -> str:
    """Return the problem type that the model in `folder` was tuned for, to predict with it.

    Raises: UserError if another is wanted, or if the model has one output.
    """
    kind = config.problem_type or wanted or "single_label_classification"
    if wanted and wanted != kind:
        raise UserError(f"--problem_type {wanted}: {folder} was tuned for {kind}")
    if config.num_labels == 1 and kind == "single_label_classification":
        raise UserError(
            f"{folder} has one output, as cross-encoders have, so it cannot choose between labels: "
            "tune it further with --do_train, or pass a model of two labels or more"
        )
    return kind


def set_max_seq_length(config: BertConfig, virtual: int, wanted: int | None) -> None:
    """Set the maximum text length in tokens: `wanted`, or the tuned model's, or 128.

    Raises: UserError if `virtual` tokens and text together exceed the position embeddings.
    """
    length = wanted or getattr(config, "max_seq_length", None) or 128
    if (room := config.max_position_embeddings - virtual) < length:
        tokens = f"{virtual} virtual tokens and " * bool(virtual) + f"--max_seq_length {length}"
        advice = f"--max_seq_length {room} or less"
        if room < 3:  # leave the text its length, if that is possible at all
            text = min(length, config.max_position_embeddings - 1)
            most = config.max_position_embeddings - text
            advice = f"--pre_seq_len {most} and --max_seq_length {text} or less"
        raise UserError(
            f"{tokens}: more than the {config.max_position_embeddings} positions of the backbone; "
            f"pass {advice}"
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
    settings, whole, words = (
        folder / name for name in ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
    )
    if settings.is_file() and "do_lower_case" in read_json(settings, TokenizerSettings):
        return False
    if whole.is_file():
        return (read_json(whole, TokenizerSettings).get("normalizer") or {}).get(
            "lowercase"
        ) is False
    vocabulary = words.read_text(encoding="utf-8", errors="replace").split("\n")
    capitals = sum(word != word.lower() and word[0] not in "[<" for word in vocabulary)
    return capitals > CAPITALS * len(vocabulary)


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
