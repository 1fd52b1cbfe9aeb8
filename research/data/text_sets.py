"""Turns the texts of a data set into tokens, whatever they come from."""

from collections.abc import Mapping
from typing import Any

from research.data import text_files, token_store
from research.data.cache import Arrays
from research.data.text_files import FileText
from research.data.text_source import ArrayText, Text
from research.data.token_files import SUFFIX, TokenFile
from research.data.tokenization import FromJson, Numbers, Tokenizer
from research.errors import UserError

_GPT2 = 50_257  # tokens of its vocabulary


def open_files(data_dir: str) -> Mapping[str, FileText | TokenFile]:
    """Opens the splits of `--config.dataset.name=text`, without reading them.

    Raises:
      UserError: as `text_files.find`; or a split has files of tokens and of text, or several files of tokens.
    """
    files = text_files.find(data_dir)
    is_tokens = {file.suffix == SUFFIX for paths in files.values() for file in paths}
    if is_tokens == {False}:
        return {split: FileText(f"text/{split}", paths) for split, paths in files.items()}
    for paths in files.values():
        if len(is_tokens) > 1 or len(paths) > 1:
            raise UserError(
                f"--config.dataset.data_dir={data_dir}: a split is either text or one file of tokens: use train.bin "
                f"and val.bin, and remove the other {SUFFIX} files"
            )
    return {split: TokenFile(paths[0]) for split, paths in files.items()}


def has_parts(examples: Any) -> bool:
    """Returns whether a split is a text that `text_source.hold_out` can split."""
    return isinstance(examples, (Text, TokenFile))


def _is_text(examples: Any) -> bool:
    return has_parts(examples) or (isinstance(examples, dict) and "text" in examples)


def tokenize(name: str, examples: Mapping[str, Any], tokenizer: FromJson | None) -> tuple[dict[str, Any], Any]:
    """Turns texts into tokens; other splits stay as they are.

    Args:
      name: of the data set.
      examples: the splits.
      tokenizer: that of the config; None: bytes.

    Returns:
      - The splits, a text as "text" [number of tokens]: uint8 (bytes), uint16 or uint32.
      - The tokenizer, `Numbers` for files of tokens without one, None for bytes.

    Raises:
      UserError: a tokenizer was given, but there is no text; or a text cannot be read or tokenized.
    """
    if not all(map(_is_text, examples.values())):
        if tokenizer:
            raise UserError(f"--config.dataset.tokenizer is for texts, but --config.dataset.name={name} is none")
        return dict(examples), None
    files = {role: split for role, split in examples.items() if isinstance(split, TokenFile)}
    if files:
        return {role: {"text": file.tokens()} for role, file in files.items()}, _vocabulary(files, tokenizer)
    return {role: _as_tokens(f"{name}/{role}", split, tokenizer) for role, split in examples.items()}, tokenizer


def _as_tokens(label: str, split: Any, tokenizer: FromJson | None) -> Arrays:
    if tokenizer is None and not isinstance(split, Text):
        return split
    return {"text": token_store.load(as_text(label, split), tokenizer)}


def as_text(label: str, split: Any) -> Text:
    """Returns a split as a text that can be read; `label` names it in messages.

    Raises:
      UserError: it is not a text, or tokens.
    """
    if isinstance(split, Text):
        return split
    if not isinstance(split, dict) or "text" not in split:
        raise UserError(f"--name={label} is not a text, or is already tokens")
    return ArrayText(label, split["text"])


def _vocabulary(files: Mapping[str, TokenFile], tokenizer: FromJson | None) -> Tokenizer:
    """Returns the tokenizer of files of tokens.

    Without one, the vocabulary ends with the largest token. Of a long file it is not known, but `text.streams` checks
    what it reads: then it is that of GPT-2, which nanoGPT's files have, or else all numbers of 16 bits.
    """
    largest, path = max((file.largest(), str(file.path)) for file in files.values())
    if tokenizer is None:
        is_known = not any(file.is_long for file in files.values())
        return Numbers(largest + 1 if is_known else _GPT2 if largest < _GPT2 else 2**16)
    if largest >= len(tokenizer.names):
        raise UserError(
            f"{path} has the token {largest:,}, but {tokenizer.source} has only {len(tokenizer.names):,}: give the "
            "tokenizer that the file was made with"
        )
    return tokenizer
