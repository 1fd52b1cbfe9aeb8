"""The tokens of a text, made once and memory-mapped from then on.

They are an entry of the cache (`research.data.cache`): written under a temporary name and renamed when complete, so two
processes may write the same entry at once. Until then, a longer text has an entry for each 16 MiB of it, from which a
process continues after an interrupted one. Neither the text nor its tokens are ever in memory as a whole.
"""

import contextlib
import functools
import hashlib
import itertools
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from research.data import cache
from research.data.cache import Arrays
from research.data.text_source import Text
from research.data.token_files import LONG
from research.data.tokenization import FromJson
from research.errors import UserError

_RULES = 1  # part of the cache key; raise it when the same text becomes other tokens, or has other parts
_PIECE = 2**16  # bytes that are tokenized as one text
_PIECES_AT_ONCE = 32
_PIECES_OF_A_PART = 256
_SAMPLES, _SAMPLE_SIZE = 64, 2**16  # tokens that a fingerprint of a long text is made from
_PROGRESS_SECONDS = 10.0
_LABEL_LENGTH = 48  # characters of an entry's name, of up to four bytes each: file systems allow 255 bytes
_LEAST_KEPT = 0.99  # of the bytes of a text, by a tokenizer


def load(text: Text, tokenizer: FromJson | None) -> np.ndarray:
    """Returns the tokens of a text, a read-only memory map, made if the cache does not have them.

    Args:
      text: the text.
      tokenizer: splits it into tokens; None: its bytes.

    Returns:
      The bytes, uint8 [n], or the tokens, uint16 (uint32 if the vocabulary is larger than 65,536) [n].

    Raises:
      UserError: the text is empty or cannot be read, or the tokenizer loses a part of it; or it is long and the cache
        cannot be written.
    """
    label = re.sub(r"\W+", "-", text.name).strip("-")[-_LABEL_LENGTH:]
    digest = hashlib.sha256(f"{_RULES} {text.key} {tokenizer.kind if tokenizer else ''}".encode()).hexdigest()[:16]

    entry = f"{label}-{digest}"
    parts = f"{entry}.parts"

    def make() -> Iterator[Arrays]:
        blocks = _with_progress(text, read_blocks(text, is_utf8=tokenizer is not None))
        return _bytes(blocks) if tokenizer is None else _parts(text, blocks, tokenizer, parts)

    try:
        tokens = cache.load(entry, make, most_in_memory=LONG)["text"]
    except UserError:  # the same command would end in it again
        _remove(parts)
        raise
    _remove(parts)
    return tokens


def _remove(parts: str) -> None:
    """Removes the finished parts of a text; another process may still write the folder."""
    folder = cache.folder() / parts
    for part in folder.glob("[0-9]*"):
        shutil.rmtree(part, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def fingerprint(tokens: np.ndarray) -> str:
    """Returns a hash of the tokens; of a long text, a hash of its length and of a sample spread over it."""
    if tokens.nbytes <= LONG:
        return cache.fingerprint({"text": tokens})
    digest = hashlib.sha256(f"{tokens.dtype.str} {len(tokens)}".encode())
    for start in np.linspace(0, len(tokens) - _SAMPLE_SIZE, _SAMPLES).astype(int):
        sample = np.ascontiguousarray(tokens[start : start + _SAMPLE_SIZE])
        digest.update(zlib.crc32(sample.data).to_bytes(4, "big"))
    return digest.hexdigest()[:16]


def read_blocks(text: Text, *, is_utf8: bool) -> Iterator[bytes]:
    """Yields the blocks of a text, see `Text.blocks`.

    Raises:
      UserError: as `Text.blocks`, or it is empty.
    """
    is_empty = True
    for block in filter(None, text.blocks(is_utf8=is_utf8)):
        is_empty = False
        yield block
    if is_empty:
        raise UserError(
            f"{text.name}: a part of it has no text (of a set with only one split, the end is held out by whole rows): "
            "use a longer text, or hold out tokens by --config.dataset.test_fraction=0.1"
        )


def _with_progress(text: Text, blocks: Iterator[bytes]) -> Iterator[bytes]:
    print(f"reading {text.name} once ...", file=sys.stderr, flush=True)
    done, last = 0, time.monotonic()
    for block in blocks:
        yield block
        done += len(block)
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            of = f" of about {text.size / 1e6:,.0f}" if text.size else ""
            print(f"{text.name}: {done / 1e6:,.0f}{of} MB", file=sys.stderr, flush=True)


def _bytes(blocks: Iterator[bytes]) -> Iterator[Arrays]:
    for block in blocks:
        yield {"text": np.frombuffer(block, np.uint8)}


def _parts(text: Text, blocks: Iterator[bytes], tokenizer: FromJson, folder: str) -> Iterator[Arrays]:
    """Yields the tokens of each part of a text. If there are several, each is a cache entry in `folder`."""
    pieces = split(blocks)
    part = list(itertools.islice(pieces, _PIECES_OF_A_PART))
    size = found = 0  # bytes of the parts before, and those that their tokens stand for
    for number in itertools.count():
        following = list(itertools.islice(pieces, _PIECES_OF_A_PART))
        make = functools.partial(_tokens, text, part, tokenizer, size, found)
        if not following and not number:
            yield from make()
            return
        yield (arrays := cache.load(f"{folder}/{number:06}", make))
        if not following:
            return
        size += sum(map(len, part))
        found += int(tokenizer.num_bytes[arrays["text"]].sum())
        part = following


def _tokens(text: Text, part: Iterable[bytes], tokenizer: FromJson, size: int, found: int) -> Iterator[Arrays]:
    dtype = np.uint16 if len(tokenizer.names) <= 2**16 else np.uint32
    pieces = iter(part)
    while group := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        encoded = tokenizer.encode_texts(decoded(text.name, group))
        tokens = np.fromiter(itertools.chain.from_iterable(encoded), dtype, sum(map(len, encoded)))
        size += sum(map(len, group))
        found += int(tokenizer.num_bytes[tokens].sum())
        _check_kept(text, tokenizer, found, size)
        yield {"text": tokens}


def decoded(name: str, pieces: Iterable[bytes]) -> list[str]:
    """Decodes pieces of a text, which `name` names in messages.

    Raises:
      UserError: it is not in UTF-8.
    """
    try:
        return [piece.decode() for piece in pieces]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not in UTF-8 ({error.reason}), which a tokenizer needs: use the bytes, without a tokenizer"
        ) from None


def _check_kept(text: Text, tokenizer: FromJson, found: int, size: int) -> None:
    """Raises `UserError` if tokens stand for `found`, not about `size` bytes: bits per byte would be wrong."""
    if abs(found - size) > (1 - _LEAST_KEPT) * size:
        raise UserError(
            f"{tokenizer.source}: its tokens stand for {found:,} of the first {size:,} bytes of {text.name}: use a "
            "tokenizer that keeps all of the text, such as byte-level BPE"
        )


def split(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Joins blocks and splits them again into pieces of at most 64 KiB.

    A piece ends with a line, or else with a word, or else with a character of UTF-8; where, depends on the text only.
    """
    buffer = b""
    for block in blocks:
        buffer += block
        start = 0
        while len(buffer) - start > _PIECE:
            end = _end(buffer, start)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _end(buffer: bytes, start: int) -> int:
    stop = start + _PIECE
    if (newline := buffer.rfind(b"\n", start, stop)) >= start:
        return newline + 1
    if (space := buffer.rfind(b" ", start + 1, stop)) > start:
        return space
    return next((end for end in range(stop, stop - 4, -1) if buffer[end] & 0xC0 != 0x80), stop)
