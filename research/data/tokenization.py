"""Tokenizers: bytes, those of a `tokenizer.json` of Hugging Face `tokenizers`, and bare token numbers.

`tokenizers` is an extra, imported only where a `tokenizer.json` is used.
"""

import abc
import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from research.errors import UserError, brief
from research.paths import open_path


def library() -> Any:
    """Imports Hugging Face `tokenizers`.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError('a tokenizer needs Hugging Face tokenizers: pip install -e ".[text]"') from None
    return tokenizers


class Tokenizer(abc.ABC):
    """Turns text into token numbers and back.

    Attributes:
      names: the name of each token, by number: as many as the vocabulary has.
      kind: "bytes", "numbers", or the fingerprint of a `tokenizer.json`: the same for equal tokenizers of equal names.
      content: the text of the `tokenizer.json`; "" without one.
      num_bytes: int32 [vocabulary], how many bytes of text each token stands for; None if that is unknown.
    """

    names: tuple[str, ...]
    kind: str
    content: str = ""
    num_bytes: np.ndarray | None = None

    @abc.abstractmethod
    def encode(self, prompt: str) -> np.ndarray:
        """Returns the tokens of a prompt, int32 [P]; an empty prompt is a newline.

        Raises:
          UserError: it cannot be encoded.
        """

    @abc.abstractmethod
    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens; invalid UTF-8 becomes the replacement character."""


class Bytes(Tokenizer):
    """One token for each byte of a vocabulary.

    Args:
      names: the sorted bytes of the vocabulary, as characters: `chr(byte)`.
    """

    kind = "bytes"

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.num_bytes = np.ones(len(self.names), np.int32)

    def encode(self, prompt: str) -> np.ndarray:
        """Encodes the prompt's UTF-8 bytes."""
        numbers = {ord(name): number for number, name in enumerate(self.names)}
        for character in prompt or "\n":
            if not numbers.keys() >= set(character.encode("utf-8", "surrogateescape")):
                raise UserError(
                    f"--prompt: the character {character!r} does not occur in the training data, so the network has "
                    "never seen it: remove it from the prompt"
                )
        return np.array([numbers[byte] for byte in (prompt or "\n").encode("utf-8", "surrogateescape")], np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decodes the bytes as UTF-8."""
        return bytes(ord(self.names[token]) for token in tokens).decode(errors="replace")


class Numbers(Tokenizer):
    """Tokens of an unknown tokenizer: prompts and samples are token numbers, separated by spaces.

    Args:
      size: of the vocabulary.
    """

    kind = "numbers"

    def __init__(self, size: int):
        self.names = tuple(map(str, range(size)))

    def encode(self, prompt: str) -> np.ndarray:
        """Parses token numbers; an empty prompt is token 0."""
        numbers = prompt.split() or ["0"]
        if not all(number.isascii() and number.isdigit() and int(number) < len(self.names) for number in numbers):
            raise UserError(
                f"--prompt={prompt!r}: this run was trained on token numbers, without a tokenizer: give numbers from 0 "
                f'to {len(self.names) - 1}, as in --prompt="1 2", or train with --config.dataset.tokenizer'
            )
        return np.array(numbers, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Writes the token numbers."""
        return "".join(f"{token} " for token in tokens)


class FromJson(Tokenizer):
    """The tokenizer of a `tokenizer.json`, such as byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909).

    Args:
      content: the text of the file.
      source: names the file in messages.

    Raises:
      UserError: `tokenizers` is not installed, or cannot read it.
    """

    num_bytes: np.ndarray

    def __init__(self, content: str, source: str):
        tokenizers = library()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # its only type
            reason = brief(error)
            raise UserError(
                f"{source} is not a tokenizer.json of Hugging Face tokenizers ({reason}): train one with "
                "`python -m research.data.tokenizer`"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<|endoftext|>" in a text is text, not the special token.
        self._tokenizer.encode_special_tokens = True
        self.content, self.source = content, source
        self.kind = hashlib.sha256(content.encode()).hexdigest()[:16]
        numbers = self._tokenizer.get_vocab(with_added_tokens=True)
        if not numbers:
            raise UserError(f"{source} has no tokens: train it with `python -m research.data.tokenizer`")
        names = [""] * (max(numbers.values()) + 1)
        for name, number in numbers.items():
            names[number] = name
        self.names = tuple(names)
        self.num_bytes = _num_bytes(self._tokenizer, content, self.names)

    def encode(self, prompt: str) -> np.ndarray:
        """Encodes the prompt, without special tokens around it."""
        try:
            encoding = self._tokenizer.encode(prompt or "\n", add_special_tokens=False)
        except Exception as error:  # its only type
            raise UserError(f"--prompt: the tokenizer cannot encode it ({error}): change the prompt") from None
        if not encoding.ids or self._unknown in encoding.ids:
            raise UserError(
                f"--prompt={prompt!r}: the tokenizer has no tokens for {'it' if prompt else 'a newline'}: change the "
                "prompt"
            )
        return np.array(encoding.ids, np.int32)

    @functools.cached_property
    def _unknown(self) -> int | None:
        model = json.loads(self.content)["model"]
        if "unk_id" in model:  # Unigram
            return model["unk_id"]
        name = model.get("unk_token")
        return None if name is None else self._tokenizer.token_to_id(name)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each text, in several threads.

        Raises:
          UserError: a text cannot be encoded.
        """
        try:
            return [x.ids for x in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # its only type
            reason = brief(error)
            raise UserError(
                f"{self.source} cannot encode the text ({reason}): use a tokenizer that encodes any text, such as "
                "byte-level BPE"
            ) from None

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decodes the tokens; special tokens are kept."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)


def _num_bytes(tokenizer: Any, content: str, names: tuple[str, ...]) -> np.ndarray:
    """Returns how many bytes each token stands for; special tokens stand for none."""
    # In byte-level encoding a character of a token's name is a byte.
    is_byte_level = '"ByteLevel"' in json.dumps(json.loads(content).get("decoder"))
    added = tokenizer.get_added_tokens_decoder()

    def count(number: int, name: str) -> int:
        if number in added:
            return 0 if added[number].special else len(name.encode())
        if is_byte_level:
            return len(name)
        if len(name) == 6 and name.startswith("<0x"):  # byte fallback, as in <0x0A>
            return 1
        return len(name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())  # SentencePiece's space

    return np.array([count(number, name) for number, name in enumerate(names)], np.int32)


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turns any error of the block into a `UserError`: each file system of object stores raises its own types."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {brief(error)}"
        raise UserError(
            f"{source} could not be read ({reason}): fix the cause, such as its permissions or the credentials, and "
            "run the same command again"
        ) from None


def _source(path: str) -> str:
    return f"--config.dataset.tokenizer={path}"


def exists(path: str) -> bool:
    """Returns whether `path`, a local file or a URL, exists.

    Raises:
      UserError: it cannot be opened, see `open_path`, or reached.
    """
    file = open_path(path)
    with _reading(_source(path)):
        return file.exists()


def read(path: str) -> FromJson | None:
    """Reads a `tokenizer.json`; "" is none: bytes.

    Raises:
      UserError: the file does not exist, cannot be read or is not a tokenizer.
    """
    if not path:
        return None
    source, file = _source(path), open_path(path)
    with _reading(source):
        if file.is_dir():
            raise UserError(f"{source} is a folder: give the file, as in {file / 'tokenizer.json'}")
        if not file.exists():
            raise UserError(
                f"{source}: no such file; train a tokenizer with `python -m research.data.tokenizer`, or leave this "
                "out for bytes"
            )
        content = file.read_bytes()
    try:
        return FromJson(content.decode(), source)
    except UnicodeDecodeError:
        raise UserError(f"{source} is not in UTF-8, so it is not a tokenizer.json") from None


def restore(kind: str, names: tuple[str, ...], content: str, source: str) -> Tokenizer | None:
    """Returns the tokenizer of a record, from its attributes; a `kind` of "" is no tokenizer.

    Raises:
      ValueError: `content` is not what the record's fingerprint says.
      UserError: as `FromJson`.
    """
    if not kind:
        return None
    if kind == Bytes.kind:
        return Bytes(names)
    if kind == Numbers.kind:
        return Numbers(len(names))
    tokenizer = FromJson(content, source)
    if tokenizer.kind != kind:
        raise ValueError(f"{source} has the fingerprint {tokenizer.kind}, not {kind}")
    return tokenizer
