"""Text as parallel streams, for networks that carry their state from batch to batch (truncated BPTT).

A split becomes B contiguous streams, cut into chunks of T tokens. Example c * B + r is chunk c of stream r, so if the
examples are not shuffled, each row of a batch of B continues the same row of the last batch. An example is computed
from (c, r) when it is read: nothing but the tokens is stored, and they may be a memory map.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from research.data import tokenization
from research.data.sources import Dataset
from research.data.text_source import check_bytes
from research.data.token_files import LONG
from research.errors import UserError

_BYTES_AT_ONCE = 2**24
_ROWS_AT_ONCE = 2**16

Read = Callable[[np.ndarray], np.ndarray]


def streams(dataset: Dataset, batch_size: int, length: int, eval_batch_size: int) -> Dataset:
    """Cuts the text of a data set into examples of `length` + 1 tokens, in the order described above.

    For each example, a split has:

    - "tokens", uint8, uint16 or uint32 [n, length + 1]: the first `length` are the inputs, the last `length` the
      targets.
    - "first", bool [n]: whether the network resets its state before this example.
    - "count", int32 [n]: how many of the predictions count.

    Training has `batch_size` streams; the remainder, less than a chunk of each, is dropped. In evaluation, every token
    of the split except its first counts exactly once, in `eval_batch_size` streams. Each stream first reads the
    preceding chunk, uncounted, so that its first predictions have context.

    Args:
      dataset: its splits have "text" [number of tokens]: bytes (uint8) if the data set has no tokenizer.
      batch_size: examples of a training step.
      length: the tokens of an example, T.
      eval_batch_size: examples of an evaluation batch.

    Returns:
      A data set that is not shuffled, with its tokenizer. Its features are `ComputedColumn`s; token i is called
      `label_names[i]`. The vocabulary of bytes is those that occur in any split; of more than 1 GiB of text, all 256.

    Raises:
      UserError: the data set is not a text, or neither bytes nor tokens, is too short, or has 2^31 examples or more.
    """
    if "text" not in dataset.train:
        raise UserError(
            f"--config.dataset.name={dataset.name} is not a text: use tiny_shakespeare or pydoc, or text with "
            "--config.dataset.data_dir=DIR"
        )
    texts = {name: np.asarray(split["text"]) for name, split in dataset.splits.items()}
    for name, text in texts.items() if dataset.tokenizer is None else ():
        check_bytes(f"{dataset.name}/{name}", text)
    steps = (len(texts["train"]) - 1) // (batch_size * length)
    if steps < 1:
        raise UserError(
            f"--config.batch_size={batch_size} streams of --config.sequence_length={length} tokens need a longer text "
            f"than the {len(texts['train']):,} of {dataset.name}: lower either"
        )
    for name, text in texts.items():
        if len(text) < 2:
            raise UserError(f"--config.dataset.name={dataset.name}: its {name} split has nothing to predict")
    tokenizer, lookup = dataset.tokenizer, None
    if tokenizer is None:
        tokenizer, lookup = _byte_tokenizer(texts)
    chunks = {name: _Chunks(name, text, length, len(tokenizer.names), lookup) for name, text in texts.items()}
    held_out = {name: _evaluation(chunks[name], eval_batch_size) for name in chunks if name != "train"}
    splits = {"train": _training(chunks["train"], batch_size, steps), **held_out}
    for name, split in splits.items():
        if len(split["tokens"]) > np.iinfo(np.int32).max:
            raise UserError(
                f"--config.sequence_length={length}: the {len(split['tokens']):,} chunks of the {name} split do not "
                "fit an int32: raise it"
            )
    changes = {"label_names": tokenizer.names, "shuffle": False, "tokenizer": tokenizer}
    return dataclasses.replace(dataset, **{"validation": None, **splits}, **changes)


def _byte_tokenizer(texts: Mapping[str, np.ndarray]) -> tuple[tokenization.Bytes, np.ndarray]:
    """Returns a tokenizer of the bytes that occur, and the token of each byte, uint8 [256]."""
    vocabulary = _occurring(texts)
    lookup = np.zeros(256, np.uint8)
    lookup[list(vocabulary)] = np.arange(len(vocabulary))
    return tokenization.Bytes(tuple(map(chr, vocabulary))), lookup


def _occurring(texts: Mapping[str, np.ndarray]) -> bytes:
    """Returns the bytes that occur in any of the texts, sorted; all 256 if they are long."""
    if sum(map(len, texts.values())) > LONG:
        return bytes(range(256))
    found: set[int] = set()
    for text in texts.values():
        for start in range(0, len(text), _BYTES_AT_ONCE):
            found.update(text[start : start + _BYTES_AT_ONCE].tobytes().translate(None, bytes(found)))
    return bytes(sorted(found))


class ComputedColumn:
    """A feature of all examples, computed when it is indexed or converted to an array, in bounded temporary memory.

    Args:
      length: the number of examples, n.
      shape: of the feature of one example.
      dtype: of the feature.
      read: returns the rows of examples, [m, *shape], by their numbers, int64 [m].
    """

    def __init__(self, length: int, shape: tuple[int, ...], dtype: Any, read: Read):
        self.shape = (length, *shape)
        self.dtype = np.dtype(dtype)
        self.ndim = len(self.shape)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._read = read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            index = range(len(self))[index]
        numbers = np.asarray(index, np.int64)
        return self._read(numbers.ravel()).reshape((*numbers.shape, *self.shape[1:]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for start in range(0, len(self), _ROWS_AT_ONCE):
            rows[start : start + _ROWS_AT_ONCE] = self[start : start + _ROWS_AT_ONCE]
        return rows


class _Chunks:
    """The chunks of a text, of `length` + 1 tokens each, which overlap by one; `lookup` is applied to the tokens."""

    def __init__(self, name: str, text: np.ndarray, length: int, vocabulary: int, lookup: np.ndarray | None):
        self.text, self.length = text, length
        self._name, self._vocabulary, self._lookup = name, vocabulary, lookup
        # A view of all windows, which NumPy gathers from without an index for each token.
        self._windows = np.lib.stride_tricks.sliding_window_view(text, length + 1) if len(text) > length else None

    def read(self, starts: np.ndarray) -> np.ndarray:
        """Returns the chunks at each start, [n, length + 1], padded with 0 outside the text.

        Raises:
          UserError: a token is not in the vocabulary.
        """
        size = self.length + 1
        chunks = np.zeros((len(starts), size), self.text.dtype)
        inside = (starts >= 0) & (starts <= len(self.text) - size)
        if self._windows is not None:
            chunks[inside] = self._mapped(self._windows[starts[inside]])
        for row in np.flatnonzero(~inside):
            start = int(starts[row])
            first, last = max(start, 0), min(start + size, len(self.text))
            if first < last:
                chunks[row, first - start : last - start] = self._mapped(self.text[first:last])
        # A long text is not read before training.
        if chunks.max(initial=0) >= self._vocabulary:
            raise UserError(
                f"the {self._name} split has the token {chunks.max():,}, but the vocabulary only {self._vocabulary:,}: "
                "give the tokenizer that it was made with as --config.dataset.tokenizer"
            )
        return chunks

    def _mapped(self, tokens: np.ndarray) -> np.ndarray:
        return tokens if self._lookup is None else self._lookup[tokens]

    def columns(self, num_examples: int, starts: Read, first: Read, count: Read) -> dict[str, ComputedColumn]:
        """Returns the features of a split; the functions return values [m] of examples by their numbers."""
        shape, dtype = (self.length + 1,), self.text.dtype
        return {
            "tokens": ComputedColumn(num_examples, shape, dtype, lambda numbers: self.read(starts(numbers))),
            "first": ComputedColumn(num_examples, (), bool, first),
            "count": ComputedColumn(num_examples, (), np.int32, lambda numbers: count(numbers).astype(np.int32)),
        }


def _training(chunks: _Chunks, batch_size: int, steps: int) -> dict[str, ComputedColumn]:
    def starts(numbers: np.ndarray) -> np.ndarray:
        chunk, row = np.divmod(numbers, batch_size)
        return (row * steps + chunk) * chunks.length

    return chunks.columns(
        steps * batch_size, starts, lambda x: x < batch_size, lambda x: np.full(len(x), chunks.length)
    )


def _evaluation(chunks: _Chunks, batch_size: int) -> dict[str, ComputedColumn]:
    num_predicted = len(chunks.text) - 1
    steps = -(-num_predicted // (batch_size * chunks.length))

    def starts(numbers: np.ndarray) -> np.ndarray:
        chunk, row = np.divmod(numbers, batch_size)
        return (row * steps + chunk - 1) * chunks.length  # chunk 0 is the warm-up

    def count(numbers: np.ndarray) -> np.ndarray:
        return np.where(numbers < batch_size, 0, np.clip(num_predicted - starts(numbers), 0, chunks.length))

    # Nothing precedes the first stream: its warm-up is padding, after which its state is reset again.
    return chunks.columns((steps + 1) * batch_size, starts, lambda x: x <= batch_size, count)
