"""Writes the shards of a resized copy: the images of some examples as small JPEG files, in one array_record file.

A shard's bytes depend only on its examples and on the parameters of the copy, not on the process that writes it.
"""

import dataclasses
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from research.data import decoding, tfds_records
from research.data.source import DamagedError, Source
from research.errors import OutOfMemoryError, UserError

ENCODING = 2  # raise the number when `resize` returns other bytes
_MOST_JPEG_PIXELS = 65_500  # a side, in libjpeg


@dataclasses.dataclass(frozen=True)
class Shard:
    """Consecutive examples of a split; `file` is the name of their file."""

    split: str
    numbers: range
    file: str


@dataclasses.dataclass
class Written:
    """The contents of a shard; `num_bytes` is the size of the serialized examples."""

    num_examples: int = 0
    num_bytes: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    damaged: list[str] = dataclasses.field(default_factory=list)


def resize(image: bytes | np.ndarray, channels: int, side: int, quality: int) -> bytes:
    """Returns the image as a JPEG file whose shorter side has at most `side` pixels.

    Larger images are resized by Pillow's Lanczos filter, which averages over all pixels (antialiasing); the longer side
    is rounded to the nearest pixel, and no image is enlarged. An image that is small enough and stored as a gray or RGB
    JPEG, neither progressive nor rotated by EXIF, is returned byte for byte. All others are encoded as baseline JPEG
    with 4:2:0 chroma subsampling, as most photographs are: a fifth smaller than 4:4:4 and no slower to decode. Restart
    markers after each row of blocks, 1% of the bytes, let `jpeg.decode_rows` skip the rows that a crop does not need.
    Optimized Huffman tables would save another 5%, but more than double the time of encoding.

    Args:
      image: a file in a format of `decoding`, or uint8 [h, w, channels].
      channels: 1 (gray) or 3 (RGB).
      side: the largest length of the shorter side, in pixels.
      quality: of JPEG, 1 to 100.

    Raises:
      ImageError, DamagedError: the image cannot be decoded, or is too long for JPEG.
    """
    pixels = decoding.decode(image, channels) if isinstance(image, bytes) else image
    height, width, _ = pixels.shape
    shorter = min(height, width)
    if shorter <= side and isinstance(image, bytes) and _is_plain_jpeg(image, channels):
        return image
    resized = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    if shorter > side:
        size = round(width * side / shorter), round(height * side / shorter)
        resized = resized.resize(size, Image.Resampling.LANCZOS)
    if max(resized.size) > _MOST_JPEG_PIXELS:
        raise DamagedError(f"has {max(resized.size):,} pixels in a row, more than JPEG can store")
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_rows=1)
    return buffer.getvalue()


def _is_plain_jpeg(encoded: bytes, channels: int) -> bool:
    try:
        with Image.open(io.BytesIO(encoded), formats=["JPEG"]) as image:
            is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            is_baseline = image.format == "JPEG" and "progressive" not in image.info  # the format may also be MPO
            return is_upright and is_baseline and image.mode in ("L", "RGB")[: 1 if channels == 1 else 2]
    except Exception:  # Pillow's parser of EXIF raises exceptions of many types
        return False


class WriteError(Exception):
    """TFDS's writer of records failed."""


def publish(partial: Path, path: Path) -> None:
    """Renames a file when its contents are on the disk, so that a crash of the machine leaves no partial file."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def too_many_damaged(damaged: list[str], limit: int) -> UserError:
    """Returns the error to raise when more than `limit` examples are `damaged`."""
    allowed = f", and with {len(damaged) - 1} others more than --max_damaged={limit}" if limit else ""
    return UserError(f"{damaged[-1]}{allowed}: replace it, or leave out up to N such examples with --max_damaged=N")


@dataclasses.dataclass
class Job:
    """Writes shards; each worker process has a copy of it.

    Attributes:
      sources: the splits.
      channels: the number of channels of the images.
      label_names: () if the labels are plain integers, None if there are none.
      folder: the folder of the unfinished copy.
      side, quality, max_damaged: see `resized_copy.write_copy`.
      stop: an event that makes the worker processes stop before the next image.
    """

    sources: Mapping[str, Source]
    channels: int
    label_names: tuple[str, ...] | None
    folder: Path
    side: int
    quality: int
    max_damaged: int
    stop: Any = None

    def write(self, shard: Shard) -> Written:
        """Writes a shard.

        Raises:
          UserError: its damaged examples alone are too many, or a label is not that of a class.
          WriteError, OSError: the file could not be written.
        """
        from tensorflow_datasets.core import file_adapters

        partial = self.folder / f"{shard.file}-{os.getpid()}.partial"
        done = Written()
        try:
            file_adapters.ArrayRecordFileAdapter.write_examples(partial, self._records(shard, done))
            publish(partial, self.folder / "records" / shard.file)
        except RuntimeError as error:  # of the C++ writer
            raise WriteError(str(error)) from error
        finally:
            partial.unlink(missing_ok=True)
        return done

    def _records(self, shard: Shard, done: Written) -> Iterator[tuple[int, bytes]]:
        """Yields the (number, serialized example) pairs of a shard, and counts them in `done`."""
        from tensorflow_datasets.core import example_serializer

        source, features = self.sources[shard.split], self.features()
        serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        for number in shard.numbers:
            if self.stop is not None and self.stop.is_set():
                raise _StoppedError
            name = f"{shard.split}: {source.record_name(number)}"
            try:
                record = source[number]
                image = resize(record["image"], self.channels, self.side, self.quality)
            except (DamagedError, decoding.ImageError) as error:
                done.damaged.append(f"{name} {error}")
                if len(done.damaged) > self.max_damaged:
                    raise too_many_damaged(done.damaged, self.max_damaged) from None
                continue
            example: dict[str, Any] = {"image": image}
            if self.label_names is not None:
                example["label"] = self._label(name, record)
            # Not `serialize_example`: by default, the order of the features in the bytes differs between processes.
            proto = serializer.get_tf_example(features.encode_example(example))
            serialized = proto.SerializeToString(deterministic=True)
            done.num_examples += 1
            done.num_bytes += len(serialized)
            original = record["image"]
            done.bytes_before += len(original) if isinstance(original, bytes) else original.nbytes
            done.bytes_after += len(image)
            yield number, serialized

    def _label(self, name: str, record: Mapping[str, Any]) -> int:
        label = int(record.get("label", -1))
        if self.label_names and not -1 <= label < len(self.label_names):
            raise UserError(f"{name}: label {label} is not in 0..{len(self.label_names) - 1}")
        return label

    def features(self) -> Any:
        """Returns the TFDS features of the copy."""
        features = tfds_records.import_tfds().features
        stored = {"image": features.Image(shape=(None, None, self.channels), encoding_format="jpeg")}
        if self.label_names is not None:
            names = list(self.label_names)
            stored["label"] = features.ClassLabel(names=names) if names else features.Scalar(np.int64)
        return features.FeaturesDict(stored)


class _StoppedError(Exception):
    """Another shard has failed, or the user has interrupted the command."""


def run(job: Job, shards: list[Shard], processes: int) -> Generator[tuple[Shard, Written]]:
    """Writes shards in worker processes (1: in this process), and yields them in the order in which they are finished.

    Closing the iterator stops the processes.

    Raises:
      UserError, WriteError, OSError: see `Job.write`.
      OutOfMemoryError: a worker process was killed.
    """
    if processes == 1:
        yield from ((shard, job.write(shard)) for shard in shards)
        return
    # Not forked: the sources may have threads, which a forked process would lack.
    context = multiprocessing.get_context("spawn")
    job = dataclasses.replace(job, stop=context.Event())
    pool = ProcessPoolExecutor(processes, context, _start_worker, (job,))
    try:
        # Ctrl-C in a terminal sends SIGINT to all processes. This one stops the workers, which inherit the mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            futures = {pool.submit(_write_in_worker, shard): shard for shard in shards}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise OutOfMemoryError(
            "a worker process was killed, probably for lack of memory: the same command continues; lower --processes"
        ) from None
    finally:
        job.stop.set()
        pool.shutdown(cancel_futures=True)


_worker_job: Job


def _start_worker(job: Job) -> None:
    global _worker_job
    _worker_job = job
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process if its parent was killed: nothing else would, since a pool's workers wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _write_in_worker(shard: Shard) -> Written:
    return _worker_job.write(shard)
