"""Text in files: one file or all files of a folder, plain or gzip, or nanoGPT's files of tokens.

FILE                                             5% of it are held out as test, the 5% before as validation
DIR/{train,validation,test}[.SUFFIX]             a file or folder for each split; validation may be called val
DIR                                              its files in sorted order, held out from as one file
"""

import codecs
import copy
import functools
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from research.data.file_errors import exists, reading
from research.data.text_source import WHOLE, Part, Text
from research.errors import UserError

LAYOUT = "expected a file of text, a folder of such files, or DIR/train and DIR/test (folders or files)"
_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_GZIP = b"\x1f\x8b"
_BLOCK = 2**20
_HEAD = 2**12  # bytes of every file, read first
_MOST_CONTINUATION_BYTES = 3  # of a character in UTF-8


def find(data_dir: str) -> dict[str, list[Path]]:
    """Returns the files of each split of a text, in sorted order, by the layouts above; "train" alone: one text.

    Hidden files are ignored, and so is everything but the splits in a folder that has a split train.

    Raises:
      UserError: there are none, or a folder is missing or unreadable.
    """
    if not data_dir:
        raise UserError(f"--config.dataset.name=text needs --config.dataset.data_dir=DIR|FILE: {LAYOUT}")
    top = Path(os.path.expanduser(data_dir))
    if not exists(top):
        raise UserError(f"--config.dataset.data_dir={data_dir}: no such file or folder: {LAYOUT}")
    if not top.is_dir():
        return {"train": [top]}
    found: dict[str, Path] = {}
    with reading(top):
        entries = sorted(path for path in top.iterdir() if not path.name.startswith("."))
    for path in entries:
        if split := _SPLITS.get(path.name.partition(".")[0]):
            if split in found:
                raise UserError(f"{top} has both {found[split].name} and {path.name}: rename or remove one of them")
            found[split] = path
    if "train" not in found:
        if found:
            raise UserError(f"{top} has {next(iter(found.values())).name}, but no train: {LAYOUT}")
        found = {"train": top}
    files = {split: _files(path) for split, path in found.items()}
    if empty := [split for split in files if not files[split]]:
        raise UserError(f"{found[empty[0]]} has no files: {LAYOUT}")
    return files


def _files(path: Path) -> list[Path]:
    """Returns a file, or the files below a folder, in the order of their paths.

    Links are followed; one that leads back to a folder on its own path is skipped, as in `folder_listing`.
    """
    files: list[Path] = []
    pending: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(path, ())]
    while pending:
        path, ancestors = pending.pop()
        with reading(path):
            if path.is_file():
                files.append(path)
            elif path.is_dir():
                stat = path.stat()
                identity = stat.st_dev, stat.st_ino
                entries = () if identity in ancestors else path.iterdir()
                pending += [(x, (*ancestors, identity)) for x in entries if not x.name.startswith(".")]
    return sorted(files)


class FileText(Text):
    """The text of files, joined, with a newline after each that does not end in one.

    Args:
      name: names it in messages.
      files: the files, plain or gzip.

    Raises:
      UserError: a file is not readable.
    """

    def __init__(self, name: str, files: Sequence[Path]):
        self.name, self._part = name, WHOLE
        self._files: list[tuple[Path, int, int]] = []
        digest = hashlib.sha256()
        for file in files:
            with reading(file):
                stat = file.stat()
            self._files.append((file, stat.st_size, stat.st_mtime_ns))
            digest.update(os.fsencode(f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}\n"))
        self._digest = digest.hexdigest()[:16]

    @property
    def key(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Changes with the paths, sizes and modification times of the files."""
        return f"{self._digest}-{self._part[0]}-{self._part[1]}"

    @property
    def size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bytes in the files, compressed if they are."""
        return sum(size for _, size, _ in self._files) * (self._part[1] - self._part[0]) // 100

    def part(self, part: Part) -> "FileText":
        """Returns a part that begins and ends with a character of UTF-8, at a fraction of all bytes."""
        other = copy.copy(self)
        other._part = part
        return other

    def blocks(self, *, is_utf8: bool) -> Iterator[bytes]:
        """Yields blocks of up to a megabyte."""
        for file, _, _ in self._files:  # before anything is tokenized
            for block in _read(file, size=_HEAD):
                _check(file, block, 0)
                break
        begin, end = 0, None
        if self._part != WHOLE:
            total = sum(map(self._joined_size, range(len(self._files))))
            begin, end = (self._cut(total * percent // 100) for percent in self._part)
        is_empty = True
        for block in filter(None, self._range(begin, end, is_utf8)):
            is_empty = False
            yield block
        if is_empty:
            more = f" and {len(self._files) - 1:,} more" if len(self._files) > 1 else ""
            raise UserError(f"{self._files[0][0]}{more}: no text for {self.name}; use a longer one: {LAYOUT}")

    def _joined_size(self, number: int) -> int:
        """Returns the bytes of a file in the joined text, without compression."""
        size, ends_line = _measure(*self._files[number])
        return size + (size > 0 and not ends_line and number < len(self._files) - 1)

    def _cut(self, position: int) -> int:
        """Returns the first position from `position` on that is not within a character."""
        following = b"".join(self._range(position, position + _MOST_CONTINUATION_BYTES, False)) if position else b""
        return position + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))

    def _range(self, begin: int, end: int | None, is_utf8: bool) -> Iterator[bytes]:
        """Yields the bytes from `begin` to `end` of the joined text."""
        position = 0
        for number, (file, _, _) in enumerate(self._files):
            if begin > position and position + self._joined_size(number) <= begin:
                position += self._joined_size(number)
                continue
            start = max(begin - position, 0)
            position += start
            for block in _lines(file, start, is_utf8=is_utf8, is_last=number == len(self._files) - 1):
                yield block if end is None else block[: end - position]
                position += len(block)
                if end is not None and position >= end:
                    return


def _lines(file: Path, start: int, *, is_utf8: bool, is_last: bool) -> Iterator[bytes]:
    """Yields the checked blocks of a file from byte `start` on, and a newline if it lacks its last and is not last."""
    before = min(start, 1)  # of the bytes in front of `start`, the last one is read, too: it may be the file's last
    last, position = b"\n", start - before
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in _read(file, position):
        last, kept = block[-1:], block[before:]
        _check(file, block, position)
        if is_utf8:
            _decode(file, decoder, kept, position)
        position += len(block)
        before = 0
        if kept:
            yield kept
    if is_utf8:
        _decode(file, decoder, b"", position, final=True)
    if last != b"\n" and not is_last:
        yield b"\n"


def _read(file: Path, start: int = 0, size: int = _BLOCK) -> Iterator[bytes]:
    """Yields blocks of up to `size` bytes of a file, decompressed, from byte `start` on."""
    try:
        with reading(file), file.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            stream.seek(start)
            while block := stream.read(size):
                yield block
    except (EOFError, zlib.error) as error:
        raise UserError(f"{file} is a damaged gzip file ({error}): copy it again") from None


@functools.lru_cache(maxsize=2**16)
def _measure(file: Path, size: int, mtime: int) -> tuple[int, bool]:
    """Returns the number of bytes of a file, decompressed, and whether it ends with a newline.

    The other arguments are those of the file as it is, which make the cached value that of this version.
    """
    del mtime
    with reading(file), file.open("rb") as stream:
        if stream.read(2) != _GZIP:
            stream.seek(max(size - 1, 0))
            return size, stream.read(1) == b"\n"
    length, last = 0, b""
    for block in _read(file):
        length, last = length + len(block), block[-1:]
    return length, last == b"\n"


def _check(file: Path, block: bytes, position: int) -> None:
    """Raises `UserError` if a block has a NUL byte, as only binary files and UTF-16 have."""
    if (number := block.find(0)) >= 0:
        raise UserError(
            f"{file} is not a text: byte {position + number:,} is 0; remove it from the folder, convert it to UTF-8 if "
            "it is UTF-16, or call token files train.bin and val.bin"
        )


def _decode(file: Path, decoder: codecs.IncrementalDecoder, block: bytes, position: int, final: bool = False) -> None:
    """Raises `UserError` if a block is not UTF-8."""
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not in UTF-8 ({error.reason} near byte {position + error.start:,}), which a tokenizer needs: "
            "convert it to UTF-8, or leave out --config.dataset.tokenizer for bytes"
        ) from None
