"""The tokens of an artifact's language model: bytes, those of a tokenizer.json, or bare numbers."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.artifacts.artifact import ArtifactError


def check(manifest: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the manifest does not say how text becomes tokens."""
    tokenizer = _tokenizer(manifest)
    if not isinstance(tokenizer, dict) or not all(isinstance(tokenizer.get(name), str) for name in ("kind", "json")):
        raise ValueError("tokenizer is not described by a kind and a JSON text")
    if tokenizer["kind"] == "bytes" and not all(len(c) == 1 and ord(c) < 256 for c in manifest["classes"]):
        raise ValueError("the classes of a language model are not bytes")


def _tokenizer(manifest: Mapping[str, Any]) -> Mapping[str, str]:
    return manifest.get("tokenizer", {"kind": "bytes", "json": ""})


@functools.cache
def _open(content: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ArtifactError(
            "this language model needs Hugging Face tokenizers: install them with pip install tokenizers"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # its only type
        raise ArtifactError(f"the artifact's tokenizer cannot be read ({error}): export it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(manifest: Mapping[str, Any], prompt: str) -> list[int]:
    """Returns the tokens of a prompt; an empty one is a newline, or token 0 of bare numbers.

    Raises:
      ArtifactError: it cannot be encoded.
    """
    tokenizer, classes = _tokenizer(manifest), manifest["classes"]
    if tokenizer["kind"] == "bytes":
        return _bytes(prompt or "\n", classes)
    if tokenizer["kind"] == "numbers":
        numbers = prompt.split() or ["0"]
        if not all(number.isascii() and number.isdigit() and int(number) < len(classes) for number in numbers):
            raise ArtifactError(
                f"--prompt={prompt!r}: the network has no tokenizer: give numbers from 0 to {len(classes) - 1}"
            )
        return [int(number) for number in numbers]
    try:
        tokens = _open(tokenizer["json"]).encode(prompt or "\n", add_special_tokens=False).ids
    except ArtifactError:
        raise
    except Exception as error:  # its only type
        raise ArtifactError(f"--prompt: the tokenizer cannot encode it ({error}): change the prompt") from None
    model = json.loads(tokenizer["json"])["model"]
    name = model.get("unk_token")
    # Unigram stores the unknown token's number, other models its text.
    unknown = model.get("unk_id") if name is None else _open(tokenizer["json"]).token_to_id(name)
    if not tokens or unknown in tokens:
        raise ArtifactError(f"--prompt={prompt!r}: the tokenizer has no tokens for it: change the prompt")
    return tokens


def _bytes(prompt: str, classes: Sequence[str]) -> list[int]:
    """Returns the token of each byte of the prompt, in UTF-8."""
    numbers = {ord(name): number for number, name in enumerate(classes)}
    for character in prompt:
        if not numbers.keys() >= set(character.encode("utf-8", "surrogateescape")):
            raise ArtifactError(f"--prompt: the network was not trained on the character {character!r}: leave it out")
    return [numbers[byte] for byte in prompt.encode("utf-8", "surrogateescape")]


def decode(manifest: Mapping[str, Any], tokens: np.ndarray) -> str:
    """Returns the text of tokens, int [n]; invalid UTF-8 becomes the replacement character."""
    tokenizer = _tokenizer(manifest)
    if tokenizer["kind"] == "bytes":
        return bytes(ord(manifest["classes"][token]) for token in tokens).decode(errors="replace")
    if tokenizer["kind"] == "numbers":
        return " ".join(map(str, tokens))
    return _open(tokenizer["json"]).decode(tokens.tolist(), skip_special_tokens=False)
