"""Text as parallel streams, for recurrent networks that carry their state from batch to batch (truncated BPTT).

A character is a byte. A split becomes B contiguous streams, cut into chunks of T characters. Example c * B + r is chunk
c of stream r, so if the examples are not shuffled, each row of a batch of B continues the same row of the last batch.
"""

import dataclasses

import numpy as np

from research.data.cache import Arrays
from research.data.sources import Dataset
from research.errors import UserError


def streams(dataset: Dataset, batch_size: int, length: int, eval_batch_size: int) -> Dataset:
    """Cuts the text of a data set into examples of `length` + 1 characters, in the order described above.

    For each example, a split has:

    - "tokens", uint8 [n, length + 1]: the first `length` are the inputs, the last `length` the targets.
    - "first", bool [n]: whether the network resets its state before this example.
    - "count", int32 [n]: how many of the predictions count.

    Training has `batch_size` streams; the remainder, less than a chunk of each, is dropped. In evaluation, every
    character of the split except its first counts exactly once, in `eval_batch_size` streams. Each stream first reads
    the preceding chunk, uncounted, so that its first predictions have context.

    Args:
      dataset: its splits have "text", uint8 [number of bytes].
      batch_size: examples of a training step.
      length: the characters of an example, T.
      eval_batch_size: examples of an evaluation batch.

    Returns:
      A data set that is not shuffled. Token i stands for byte `ord(label_names[i])`; the vocabulary is the sorted bytes
      of all splits.

    Raises:
      UserError: the data set is not a text, or is too short.
    """
    if "text" not in dataset.train:
        raise UserError(f"--config.dataset.name={dataset.name} is not a text: use tiny_shakespeare or pydoc")
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    texts = {name: split["text"] for name, split in splits.items() if split is not None}
    vocabulary = np.unique(np.concatenate(list(texts.values())))
    tokens = {name: np.searchsorted(vocabulary, text).astype(np.uint8) for name, text in texts.items()}
    steps = (len(tokens["train"]) - 1) // (batch_size * length)
    if steps < 1:
        raise UserError(
            f"--config.batch_size={batch_size} streams of --config.sequence_length={length} characters need a longer "
            f"text than the {len(tokens['train']):,} of {dataset.name}: lower either"
        )
    for name, text in tokens.items():
        if len(text) < 2:
            raise UserError(f"--config.dataset.name={dataset.name}: its {name} split has nothing to predict")
    held_out = {name: _evaluation(text, eval_batch_size, length) for name, text in tokens.items() if name != "train"}
    return dataclasses.replace(
        dataset,
        label_names=tuple(map(chr, vocabulary)),
        train=_training(tokens["train"], batch_size, length, steps),
        validation=held_out.get("validation"),
        test=held_out["test"],
        shuffle=False,
    )


def _chunks(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Returns the `length` + 1 characters at each start, uint8 [n, length + 1], padded with 0 outside the text."""
    positions = starts[:, None] + np.arange(length + 1)
    inside = (positions >= 0) & (positions < len(text))
    return np.where(inside, text[np.clip(positions, 0, len(text) - 1)], np.uint8(0))


def _training(text: np.ndarray, batch_size: int, length: int, steps: int) -> Arrays:
    chunk, row = np.divmod(np.arange(steps * batch_size), batch_size)
    return {
        "tokens": _chunks(text, (row * steps + chunk) * length, length),
        "first": chunk == 0,
        "count": np.full(len(chunk), length, np.int32),
    }


def _evaluation(text: np.ndarray, batch_size: int, length: int) -> Arrays:
    steps = -(-(len(text) - 1) // (batch_size * length))
    chunk, row = np.divmod(np.arange((steps + 1) * batch_size), batch_size)
    starts = (row * steps + chunk - 1) * length  # chunk 0 is the warm-up
    counts = np.where(chunk == 0, 0, np.clip(len(text) - 1 - starts, 0, length))
    # Nothing precedes the first stream: its warm-up is padding, after which its state is reset again.
    first = (chunk == 0) | ((chunk == 1) & (row == 0))
    return {"tokens": _chunks(text, starts, length), "first": first, "count": counts.astype(np.int32)}
