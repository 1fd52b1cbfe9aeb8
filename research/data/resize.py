"""Writes a copy of an image set with smaller images, which are faster to read and to decode.

python -m research.data.resize --name=folder --data_dir=DIR --out=OUT --side=256
python -m research.data.resize --name=imagenet2012 --data_dir=DIR --out=OUT --side=256 --processes=8

The copy is a prepared TFDS set in array_record: train on it with --config.dataset.data_dir=OUT and the name that the
command prints at the end. It has the same splits, examples in the same order, classes and labels. The shorter side of
every image has at most `side` pixels; no image is enlarged. Small JPEG files are copied byte for byte, all others are
encoded as baseline JPEG with 4:2:0 chroma subsampling. OUT may contain other sets, but must not be inside the folder
that is copied.

An interrupted copy, even by `kill -9` or a full disk, continues with the same command, and has the same bytes as one
that was not interrupted, with any number of processes.
"""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import joblib
from absl import flags
from tqdm import tqdm

from research.data import command_line, embedded, resized_copy
from research.data.source import Source
from research.errors import UserError

_PROGRESS_SECONDS = 10.0  # between progress lines where stderr is not a terminal


def open_sources(name: str, data_dir: str) -> tuple[tuple[str, ...], Mapping[str, Source]]:
    """Opens a set by name: returns its label names and its splits.

    Raises:
      UserError: it is not available or not suitable.
    """
    from research.data import sources  # late, since it imports jax, which takes seconds in each worker process

    return sources.open_records(name, data_dir)


def copy_name(name: str, data_dir: str) -> str:
    """Returns the TFDS name of the copy of a set: that of the set, or of the folder if it is a folder of images."""
    text = Path(data_dir).resolve().name if name == "folder" else name.removeprefix("hf:").partition(":")[0]
    text = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
    if not re.match("[a-zA-Z]", text):
        text = f"images_{text}".strip("_")
    return f"{text}_copy" if text in ("folder", *embedded.DATASETS) else text  # these names never mean a prepared set


def _check_out(out: Path, name: str, data_dir: str) -> None:
    """Raises `UserError` if the copy would become part of the folder that it is made from."""
    source = Path(os.path.expanduser(data_dir))
    if name.startswith("hf:"):
        source /= os.path.expanduser(name.removeprefix("hf:"))
        source = source.parent if source.is_file() else source
    elif name != "folder":
        return
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out={out} is inside the data set, {source}: give a folder outside it")


def define_flags() -> flags.FlagValues:
    """Defines the flags of this command."""
    values = command_line.new_flags("set", "folder for the copy, a local one")
    flags.DEFINE_integer("side", 256, "largest length of the shorter side, in pixels", 1, flag_values=values)
    flags.DEFINE_integer("quality", 90, "quality of JPEG", 1, 100, flag_values=values)
    flags.DEFINE_integer("processes", None, "worker processes (default: all cores)", 1, flag_values=values)
    flags.DEFINE_integer("max_damaged", 0, "how many damaged examples may be left out", 0, flag_values=values)
    return values


def run(argv: Sequence[str]) -> None:
    """Writes the copy, or continues to write it, and prints what it contains.

    Raises:
      UserError: bad input, found before anything is written; damaged examples; or a full disk.
    """
    given = command_line.parse(define_flags(), argv, str(__doc__), "--name=SET --out=DIR")
    if not given:
        return
    if "://" in given["out"]:
        raise UserError(f"--out={given['out']}: write the copy to a local folder, and then copy that")
    out = Path(given["out"]).expanduser()
    _check_out(out, given["name"], given["data_dir"])
    label_names, sources = open_sources(given["name"], given["data_dir"])
    name = copy_name(given["name"], given["data_dir"])
    start = time.monotonic()
    copy = resized_copy.write_copy(
        name,
        label_names,
        sources,
        out,
        given["side"],
        quality=given["quality"],
        processes=given["processes"] or joblib.cpu_count(),
        max_damaged=given["max_damaged"],
        progress=_Progress(),
    )
    for text in copy.damaged:
        print(f"left out: {text}")
    speed = (copy.num_examples - copy.num_resumed) / (time.monotonic() - start)
    before, after = copy.bytes_before / 1e6, copy.bytes_after / 1e6
    print(f"{copy.num_examples:,} images: {before:,.1f} MB before, {after:,.1f} MB after, {speed:,.0f} images/s")
    print(f"{copy.path}: use --config.dataset.name={name} --config.dataset.data_dir={out}")


class _Progress:
    """Shows a progress bar on a terminal, and prints lines elsewhere."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, unit="image", dynamic_ncols=True, disable=None)
            self._first, self._start, self._last = done, now, now
            return
        self._bar.update(done - self._bar.n)
        # tqdm disables itself where stderr is not a terminal.
        if self._bar.disable and now - self._last > _PROGRESS_SECONDS:
            left = tqdm.format_interval((now - self._start) / (done - self._first) * (total - done))
            print(f"resize: {done:,}/{total:,} images  {left} left", flush=True)
            self._last = now
        if done == total:
            self._bar.close()


def main(argv: Sequence[str]) -> None:
    """Runs the command; an error is one line on stderr and an exit code (see `research.errors`)."""
    command_line.start(run, argv, "the same command continues the copy")


if __name__ == "__main__":
    main(sys.argv[1:])
