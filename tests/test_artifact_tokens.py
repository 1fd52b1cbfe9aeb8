"""The tokens of an artifact's language model are those of the run that it was exported from."""

import sys

import numpy as np
import pytest
import tokenizers

from launch.artifacts import tokens
from launch.artifacts.artifact import ArtifactError
from launch.export import _tokenizer
from research.data import tokenizer
from research.data.tokenization import Bytes, FromJson, Numbers

TEXT = "A naïve prompt, <|endoftext|> 日本語.\n"


def _manifest(given):
    return {"classes": list(given.names), **_tokenizer(given)}


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_prompts_have_the_tokens_of_the_run(kind):
    content = tokenizer.train(iter([TEXT.encode() * 5]), 290)
    given = Bytes(tuple(map(chr, sorted(set(TEXT.encode()))))) if kind == "bytes" else FromJson(content, "x")
    manifest = _manifest(given)
    tokens.check(manifest)
    for prompt in (TEXT, ""):
        encoded = tokens.encode(manifest, prompt)
        assert encoded == given.encode(prompt).tolist()
        assert tokens.decode(manifest, np.array(encoded)) == (prompt or "\n")


def test_numbers_are_read_and_written():
    manifest = _manifest(Numbers(12))
    tokens.check(manifest)
    assert tokens.encode(manifest, "3 11") == [3, 11]
    assert tokens.encode(manifest, "") == [0]
    assert tokens.decode(manifest, np.array([3, 11])) == "3 11"
    with pytest.raises(ArtifactError, match="has no tokenizer: give numbers from 0 to 11"):
        tokens.encode(manifest, "12")


def test_bad_manifests_and_prompts_are_named(monkeypatch):
    for manifest in (
        {"classes": ["no byte"]},
        {"classes": [], "tokenizer": {"kind": "json", "json": 3}},
        {"classes": [], "tokenizer": {"kind": "json"}},
    ):
        with pytest.raises(ValueError, match=r"are not bytes|is not described"):
            tokens.check(manifest)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1}, unk_token="?")).to_str()
    unknown = {"classes": ["?", "a"], "tokenizer": {"kind": "0123", "json": words}}
    assert tokens.encode(unknown, "a") == [1]
    with pytest.raises(ArtifactError, match="--prompt='b': the tokenizer has no tokens for it"):
        tokens.encode(unknown, "b")
    pieces = tokenizers.Tokenizer(tokenizers.models.Unigram([("?", 0.0), ("a", -1.0)], unk_id=0)).to_str()
    with pytest.raises(ArtifactError, match="--prompt='b': the tokenizer has no tokens for it"):
        tokens.encode(unknown | {"tokenizer": {"kind": "0123", "json": pieces}}, "b")
    damaged = {"classes": [], "tokenizer": {"kind": "0123", "json": "{}"}}
    with pytest.raises(ArtifactError, match="the artifact's tokenizer cannot be read"):
        tokens.encode(damaged, "a")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ArtifactError, match="needs Hugging Face tokenizers: install them"):
        tokens.encode(damaged, "a")
