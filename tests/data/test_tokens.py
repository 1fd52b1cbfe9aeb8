"""Tokens of a text: the same text after decoding, made once, in a memory map; and nanoGPT's files of tokens."""

import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config import DatasetConfig
from research.data import (
    cache,
    sources,
    text,
    text_sets,
    text_source,
    tfds_records,
    token_files,
    token_store,
    tokenization,
    tokenizer,
)
from research.data.hugging_face_text import ColumnText
from research.data.text_source import ArrayText
from research.data.tfds_sets import find
from research.errors import UserError

TEXT = "".join(f"Line {n}: naïve 日本語 <|endoftext|>\n\n  {'word ' * (n % 5)}" for n in range(400)).encode()


@pytest.fixture(scope="module")
def pairs():
    """A tokenizer of 400 byte pairs."""
    return tokenization.FromJson(tokenizer.train(iter([TEXT]), 400), "tokenizer.json")


@pytest.fixture
def book(data_dir, pairs):
    """Returns a function that loads a text file of `data_dir`, with the tokenizer."""
    path = data_dir / "tokenizer.json"
    path.write_text(pairs.content)
    (data_dir / "book.txt").write_bytes(TEXT)

    def load(**fields):
        fields = {"name": "text", "data_dir": str(data_dir / "book.txt"), "tokenizer": str(path)} | fields
        return sources.load(DatasetConfig(**fields))

    return load


def test_tokens_are_the_text_that_bytes_are(book, pairs):
    tokens, as_bytes = book(), book(tokenizer="")
    for role, split in tokens.splits.items():
        assert split["text"].dtype == np.uint16
        assert isinstance(split["text"], np.memmap)
        original = as_bytes.splits[role]["text"].tobytes()
        assert pairs.decode(split["text"]).encode() == original
        assert pairs.num_bytes[split["text"]].sum() == len(original)
        assert len(split["text"]) < len(original) / 2
    assert tokens.tokenizer is not None
    assert tokens.tokenizer.kind == pairs.kind


def test_tokens_are_made_once_and_again_when_the_file_or_the_tokenizer_changes(book, data_dir, capsys):
    def reads(**fields):
        found = book(**fields)
        return capsys.readouterr().err.count("reading"), found

    assert reads()[0] == 3
    count, again = reads()
    assert count == 0
    (data_dir / "book.txt").write_bytes(TEXT.replace(b"Line", b"Zeile"))
    count, changed = reads()
    assert count == 3
    assert changed.fingerprints["train"] != again.fingerprints["train"]
    (data_dir / "other.json").write_text(tokenizer.train(iter([TEXT]), 300))
    assert reads(tokenizer=str(data_dir / "other.json"))[0] == 3
    assert reads()[0] == 0


def test_an_interrupted_build_starts_again(book, monkeypatch):
    pieces = token_store.split

    def interrupted(blocks):
        yield from itertools.islice(pieces(blocks), 1)
        raise KeyboardInterrupt

    expected = book(name="pydoc", data_dir="")
    monkeypatch.setattr(token_store, "split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        book()
    assert not any("text" in path.name for path in cache.folder().iterdir())
    monkeypatch.setattr(token_store, "split", pieces)
    assert len(book().train["text"]) > 1000
    assert len(expected.train["text"]) > 10_000  # the tokenizer works for texts in memory, too


@pytest.mark.parametrize(("pieces", "finished"), [(9, 0), (10, 0), (11, 10), (47, 30), (50, 30)])
def test_an_interrupted_build_of_a_long_text_goes_on_after_the_last_finished_part(
    book, pairs, monkeypatch, pieces, finished
):
    """Here a piece is a line of 10 bytes, and a part 10 pieces."""
    del book  # the cache is the test's own
    for name, value in {"_PIECE": 10, "_PIECES_AT_ONCE": 1, "_PIECES_OF_A_PART": 10}.items():
        monkeypatch.setattr(token_store, name, value)
    lines = [f"line {number:04}\n" for number in range(pieces)]
    source = ArrayText("x", np.frombuffer("".join(lines).encode(), np.uint8))
    encode_texts, encoded = pairs.encode_texts, []

    def interrupted(texts):
        if len(encoded) == min(35, pieces - 1):
            raise KeyboardInterrupt
        encoded.extend(texts)
        return encode_texts(texts)

    monkeypatch.setattr(pairs, "encode_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_store.load(source, pairs)
    encoded.clear()
    monkeypatch.setattr(pairs, "encode_texts", lambda texts: encoded.extend(texts) or encode_texts(texts))
    tokens = token_store.load(source, pairs)
    assert encoded == lines[finished:]
    assert tokens.tolist() == [token for ids in encode_texts(lines) for token in ids]
    assert isinstance(tokens, np.memmap)
    token_store.load(source, pairs)
    assert encoded == lines[finished:]
    assert not list(cache.folder().glob("*.parts"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(0, 300_000), st.lists(st.integers(1, 250_000), max_size=5), st.sampled_from([b"\n", b" ", b"\xc3\xbc"])
)
def test_pieces_depend_on_the_text_only(count, cuts, separator):
    data = (b"x" * 997 + separator) * (count // 1000)
    whole = list(token_store.split(iter([data])))
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    assert list(token_store.split(data[a:b] for a, b in itertools.pairwise(ends))) == whole
    assert b"".join(whole) == data
    assert all(len(piece) <= 2**16 for piece in whole)
    for piece in whole:
        piece.decode()


def test_a_large_vocabulary_has_32_bits_and_a_lossy_tokenizer_is_refused(data_dir, monkeypatch):
    library = tokenization.library()

    def words(vocabulary):
        model = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="?"))
        model.pre_tokenizer = library.pre_tokenizers.Split("", "isolated")
        return tokenization.FromJson(model.to_str(), "words.json")

    characters = np.frombuffer(b"abab" * 50, np.uint8)
    large = words({"?": 0, "a": 2**16, "b": 1})
    found = token_store.load(ArrayText("x", characters), large)
    assert found.dtype == np.uint32
    assert found[:4].tolist() == [2**16, 1, 2**16, 1]
    lossy = ArrayText("x", np.frombuffer("abäö日本".encode() * 50, np.uint8))
    with pytest.raises(UserError, match=r"words\.json: its tokens stand for 300 of the first 600 bytes of x"):
        token_store.load(lossy, large)
    # Also if only the end of the text is lost, tokenized after the start.
    monkeypatch.setattr(token_store, "_PIECE", 100)
    monkeypatch.setattr(token_store, "_PIECES_AT_ONCE", 1)
    lossy = ArrayText("x", np.frombuffer(b"ab" * 50 + "äö日本".encode() * 50, np.uint8))
    with pytest.raises(UserError, match=r"its tokens stand for 1\d\d of the first 200 bytes of x"):
        token_store.load(lossy, large)
    # The whole text so far counts, not the few bytes of its last part. What is refused leaves nothing in the cache.
    monkeypatch.setattr(token_store, "_PIECES_OF_A_PART", 10)
    almost = ArrayText("x", np.frombuffer(("ab" * 550 + "é").encode(), np.uint8))
    assert len(token_store.load(almost, large)) == 1101
    lossy = ArrayText("x", np.frombuffer(b"ab" * 500 + "é".encode() * 90, np.uint8))
    with pytest.raises(UserError, match=r"its tokens stand for 1,\d\d\d of the first 1,\d\d\d bytes of x"):
        token_store.load(lossy, large)
    assert not list(cache.folder().glob("*.parts"))
    latin = ArrayText("x", np.frombuffer("ü".encode("latin-1") * 9, np.uint8))
    with pytest.raises(UserError, match=r"x is not in UTF-8 \(.*\), which a tokenizer needs"):
        token_store.load(latin, large)


def test_a_long_text_needs_a_cache(book, monkeypatch, tmp_path):
    monkeypatch.setattr(token_store, "LONG", 1000)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot hold text-train-.*: set MESHWORK_CACHE_DIR to a folder with room"):
        book()


def test_a_fingerprint_of_a_long_text_is_one_of_a_sample(monkeypatch):
    tokens = np.arange(10_000, dtype=np.uint16)
    exact = token_store.fingerprint(tokens)
    monkeypatch.setattr(token_store, "LONG", 1000)
    monkeypatch.setattr(token_store, "_SAMPLE_SIZE", 200)
    sampled = token_store.fingerprint(tokens)
    other = tokens.copy()
    other[5000] = 0
    assert len({exact, sampled, token_store.fingerprint(other), token_store.fingerprint(tokens[:-1])}) == 4


def test_prepared_sets_of_texts_are_tokenized_example_by_example(data_dir, book, monkeypatch):
    (data_dir / "input.txt").write_bytes(TEXT)
    own, plain = (book(name="tiny_shakespeare", data_dir=str(data_dir), **x) for x in ({}, {"tokenizer": ""}))
    assert find("tiny_shakespeare", data_dir)
    assert own.tokenizer is not None
    for role, split in own.splits.items():
        assert own.tokenizer.decode(split["text"]).encode() == plain.splits[role]["text"].tobytes()


@pytest.mark.parametrize("names", [("train", "test"), ("train",)])
def test_text_columns_of_hugging_face_sets(data_dir, book, names):
    datasets = pytest.importorskip("datasets")
    rows = [f"Row {n}, über.\n" * (n % 3) for n in range(100)]
    rows[7] = None
    split = datasets.Dataset.from_dict({"text": rows, "a": list(range(100)), "b": list(range(100))})
    # Of several label columns none could be chosen, but a text needs none.
    for column in "ab":
        split = split.cast_column(column, datasets.ClassLabel(num_classes=100))
    datasets.DatasetDict(dict.fromkeys(names, split)).save_to_disk(data_dir / "set")
    found = book(name="hf:set", data_dir=str(data_dir))
    texts = {role: found.tokenizer.decode(split["text"]) for role, split in found.splits.items()}
    if names == ("train",):  # the last rows are held out
        parts = {"train": rows[:90], "validation": rows[90:95], "test": rows[95:]}
    else:
        parts = {"train": rows, "test": rows}
    assert texts == {role: "\n".join(row or "" for row in part) for role, part in parts.items()}


def test_a_block_of_rows_is_limited_by_bytes(monkeypatch):
    monkeypatch.setattr(text_source, "_BLOCK", 10)
    rows = [b"a" * 7, b"", b"b" * 25, b"c", b"d" * 8, b""]
    blocks = list(text_source.join(rows))
    assert b"".join(blocks) == b"\n".join(rows)
    assert max(map(len, blocks)) <= 9 + 1 + 25
    records = SimpleNamespace(__getitems__=lambda numbers: [{"text": b"%d" % number} for number in numbers])
    assert list(tfds_records._texts(records, 5, 105)) == [b"%d" % number for number in range(5, 105)]


def test_rows_in_memory_are_hashed_whole():
    datasets = pytest.importorskip("datasets")
    rows = [f"row {n}" for n in range(10)]
    column = ColumnText("x", datasets.Dataset.from_dict({"text": rows}))
    other = ColumnText("x", datasets.Dataset.from_dict({"text": [*rows[:3], "now 3", *rows[4:]]}))
    assert column.size == other.size
    assert column.key != other.key
    assert column.key == ColumnText("x", datasets.Dataset.from_dict({"text": rows})).key


def test_a_part_without_rows_is_an_error_that_leaves_no_entry(data_dir, book):
    datasets = pytest.importorskip("datasets")
    folder = data_dir / ("set" * 50) / ("long" * 40)  # longer together than the name of a file may be
    datasets.Dataset.from_dict({"text": ["One row."] * 8}).save_to_disk(folder)
    with pytest.raises(UserError, match=r"a part of it has no text .* use a longer text, or hold out tokens by"):
        book(name=f"hf:{folder}", data_dir="")
    assert "{}" not in [path.read_text() for path in cache.folder().glob("*/entry.json")]
    assert len(book(name=f"hf:{folder}", data_dir="", test_fraction=0.5).train["text"]) > 5


def _write(path, tokens):
    np.asarray(tokens, "<u2").tofile(path)


def test_files_of_tokens_are_used_as_they_are(data_dir, book, pairs):
    last = len(pairs.names) - 1
    _write(data_dir / "train.bin", np.arange(300))
    _write(data_dir / "val.bin", [7, 8, last])
    (data_dir / "meta.pkl").write_bytes(b"\0")
    found = book(data_dir=str(data_dir))
    assert isinstance(found.train["text"], np.memmap)
    assert found.test["text"].tolist() == [7, 8, last]
    assert found.validation is None
    bare = text.streams(book(data_dir=str(data_dir), tokenizer=""), 2, 8, 2)
    assert bare.label_names == tuple(map(str, range(last + 1)))
    np.testing.assert_array_equal(bare.train["tokens"][1], np.arange(18 * 8, 18 * 8 + 9))
    assert bare.tokenizer.decode(bare.tokenizer.encode("3 310")) == "3 310 "
    alone = book(data_dir=str(data_dir / "train.bin"))
    sizes = [len(split["text"]) for split in (alone.train, alone.validation, alone.test)]
    assert sizes == [270, 15, 15]
    _write(data_dir / "short.bin", range(10))
    with pytest.raises(UserError, match=r"short\.bin has only 10 tokens, too few to hold out 5% of them"):
        book(data_dir=str(data_dir / "short.bin"))
    _write(data_dir / "val.bin", [last + 1])
    with pytest.raises(UserError, match=rf"val\.bin has the token {last + 1}, but .*json has only {last + 1}"):
        book(data_dir=str(data_dir))
    (data_dir / "val.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"val\.bin has 3 bytes: a file of tokens has two for each"):
        book(data_dir=str(data_dir))


def test_a_long_file_is_checked_where_it_is_read(data_dir, book, monkeypatch):
    monkeypatch.setattr(token_files, "LONG", 1000)
    monkeypatch.setattr(token_files, "_AT_ONCE", 10)
    tokens = np.zeros(2000, np.uint16)
    tokens[20] = 60_000  # not in the sample
    _write(data_dir / "long.bin", tokens)
    prepared = text.streams(book(data_dir=str(data_dir / "long.bin"), tokenizer=""), 2, 10, 2)
    assert len(prepared.label_names) == text_sets._GPT2
    assert prepared.train["tokens"][0].tolist() == [0] * 11
    with pytest.raises(UserError, match="the train split has the token 60,000, but the vocabulary only 50,257"):
        np.asarray(prepared.train["tokens"])


def test_ten_billion_tokens_take_no_memory(data_dir):
    """A sparse file: it occupies no disk either."""
    with (data_dir / "train.bin").open("wb") as file:
        file.truncate(2 * 10**10)
        file.seek(2 * 10**10 - 4)
        file.write(np.array([3, 5], "<u2").tobytes())
    _write(data_dir / "val.bin", range(100))
    tracemalloc.start()
    dataset = sources.load(DatasetConfig(name="text", data_dir=str(data_dir)))
    prepared = text.streams(dataset, 1, 128, 1)
    assert prepared.train["tokens"].shape == (78_124_999, 129)
    assert prepared.train["tokens"][[0, 78_124_998]].tolist() == [[0] * 129, [0] * 129]
    assert len(text.streams(dataset, 32, 128, 1).train["first"]) == 78_124_992
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    with pytest.raises(UserError, match="the 9,999,999,999 chunks of the train split do not fit an int32: raise it"):
        text.streams(dataset, 1, 1, 1)
