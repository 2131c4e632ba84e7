"""Tokenize texts, and batch texts of similar length.

N rows, U distinct texts, C classes, B rows of a batch, T tokens.
"""

import logging
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:  # saves half a second in scripts that only read CSV files
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Batches per window of shuffled rows that is sorted by length: enough to leave little padding, few
# enough that an epoch is not one sorted list.
WINDOW_BATCHES = 100
# Words of BERT have 100 characters at most, longer ones become one unknown token.
CHARACTERS_PER_TOKEN = 100
# Share of `unreadable` tokens, from which on texts are in a language that the model does not know.
# With an English BERT it is at most 1.4 % in English titles, questions and tweets, 6 % in tweets
# with emoji, and 62 to 100 % in Chinese, Russian, Korean and twelve other scripts.
UNREADABLE = 0.3
# What was warned of, by tokenizer: a run has its own, and encodes a file several times.
WARNED: "WeakKeyDictionary[PreTrainedTokenizerBase, set[str]]" = WeakKeyDictionary()


class TextRows(Protocol):
    """The fields of a `dataset.Split` that are used here."""

    path: str  # blank: no warning
    texts: list[str]
    rows: list[int]
    label_ids: np.ndarray | None


def rows_of(texts: list[str], path: str = "texts") -> TextRows:
    """Return texts of no file as rows without labels; path: their name in messages."""
    return SimpleNamespace(path=path, texts=texts, rows=range(1, len(texts) + 1), label_ids=None)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a split; each distinct text is stored, and later scored, once."""

    token_ids: list[list[int]]  # of U distinct texts; with `prefix_index`, of (text, prefix) pairs
    text_index: np.ndarray  # [N], each row's index into token_ids
    labels: np.ndarray | None  # int64 [N], or float32 [N, C] of 0 and 1
    rows: list[int]  # each row's number in its file, for messages
    pad_token_id: int
    prefix_index: np.ndarray | None = None  # [U], each text's prefix number
    label_weights: list[float] | None = None  # [C], in the loss

    def __len__(self) -> int:
        return len(self.text_index)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each distinct text: [U]."""
        return np.array([len(ids) for ids in self.token_ids])

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """Number of tokens of each row: [N]."""
        return self.lengths[self.text_index]

    def for_each_prefix(self, count: int) -> "Encoded":
        """Return every row `count` times: first all rows for prefix 0, then for prefix 1, ..."""
        if count == 1:
            return self
        texts, numbers = len(self.token_ids), np.arange(count)
        return replace(
            self,
            token_ids=self.token_ids * count,
            text_index=(self.text_index + texts * numbers[:, None]).ravel(),
            labels=None if self.labels is None else np.concatenate([self.labels] * count),
            rows=[*self.rows] * count,
            prefix_index=numbers.repeat(texts),
        )

    def collate(self, texts: np.ndarray) -> dict[str, torch.Tensor]:
        """Pad the given distinct texts to the longest of them: int64 [B, T]."""
        ids = [torch.tensor(self.token_ids[text]) for text in texts]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(row) for row in ids])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.prefix_index is not None:
            batch["prefix_index"] = torch.from_numpy(self.prefix_index[texts])
        return batch


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    split: TextRows,
    max_length: int,
    index: np.ndarray | None = None,
) -> Encoded:
    """Tokenize each distinct text of a split once, cut to `max_length` tokens.

    index: see `dataset.RowPrefixes`; a text with two prefixes counts as two texts.
    """
    prefixes = [None] * len(split.texts) if index is None else index.tolist()
    distinct: dict[tuple, int] = {}  # texts with their prefixes, and their places
    pairs = zip(split.texts, prefixes, strict=True)
    text_index = np.array([distinct.setdefault(pair, len(distinct)) for pair in pairs], np.int64)
    token_ids, is_cut = tokenize(tokenizer, [text for text, _ in distinct], max_length)
    if split.path:
        warn(tokenizer, split, token_ids, np.array(is_cut)[text_index], max_length)
    return Encoded(
        token_ids=token_ids,
        text_index=text_index,
        labels=split.label_ids,
        rows=split.rows,
        pad_token_id=tokenizer.pad_token_id,
        prefix_index=None if index is None else np.array([number for _, number in distinct]),
    )


def warn(
    tokenizer: "PreTrainedTokenizerBase",
    split: TextRows,
    token_ids: list[list[int]],
    is_cut: np.ndarray,
    max_length: int,
) -> None:
    """Warn of cut texts once for each file, and of an unknown language once for each tokenizer.

    The split may be a chunk of a file. is_cut: bool [N].
    """
    warned, path, language = WARNED.setdefault(tokenizer, set()), split.path, "the language"
    if is_cut.any() and path not in warned:
        warned.add(path)
        logger.warning(
            "%s: %d of %d texts (rows %d to %d) are longer than %d tokens; such texts are cut "
            "(--max_seq_length)",
            *(path, is_cut.sum(), len(is_cut), split.rows[0], split.rows[-1], max_length),
        )
    if language not in warned and (share := unreadable(tokenizer, token_ids)) > UNREADABLE:
        warned.add(language)
        logger.warning(
            "warning: %s: %.0f %% of the tokens are unknown to this model or single letters, so it "
            "reads these texts badly; tune a model for their language, such as "
            "--model_name_or_path bert-base-multilingual-cased",
            *(path, 100 * share),
        )


def unreadable(tokenizer: "PreTrainedTokenizerBase", token_ids: list[list[int]]) -> float:
    """Return the share of tokens, without special ones, that are unknown or single letters.

    Of another script a tokenizer knows nothing, or just letters, such as ## and a Cyrillic one.
    """
    counts = Counter(chain.from_iterable(token_ids))
    for number in tokenizer.all_special_ids:
        if number != tokenizer.unk_token_id:
            del counts[number]
    tokens = dict(zip(counts, tokenizer.convert_ids_to_tokens(list(counts)), strict=True))
    unknown = sum(
        counts[number]
        for number, token in tokens.items()
        if number == tokenizer.unk_token_id or re.fullmatch(r"##[^\x00-\x7f]", token)
    )
    return unknown / max(counts.total(), 1)


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """Return the token ids of each text, cut to `max_length` of them, and whether it was cut."""
    options = {"truncation": True, "max_length": max_length}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    # the tokenizer would take minutes and gigabytes for texts of megabytes
    limit = CHARACTERS_PER_TOKEN * max_length
    tokens = tokenizer([text[:limit] for text in texts], **options)
    token_ids, encodings = tokens["input_ids"], tokens.encodings
    for number, text in enumerate(texts):
        if len(text) > limit and not ends_before_last_word(encodings[number]):
            whole = tokenizer([text], **options)
            token_ids[number], encodings[number] = whole["input_ids"][0], whole.encodings[0]
    return token_ids, [bool(encoding.overflowing) for encoding in encodings]


def ends_before_last_word(encoding: "Encoding") -> bool:
    """Whether the tokens that are kept end before the last word, so that its end cannot matter."""
    if not encoding.overflowing:
        return False
    kept, last = (
        max((word for word in part.word_ids if word is not None), default=-1)
        for part in (encoding, encoding.overflowing[-1])
    )
    return kept < last


def training_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, prefixes: int = 1
) -> list[np.ndarray]:
    """Return the rows of each step of an epoch: texts of similar length, in a new order per epoch.

    The order is a function of (seed, epoch) alone, so a resumed run needs no random state. Rows are
    shuffled, cut into windows, sorted by length within a window and cut into batches; then the
    batches are shuffled. With several `prefixes` the rows are those of `Encoded.for_each_prefix`; a
    step has `batch_size` rows of each prefix, and each has its own order, from its own seed.
    """
    if prefixes > 1:
        rows = len(lengths) // prefixes
        orders = (
            [
                number * rows + batch
                for batch in training_batches(part, batch_size, seed + number, epoch)
            ]
            for number, part in enumerate(np.split(lengths, prefixes))
        )
        return [np.concatenate(batches) for batches in zip(*orders, strict=True)]
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for window in chunks(order, WINDOW_BATCHES * batch_size):
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += chunks(window, batch_size)
    return [batches[i] for i in random.permutation(len(batches))]


def length_batches(data: Encoded, batch_size: int) -> list[np.ndarray]:
    """Batch all distinct texts, the longest first, so that running out of memory happens at once.

    Texts of equal length are ordered by prefix, so that a batch needs few prefixes.
    """
    prefix = data.lengths * 0 if data.prefix_index is None else data.prefix_index
    return chunks(np.lexsort((prefix, -data.lengths)), batch_size)


def chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut rows into chunks of `size`; the last one may be shorter."""
    return np.split(rows, range(size, len(rows), size))


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Return the share of padding among the tokens of `batches`."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / padded
