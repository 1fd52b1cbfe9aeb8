"""Each example is seen once an epoch, for any batch size, mesh and number of processes."""

import functools
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research import sharding
from research.config import Config, DatasetConfig
from research.data import pipeline
from research.errors import UserError


def _arrays(count):
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (count, 2, 2, 1), np.uint8), "label": np.arange(count, dtype=np.int32)}


def _mesh(config=None, devices=1):
    return sharding.make_mesh(config or Config(batch_size=8), jax.devices()[:devices])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), count=st.integers(1, 40), batch_size=st.integers(1, 40), num_epochs=st.integers(1, 4)
)
def test_each_example_once_an_epoch(seed, count, batch_size, num_epochs):
    batch_size = min(batch_size, count)
    steps = pipeline.epoch_ends(count, Config(batch_size=batch_size, num_epochs=num_epochs))[-1]
    taken = [pipeline.example_numbers(seed, count, s * batch_size, (s + 1) * batch_size) for s in range(steps)]
    numbers, epochs = (np.concatenate(part) for part in zip(*taken))
    assert len(numbers) > num_epochs * count - batch_size  # less than a batch is unused
    for epoch in range(num_epochs):
        seen = np.sort(numbers[epochs == epoch])
        if epoch < num_epochs - 1:
            np.testing.assert_array_equal(seen, np.arange(count))
        assert len(np.unique(seen)) == len(seen)


def test_each_epoch_and_seed_has_its_own_order():
    orders = [pipeline.example_numbers(seed, 50, e * 50, (e + 1) * 50)[0] for seed in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(orders[1], pipeline.example_numbers(0, 50, 0, 100)[0][50:])


def test_examples_in_their_order_take_no_memory():
    tracemalloc.start()
    numbers, epochs = pipeline.example_numbers(None, 2**31 - 1, 2**31 - 3, 2**31 + 1)
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()
    assert numbers.tolist() == [2**31 - 3, 2**31 - 2, 0, 1]
    assert epochs.tolist() == [0, 0, 1, 1]


def test_a_number_of_steps_ends_training_within_an_epoch():
    """Epochs of 12.5 steps: they end after 12, 25, 37, ... steps."""
    ends = [pipeline.epoch_ends(50, Config(batch_size=4, num_steps=steps)) for steps in (1, 12, 13, 25, 26)]
    assert ends == [[1], [12], [12, 13], [12, 25], [12, 25, 26]]
    with pytest.raises(UserError, match="batch_size=51 is larger"):
        pipeline.epoch_ends(50, Config(batch_size=51, num_steps=1))
    with pytest.raises(UserError, match="num_steps=3000000000: 3,000,000,000 steps do not fit"):
        pipeline.epoch_ends(50, Config(num_steps=3 * 10**9))


def test_a_batch_larger_than_the_set_is_an_error():
    with pytest.raises(UserError, match="batch_size=51 is larger"):
        pipeline.epoch_ends(50, Config(batch_size=51))


def test_more_steps_than_an_int32_counts_are_an_error():
    assert pipeline.epoch_ends(2**31 - 1, Config(batch_size=1, num_epochs=1)) == [2**31 - 1]
    with pytest.raises(UserError, match="num_epochs=1000000000000: 50,000,000,000,000 steps do not fit"):
        pipeline.epoch_ends(50, Config(batch_size=1, num_epochs=10**12))


@pytest.mark.parametrize(("limit", "resident"), [(0.0, False), (1000 / 2**30, True), (999 / 2**30, False)])
def test_what_fits_is_resident(limit, resident):
    config = Config(dataset=DatasetConfig(max_device_gib=limit))
    split = {"image": np.zeros((100, 5), np.uint8)}
    assert pipeline.is_resident(config, split, split, None) is resident


@pytest.mark.parametrize("resident", [True, False])
def test_features_may_have_the_names_of_what_the_pipeline_adds(resident):
    arrays = {name: np.arange(100, 108, dtype=np.int32) for name in ("index", "epoch", "step", "mask", "weight")}
    mesh = sharding.make_mesh(Config(batch_size=8), jax.devices()[:1])
    for make in (pipeline.EvalBatches, functools.partial(pipeline.TrainBatches, capacity=1)):
        batches = make(arrays, Config(batch_size=8), mesh, resident=resident)
        batch = next(iter(batches)) if isinstance(batches, pipeline.EvalBatches) else batches.take(1)
        for feature in batch.gather(batches.data).features.values():
            np.testing.assert_array_equal(feature, 100 + batch.index)


def test_devices_of_one_cpu_share_what_is_resident():
    """Sweeps use each core as a device. The array is misaligned, so that jax cannot alias it."""
    memory = np.arange(64 * 12 + 1, dtype=np.uint8)
    images = memory[1:].reshape(64, 2, 2, 3)
    batches = pipeline.EvalBatches({"image": images}, Config(batch_size=8), _mesh(devices=4), resident=True)
    parts = [part.data for part in batches.data["image"].addressable_shards]
    assert len({part.unsafe_buffer_pointer() for part in parts}) == 1
    for part in parts:
        np.testing.assert_array_equal(part, images)


def _examples(batches, batch):
    """Returns the batch on the host, with its examples, gathered from the resident arrays or streamed."""
    return jax.tree.map(np.asarray, batch).gather(jax.tree.map(np.asarray, batches.data))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("microbatch_size", [0, 4])
def test_streaming_and_residency_give_the_same_batches(devices, microbatch_size):
    config = Config(batch_size=8, microbatch_size=microbatch_size, seed=3)
    mesh = _mesh(config, devices)
    arrays = _arrays(21)
    both = [pipeline.TrainBatches(arrays, config, mesh, resident=r, capacity=3) for r in (True, False)]
    assert set(both[0].data) == {"image", "label"}
    assert not both[1].data
    for number, count in enumerate((3, 1, 2)):
        resident, streamed = (_examples(batches, batches.take(count)) for batches in both)
        size = microbatch_size or 8
        assert resident.index.shape == (3, 8 // size, size)
        for one, other in zip(jax.tree.leaves(resident), jax.tree.leaves(streamed), strict=True):
            np.testing.assert_array_equal(one[:count], other[:count])
        start = 8 * (0, 3, 4)[number]
        expected = pipeline.example_numbers(3, 21, start, start + 8 * count)[0]
        np.testing.assert_array_equal(resident.index[:count].ravel(), expected)
        np.testing.assert_array_equal(resident["label"][:count].ravel(), expected)


@pytest.mark.parametrize("resident", [True, False])
def test_starting_later_gives_the_same_batches(resident):
    config, mesh, arrays = Config(batch_size=8), _mesh(), _arrays(21)
    whole = pipeline.TrainBatches(arrays, config, mesh, resident=resident, capacity=1)
    for _ in range(5):
        whole.take(1)
    late = pipeline.TrainBatches(arrays, config, mesh, resident=resident, capacity=1, start=5)
    np.testing.assert_array_equal(whole.take(1).index, late.take(1).index)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(21, 8), (16, 8), (3, 8), (21, 20), (1, 4)])
def test_evaluation_counts_each_example_once(count, batch_size, resident, devices):
    config = Config(batch_size=batch_size)
    batches = pipeline.EvalBatches(_arrays(count), config, _mesh(config, devices), resident=resident)
    labels, masks = [], []
    shapes = set()
    for inputs in batches:
        examples = _examples(batches, inputs)
        labels.append(examples["label"].ravel())
        masks.append(examples.mask.ravel())
        shapes.add(examples["label"].shape)
    assert len(shapes) == 1  # one compilation serves all
    label, mask = np.concatenate(labels), np.concatenate(masks)
    np.testing.assert_array_equal(label[mask == 1], np.arange(count))
    assert mask.sum() == count


@pytest.mark.parametrize(("processes", "per_process"), [(2, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("resident", [True, False])
def test_the_processes_together_see_each_example_once(processes, per_process, resident, monkeypatch):
    """Simulates each process in turn: it holds only its devices, and provides only its rows of a batch."""
    config = Config(batch_size=16, microbatch_size=8)
    mesh = _mesh(config, 8)
    own_part = {}

    def addressable(process):
        def indices(self, shape):
            devices = mesh.devices.flat[process * per_process : (process + 1) * per_process]
            return {d: i for d, i in self.devices_indices_map(shape).items() if d in devices}

        return indices

    for process in range(processes):
        with monkeypatch.context() as patch:
            patch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", addressable(process))
            batches = pipeline.TrainBatches(_arrays(40), config, mesh, resident=resident, capacity=1)
            own_part[process] = batches.local_batch(1)
    joined = np.concatenate([own_part[p].index for p in range(processes)], axis=1)
    expected = pipeline.example_numbers(0, 40, 16, 32)[0].reshape(2, 8)
    np.testing.assert_array_equal(joined, expected)
    if not resident:
        np.testing.assert_array_equal(np.concatenate([own_part[p]["label"] for p in range(processes)], 1), expected)
