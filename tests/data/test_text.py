"""Streams of a text are contiguous: no character is lost or counted twice."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research import sharding
from research.config import Config, DatasetConfig
from research.data import pipeline, sources, text
from research.data.sources import Dataset
from research.errors import UserError


def _dataset(train, validation, test):
    def split(count, seed):
        return {"text": np.random.default_rng(seed).integers(97, 123, count).astype(np.uint8)}

    return Dataset("drawn", (), split(train, 0), split(validation, 1) if validation else None, split(test, 2))


def _characters(dataset, tokens):
    return np.array([ord(name) for name in dataset.label_names], np.uint8)[tokens]


def _rows(split, batch_size):
    """Reshapes the examples to [steps, rows, ...]."""
    return {name: np.asarray(x).reshape(-1, batch_size, *x.shape[1:]) for name, x in split.items()}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(count=st.integers(61, 400), batch_size=st.integers(1, 5), length=st.integers(1, 12))
def test_training_reads_contiguous_streams(count, batch_size, length):
    dataset = _dataset(count, 0, 50)
    prepared = text.streams(dataset, batch_size, length, 3)
    assert not prepared.shuffle
    assert prepared.validation is None
    rows = _rows(prepared.train, batch_size)
    tokens = _characters(prepared, rows["tokens"])
    np.testing.assert_array_equal(tokens[1:, :, 0], tokens[:-1, :, -1])  # row i continues row i, by one overlap
    read = tokens[:, :, :-1].transpose(1, 0, 2).ravel()
    np.testing.assert_array_equal(read, dataset.train["text"][: len(read)])
    assert count - 1 - len(read) < batch_size * length
    assert rows["first"][0].all()
    assert not rows["first"][1:].any()
    assert (rows["count"] == length).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(count=st.integers(2, 200), batch_size=st.integers(1, 6), length=st.integers(1, 15))
def test_evaluation_counts_every_character_once_after_a_warm_up(count, batch_size, length):
    dataset = _dataset(200, 30, count)
    prepared = text.streams(dataset, 2, length, batch_size)
    rows, original = _rows(prepared.test, batch_size), dataset.test["text"]
    tokens = _characters(prepared, rows["tokens"])
    assert (rows["count"][0] == 0).all()
    counted = []
    for row in range(batch_size):
        position = None  # of the next character within the stream
        for step in range(len(tokens)):
            number = rows["count"][step, row]
            if rows["first"][step, row]:
                position = len(counted) - (length if step == 0 and row else 0)
            if number or (step == 0 and row and len(counted) < count - 1):
                assert position is not None
                whole = number if step else length
                np.testing.assert_array_equal(tokens[step, row, : whole + 1], original[position : position + whole + 1])
            counted += tokens[step, row, 1 : number + 1].tolist()
            position = None if position is None else position + length
    assert bytes(counted) == original[1:].tobytes()
    assert rows["first"][0].all()
    assert rows["first"][1, 0]
    assert rows["first"].sum() == batch_size + 1


def test_the_vocabulary_is_the_bytes_of_all_splits():
    parts = ("train \n" * 9, "valid \xff", "test Z")
    dataset = Dataset("drawn", (), *({"text": np.frombuffer(part.encode("latin-1"), np.uint8)} for part in parts))
    prepared = text.streams(dataset, 1, 4, 1)
    assert prepared.label_names == tuple(sorted(set("".join(parts))))
    assert prepared.train["tokens"].dtype == np.uint8


def test_columns_are_computed_when_they_are_read():
    prepared = text.streams(_dataset(400, 0, 50), 4, 7, 3)
    for column in prepared.train.values():
        whole = np.asarray(column)
        assert (whole.shape, whole.dtype, whole.nbytes) == (column.shape, column.dtype, column.nbytes)
        assert (column.ndim, len(column)) == (whole.ndim, len(whole))
        for index in (3, np.int32(5), slice(2, 9), slice(None, None, -2), np.array([[1, 5], [0, 1]], np.int32)):
            np.testing.assert_array_equal(column[index], whole[index])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_all_processes_are_the_batch_of_one(processes, monkeypatch):
    """Simulates each process in turn, which holds and reads only its devices' rows."""
    config = Config(batch_size=8, microbatch_size=4)
    mesh = sharding.make_mesh(config, jax.devices()[:4])
    prepared = text.streams(_dataset(900, 0, 90), 8, 7, 4)
    devices_of_all = jax.sharding.NamedSharding.addressable_devices_indices_map

    def batches():
        options = {"resident": False, "capacity": 1, "shuffle": False}
        return pipeline.TrainBatches(prepared.train, config, mesh, **options).local_batch(3)

    whole, parts = batches(), []
    for process in range(processes):

        def of_process(self, shape, process=process):
            own = mesh.devices.flat[process * 4 // processes : (process + 1) * 4 // processes]
            return {d: i for d, i in devices_of_all(self, shape).items() if d in own}

        with monkeypatch.context() as patch:
            patch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", of_process)
            parts.append(batches())
    for name, expected in whole.features.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], 1), expected)
    assert whole["tokens"].shape == (2, 4, 8)


def test_unsuitable_data_sets_are_an_error():
    assert len(text.streams(_dataset(41, 2, 2), 4, 10, 8).train["count"]) == 4
    with pytest.raises(UserError, match=r"batch_size=4 streams of --config.sequence_length=10 .* the 40 of drawn"):
        text.streams(_dataset(40, 2, 2), 4, 10, 8)
    with pytest.raises(UserError, match="its test split has nothing to predict"):
        text.streams(_dataset(41, 2, 1), 4, 10, 8)
    images = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(2, np.int32)}
    with pytest.raises(UserError, match="digits is not a text: use tiny_shakespeare or pydoc"):
        text.streams(Dataset("digits", ("0",), images, None, images), 4, 10, 8)
    numbers = {"text": np.arange(300)}
    with pytest.raises(UserError, match=r"own/train: the feature text is int64\[300\], not bytes, uint8 \[n\]"):
        text.streams(Dataset("own", (), numbers, None, numbers), 4, 10, 8)


def test_pydoc_is_split_like_tiny_shakespeare():
    dataset = sources.load(DatasetConfig(name="pydoc"))
    assert dataset.validation is not None
    sizes = [len(split["text"]) for split in (dataset.train, dataset.validation, dataset.test)]
    assert sum(sizes) > 300_000
    np.testing.assert_allclose(np.divide(sizes, sum(sizes)), (0.9, 0.05, 0.05), atol=1e-4)
    assert dataset.train["text"].tobytes().startswith(b'The "assert" statement\n')
