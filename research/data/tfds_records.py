"""Decodes the records of a prepared TFDS data set to arrays."""

import contextlib
import functools
import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.data import decoding
from research.data.cache import Arrays
from research.data.file_errors import reading
from research.data.source import DamagedError, Source
from research.data.text_source import join
from research.data.tfds_description import Description
from research.errors import UserError, as_out_of_memory_error, brief

MOST_CLASSES = 2**20  # larger integer labels are not class numbers, and are decoded as this value
_EXAMPLES_AT_ONCE = 2000
_TEXTS_AT_ONCE = 32  # fewer, since a text may be a whole book
_OTHER_FILES = 256  # that a process has open


@functools.cache
def import_tfds() -> Any:
    """Imports `tensorflow_datasets`, without its progress bars and its advice to install OpenCV."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logging.getLogger("absl").addFilter(lambda record: "tensorflow_datasets" not in record.pathname)
    return tfds


def decode(
    label: str, path: Path, split: str, description: Description, part: tuple[int, int] = (0, 100)
) -> Iterator[Arrays]:
    """Yields the split's arrays in pieces; `label` is its name in messages, `part` which examples, in percent.

    Raises:
      UserError: the records are damaged, not readable or not supported, or there are none.
    """
    if not description.is_text:
        print(f"decoding {label} once ...", file=sys.stderr, flush=True)
    files: Sequence[Any] = ()
    try:
        builder = _builder(path)
        files = builder.info.splits[split].filepaths
        source = builder.as_data_source(split, file_format="array_record", decoders=_skip_images(builder))
        if not len(source):
            raise UserError(f"{label} in {path} has no examples")
        first, end = (len(source) * percent // 100 for percent in part)
        if description.is_text:
            for block in join(_texts(source, first, end)):
                yield {"text": np.frombuffer(block, np.uint8)}
            return
        channels, size = _declared_channels(label, builder.info.features["image"]), None
        for start in range(first, end, _EXAMPLES_AT_ONCE):
            examples = _read(source, range(start, min(start + _EXAMPLES_AT_ONCE, end)))
            arrays = {"image": _images(label, start, examples, channels, size)}
            size = arrays["image"].shape[1:3]
            if description.has_labels:
                arrays["label"] = _labels(label, start, examples, len(description.label_names))
            yield arrays
    except UserError:
        raise
    except Exception as error:  # readers of records and protocol buffers raise other types
        raise _explained(error, f"{label} in {path}", path, files) from error


@functools.cache
def _example_message() -> Any:
    """Returns the class of the protocol buffer message that every record is."""
    from tensorflow_datasets.proto import tf_example_pb2

    return getattr(tf_example_pb2, "Example")  # noqa: B009  # not declared for type checkers


class TfdsSource(Source):
    """The records of a split, with their images encoded.

    Args:
      name: of the data set.
      path: its folder.
      description: of the data set.
      split: the split's name.

    Raises:
      UserError: the set cannot be opened.
    """

    def __init__(self, name: str, path: Path, description: Description, split: str):
        self._path = path
        self._has_labels = description.has_labels
        try:
            builder = _builder(path)
            raw = import_tfds().decode.DeserializeMethod.RAW_BYTES
            self._records = builder.as_data_source(split, file_format="array_record", deserialize_method=raw)
            self.channels = builder.info.features["image"].shape[-1] or 3
            self._files = [str(file) for file in builder.info.splits[split].filepaths]
            self._file_ends = np.cumsum(builder.info.splits[split].shard_lengths)
            with reading(path):
                digest = hashlib.sha256(split.encode())
                for file in ("dataset_info.json", "features.json"):
                    digest.update((path / file).read_bytes())
            self.fingerprint = digest.hexdigest()[:16]
        except UserError:
            raise
        except Exception as error:  # readers of records and protocol buffers raise other types
            raise _explained(error, f"{name}/{split} in {path}", path, ()) from error
        if self.channels not in decoding.MODES:
            raise UserError(f"{name}/{split}: the images have {self.channels} channels; there must be 1 to 4")
        _allow_open_files(len(self._files))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        try:
            # TFDS's own parser takes four times as long, and as long as reading the record.
            features = _example_message().FromString(self._records[number]).features.feature
            image = features["image"].bytes_list.value[0]
            return {"image": image} | ({"label": features["label"].int64_list.value[0]} if self._has_labels else {})
        except Exception as error:  # readers of records and protocol buffers raise many types
            _check_readable(Path(self._files[int(np.searchsorted(self._file_ends, number, "right"))]))
            reason = brief(error)
            raise DamagedError(f"of {self._path} cannot be read ({type(error).__name__}: {reason})") from error


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, if it may be too low: one for each file of a split stays open."""
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < count + _OTHER_FILES:
        raise UserError(
            f"the data set has {count:,} files, and this process may open only {hard:,}: raise the limit (ulimit -n)"
        )


def _skip_images(builder: Any) -> dict[str, Any]:
    """Returns decoders that leave images encoded: TFDS's own decode with OpenCV where it is installed."""
    tfds = import_tfds()
    features = builder.info.features
    return {name: tfds.decode.SkipDecoding() for name, x in features.items() if isinstance(x, tfds.features.Image)}


def _builder(path: Path) -> Any:
    """Opens the set with TFDS, but without its label names, some of which TFDS rejects (see `tfds_description`)."""
    tfds = import_tfds()
    label = tfds.features.ClassLabel
    original = label.load_metadata
    label.load_metadata = lambda *_, **__: None
    try:
        return tfds.builder_from_directory(path)
    finally:
        label.load_metadata = original


class _ExampleError(Exception):
    """The example of this number cannot be read; the cause says why."""


def _read(source: Any, numbers: range) -> list[dict[str, Any]]:
    try:
        return source.__getitems__(numbers)
    except Exception:
        for number in numbers:
            try:
                source[number]
            except Exception as error:
                raise _ExampleError(f"example {number}") from error
        raise


def _texts(source: Any, first: int, end: int) -> Iterator[bytes]:
    for start in range(first, end, _TEXTS_AT_ONCE):
        yield from (example["text"] for example in _read(source, range(start, min(start + _TEXTS_AT_ONCE, end))))


def _explained(error: Exception, label: str, path: Path, files: Sequence[Any]) -> UserError:
    """Returns the error to raise, which reports damage only if the files of the split can be read."""
    example = ""
    if isinstance(error, _ExampleError) and isinstance(error.__cause__, Exception):
        example, error = f"{error}: ", error.__cause__
    reason = f"{example}{type(error).__name__}: {brief(error)}"
    if memory := as_out_of_memory_error(error, f"use a smaller data set than {label}, or a larger host"):
        return memory
    if isinstance(error, (ImportError, NotImplementedError)):
        return UserError(f"{label} is stored in a way that is not supported ({reason}); the data is intact")
    for file in map(Path, files):
        _check_readable(file)
    return UserError(f"{label} is damaged ({reason}): delete {path} and prepare it again")


def _check_readable(file: Path) -> None:
    """Raises `UserError` if a file is unreadable: reads it, since the errors of readers of records have no errno."""
    with reading(file), file.open("rb") as stream:
        while stream.read(2**24):
            pass


def _declared_channels(label: str, feature: Any) -> int:
    if (channels := feature.shape[-1]) not in decoding.MODES:
        raise UserError(f"{label}: the images have the shape {feature.shape}; the number of channels must be 1 to 4")
    return channels


def _images(
    label: str, start: int, examples: list[dict[str, Any]], channels: int, size: tuple[int, int] | None
) -> np.ndarray:
    """Decodes the images, which must all have the same `size` (None: that of the first); `start` numbers them."""
    images = []
    for i, example in enumerate(examples, start):
        try:
            images.append(decoding.decode(example["image"], channels, size))
        except decoding.SizeError as error:
            raise UserError(
                f"{label}, example {i}: the image {error} like the first: choose the size that all are resized to, as "
                "in --config.dataset.image_size=128"
            ) from None
        except decoding.ImageError as error:
            raise UserError(
                f"{label}, example {i}: the image {error}; replace it and prepare the data set again"
            ) from None
        size = size or images[0].shape[:2]
    return np.stack(images)


def _labels(label: str, start: int, examples: list[dict[str, Any]], num_classes: int) -> np.ndarray:
    """Returns the labels, int32 [n]; -1 is an unlabeled image, and `num_classes` is 0 if it is not declared."""
    labels = [int(example["label"]) for example in examples]
    for i, label_number in enumerate(labels, start):
        if num_classes and not -1 <= label_number < num_classes:
            raise UserError(f"{label}, example {i}: label {label_number} is not in 0..{num_classes - 1}")
    return np.array([min(max(x, -1), MOST_CLASSES) for x in labels], np.int32)
