"""Text as parallel streams: what a recurrent network that remembers the batch before is trained and evaluated on.

A character is a byte. A split becomes B streams, cut into chunks of T characters; example number c * B + r is chunk c
of stream r, so batches of B examples in their own order continue each other row by row.
"""

import dataclasses

import numpy as np

from research.data.sources import Arrays, Dataset
from research.errors import UserError


def streams(dataset: Dataset, batch_size: int, length: int, eval_batch_size: int) -> Dataset:
    """The text of a data set as examples of `length` characters and the one after, in order.

    Each split has, by example: "tokens" uint8 [n, length + 1], of which the first `length` are read and the last
    `length` are to be predicted; "first" bool [n], whether the network is to forget what came before; "count" int32
    [n], how many of the predictions count.

    Training: `batch_size` contiguous streams side by side; less than a chunk of each, what does not fill a step, is
    left out. Evaluation: every character of the split but its first counts exactly once, in `eval_batch_size` streams.
    So that their beginnings are not predicted from nothing, each first reads, uncounted, the chunk before it.

    Args:
      dataset: its splits have "text", uint8 [number of bytes].
      batch_size: of a training step.
      length: of the examples, T.
      eval_batch_size: of the evaluation of the other splits.

    Returns:
      A data set that is not shuffled. Token i is byte `ord(label_names[i])`: those that occur in any split, sorted.

    Raises:
      UserError: the data set is not a text, or too short.
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
    """uint8 [n, length + 1]: the text from each start on; 0 where there is none."""
    places = starts[:, None] + np.arange(length + 1)
    inside = (places >= 0) & (places < len(text))
    return np.where(inside, text[np.clip(places, 0, len(text) - 1)], np.uint8(0))


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
    # The first stream has nothing before it: it forgets its warm-up, which is padding.
    first = (chunk == 0) | ((chunk == 1) & (row == 0))
    return {"tokens": _chunks(text, starts, length), "first": first, "count": counts.astype(np.int32)}
