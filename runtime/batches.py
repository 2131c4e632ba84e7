"""Tokens, and batches of texts of like length.

N rows, U distinct texts, C classes, B rows of a batch, T tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

# Rows that are shuffled together before they are sorted by length: large enough to leave little
# padding, small enough that an epoch is not one sorted list.
WINDOW_BATCHES = 100


@dataclass(frozen=True)
class Encoded:
    """The tokens of a split; each distinct text is held, and later scored, once."""

    token_ids: list[list[int]]  # U distinct texts (with `served_by`: pairs of text and model)
    text_of_row: np.ndarray  # [N], an index into token_ids
    labels: np.ndarray | None  # see label_ids
    rows: list[int]  # each row's number in its file, for messages
    pad_token_id: int
    served_by: np.ndarray | None = None  # [U], the number of the tuned model that each goes to

    def __len__(self) -> int:
        return len(self.text_of_row)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each distinct text: [U]."""
        return np.array([len(ids) for ids in self.token_ids])

    def collate(self, texts: np.ndarray) -> dict[str, torch.Tensor]:
        """Pad the given distinct texts to the longest of them: int64 [B, T]."""
        ids = [torch.tensor(self.token_ids[text]) for text in texts]
        input_ids = torch.nn.utils.rnn.pad_sequence(
            ids, batch_first=True, padding_value=self.pad_token_id
        )
        lengths = torch.tensor([len(row) for row in ids])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.served_by is not None:
            batch["served_by"] = torch.from_numpy(self.served_by[texts])
        return batch


def training_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Rows of each step of one epoch: texts of like length, in an order drawn anew each epoch.

    The order is a function of (seed, epoch) alone, so that a resumed run needs no random state.
    Shuffled rows are cut into windows, sorted by length inside a window, cut into batches, and
    the batches are shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for window in pieces(order, WINDOW_BATCHES * batch_size):
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += pieces(window, batch_size)
    return [batches[i] for i in random.permutation(len(batches))]


def length_batches(data: Encoded, batch_size: int) -> list[np.ndarray]:
    """All texts, the longest first (what does not fit in memory fails at once).

    Those of one length are in the order of the models that serve them, so that a batch has few.
    """
    served_by = data.lengths * 0 if data.served_by is None else data.served_by
    return pieces(np.lexsort((served_by, -data.lengths)), batch_size)


def pieces(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut into runs of `size`; the last may be shorter."""
    return np.split(rows, range(size, len(rows), size))


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of the tokens in `batches` that is padding."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / padded
