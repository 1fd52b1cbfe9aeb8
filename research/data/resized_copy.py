"""Writes a copy of an image set with smaller images, as a prepared TFDS set: resumable, in several processes.

The set is divided into shards by example numbers alone, and a shard's bytes depend only on its examples, so that every
number of processes and of interruptions gives the same files. Until the copy is complete, everything is in the folder
`.unfinished` next to its final place: the parameters (`parameters.json`), the finished shards (`records`) and, for each
of them, a file that says so. Each file is written under another name and renamed.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.data import decoding, resized_shards, tfds_records
from research.data.resized_shards import Job, Shard, WriteError, Written, publish, too_many_damaged
from research.data.source import DamagedError, Source
from research.errors import RecordError, UserError

VERSION = "1.0.0"  # of every copy

# Few enough shards that a reader may keep all files open (the usual limit is 1,024), each small enough to be repeated.
_MOST_SHARDS = 512
_LEAST_EXAMPLES = 256
_UNFINISHED = ".unfinished"


@dataclasses.dataclass(frozen=True)
class Copy:
    """A finished copy.

    Attributes:
      path: the folder of the prepared set.
      num_examples: the number of examples, without the damaged ones.
      num_resumed: how many of them earlier, interrupted calls have written.
      bytes_before: the size of the images in the source.
      bytes_after: the size of the images in the copy.
      damaged: the names of the examples that were left out, with the reasons.
    """

    path: Path
    num_examples: int
    num_resumed: int
    bytes_before: int
    bytes_after: int
    damaged: tuple[str, ...]


def write_copy(
    name: str,
    label_names: Sequence[str],
    sources: Mapping[str, Source],
    out: Path,
    side: int,
    *,
    quality: int = 90,
    processes: int = 1,
    max_damaged: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Copy:
    """Writes `<out>/<name>/1.0.0`, a TFDS set in array_record with the features "image" and "label".

    The examples keep their order and so, if none is damaged, their numbers. `resized_shards.resize` has the rules for
    images. If the same call was interrupted before, only its unfinished shards are written.

    Args:
      name: the name of the copy, a valid TFDS name.
      label_names: the name of each class; if there are none, labels are stored as integers.
      sources: the splits; with `processes` > 1 they are pickled. Features other than image and label are left out.
      out: the folder of the set's folder.
      side: the largest length of the shorter side of an image, in pixels.
      quality: of JPEG, 1 to 100.
      processes: the number of worker processes; 1 works in this process.
      max_damaged: how many damaged examples are left out before it is an error.
      progress: is called with the numbers of finished examples and of all examples, at first and after each shard.

    Raises:
      UserError: the source or `out` is not suitable, `out` is in use, or too many examples are damaged.
      RecordError: a file could not be written; the same call continues once the cause is fixed.
      OutOfMemoryError: a worker process was killed; the same call continues.
    """
    job = Job(sources, *_stored_features(label_names, sources), out / name / _UNFINISHED, side, quality, max_damaged)
    shards = [shard for split, source in sources.items() for shard in _shards(name, split, len(source))]
    with _locked(out / name), _writing(out / name):
        _check_parameters(job)
        written = {shard: done for shard in shards if (done := _read_mark(job.folder, shard))}
        num_resumed = sum(done.num_examples for done in written.values())
        num_read = sum(len(shard.numbers) for shard in written)
        num_total = sum(map(len, sources.values()))
        _check_damaged(written, max_damaged)
        progress(num_read, num_total)
        rest = [shard for shard in shards if shard not in written]
        with contextlib.closing(resized_shards.run(job, rest, processes)) as results:
            for shard, done in results:
                written[shard] = done
                _check_damaged(written, max_damaged)
                _write_json(_mark(job.folder, shard), dataclasses.asdict(done))
                num_read += len(shard.numbers)
                progress(num_read, num_total)
        in_order = {shard: written[shard] for shard in shards}
        path = _finish(job, out / name, in_order)
    return Copy(
        path,
        sum(done.num_examples for done in in_order.values()),
        num_resumed,
        sum(done.bytes_before for done in in_order.values()),
        sum(done.bytes_after for done in in_order.values()),
        tuple(text for done in in_order.values() for text in done.damaged),
    )


def _stored_features(label_names: Sequence[str], sources: Mapping[str, Source]) -> tuple[int, tuple[str, ...] | None]:
    """Returns the number of channels, and the label names (None if the images have no labels).

    Raises:
      UserError: the sources cannot be stored.
    """
    for split, source in sources.items():
        if not len(source):
            raise UserError(f"the split {split} has no examples: add some, or remove the split")
        if not re.fullmatch(r"[\w-]+", split):
            raise UserError(f"the name of the split {split!a} has a character that TFDS does not allow: rename it")
    if (channels := {source.channels for source in sources.values()}) not in ({1}, {3}):
        raise UserError(f"the images have {' or '.join(map(str, sorted(channels)))} channels; JPEG stores 1 or 3")
    for name in label_names:
        # TFDS stores the names as the lines of a file. A name that is not UTF-8 on disk has surrogates in Python.
        if "\n" in name or name.endswith("\r") or any("\ud800" <= character <= "\udfff" for character in name):
            raise UserError(f"the class name {name!a} cannot be stored as a line of UTF-8: rename the class")
    record = _first_intact_record(sources)
    if "image" not in record:
        raise UserError(f"the examples have no images, only {', '.join(record) or 'nothing'}")
    return channels.pop(), tuple(label_names) if "label" in record else None


def _first_intact_record(sources: Mapping[str, Source]) -> Mapping[str, Any]:
    for source in sources.values():
        for number in range(len(source)):
            with contextlib.suppress(DamagedError):
                return source[number]
    raise UserError("every example is damaged: copy or prepare the data set again")


def _shards(name: str, split: str, num_examples: int) -> list[Shard]:
    length = max(_LEAST_EXAMPLES, -(-num_examples // _MOST_SHARDS))
    starts = range(0, num_examples, length)
    return [
        Shard(
            split,
            range(start, min(start + length, num_examples)),
            f"{name}-{split}.array_record-{index:05d}-of-{len(starts):05d}",  # as TFDS names it
        )
        for index, start in enumerate(starts)
    ]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Creates the folder of the set, and locks it; the operating system releases the lock however the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out={folder.parent} cannot be written ({error.strerror}): give another folder") from None
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is being written by another process: wait until it ends") from None
        if found := sorted(path.name for path in folder.iterdir() if path.name != _UNFINISHED):
            raise UserError(
                f"{folder} has {found[0]} and is not an unfinished copy: delete it, or give another folder with --out"
            )
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk and the like into a `RecordError`."""
    try:
        yield
    except (OSError, WriteError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(
            f"{folder} could not be written ({reason}): nothing is lost; fix the cause, and the same command continues"
        ) from error


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    publish(partial, path)


def _check_parameters(job: "Job") -> None:
    """Checks that an unfinished copy was begun with the same parameters, or begins one."""
    (job.folder / "records").mkdir(parents=True, exist_ok=True)
    for leftover in job.folder.glob("*.partial"):
        leftover.unlink()
    parameters = {
        "side": job.side,
        "quality": job.quality,
        "the data set": {split: [source.fingerprint, len(source)] for split, source in job.sources.items()},
        "the set of features": [job.channels, job.label_names and list(job.label_names)],
        "the decoder": decoding.NAME,
        "the encoding": resized_shards.ENCODING,
        "the size of shards": [_MOST_SHARDS, _LEAST_EXAMPLES],
    }
    file = job.folder / "parameters.json"
    if not file.exists():
        return _write_json(file, parameters)
    earlier = json.loads(file.read_bytes())
    for name, value in parameters.items():
        if earlier.get(name) != value:
            values = f" ({earlier.get(name)} then, {value} now)" if isinstance(value, int | str) else ""
            raise UserError(
                f"{job.folder.parent} is an unfinished copy, and {name} has changed since it was begun{values}: run "
                "the same command as then, or delete the folder"
            )


def _mark(folder: Path, shard: Shard) -> Path:
    """Returns the file whose existence means that a shard is finished."""
    return folder / f"{shard.file}.json"


def _read_mark(folder: Path, shard: Shard) -> Written | None:
    mark = _mark(folder, shard)
    return Written(**json.loads(mark.read_bytes())) if mark.exists() else None


def _check_damaged(written: Mapping[Shard, Written], limit: int) -> None:
    damaged = [text for done in written.values() for text in done.damaged]
    if len(damaged) > limit:
        raise too_many_damaged(damaged, limit)


def _finish(job: Job, folder: Path, written: Mapping[Shard, Written]) -> Path:
    """Writes the description of the set, moves the set to its final place and returns that."""
    tfds = tfds_records.import_tfds()
    records = job.folder / "records"
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[done.num_examples for shard, done in written.items() if shard.split == split],
            num_bytes=sum(done.num_bytes for shard, done in written.items() if shard.split == split),
        )
        for split in job.sources
    ]
    description = f"Images whose shorter side has at most {job.side} pixels, JPEG quality {job.quality}."
    tfds.folder_dataset.write_metadata(
        data_dir=records,
        features=job.features(),
        split_infos=splits,
        version=VERSION,
        check_data=False,
        description=description,
        disable_shuffling=True,
    )
    path = folder / VERSION
    records.rename(path)
    shutil.rmtree(job.folder)
    return path
