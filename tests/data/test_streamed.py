"""Examples that are read when needed are the same for any batch, process and restart."""

import jax
import numpy as np
import photographs
import pytest
from photographs import Records, book_config, read_training

from research import sharding
from research.config import Config
from research.data import check, decoding, pipeline, sources
from research.data.source import Subset
from research.data.streamed import Column, StreamedSplit
from research.dataset_config import DatasetConfig
from research.errors import UserError

CONFIG = book_config(data_dir="my shelf")


def test_columns_behave_like_arrays():
    split = StreamedSplit("train", Records(weight=lambda i: np.full(2, i / 2)), CONFIG)
    assert {name: (x.shape, x.dtype.name, len(x), x.ndim) for name, x in split.items()} == {
        "image": ((20, 16, 16, 3), "uint8", 20, 4),
        "label": ((20,), "int32", 20, 1),
        "weight": ((20, 2), "float32", 20, 2),
    }
    array = np.asarray(split["image"])
    assert array.shape == (20, 16, 16, 3)
    for index in (3, -1, slice(2, 9, 3), [5, 0, 5], np.array([[1, 2], [3, 4]]), np.arange(20) > 15):
        np.testing.assert_array_equal(split["image"][index], array[index])
    np.testing.assert_array_equal(split["image"][:5, ::2, 3], array[:5, ::2, 3])
    np.testing.assert_array_equal(split["label"][:], np.arange(20) % 3)
    np.testing.assert_array_equal(split["weight"][4], [2, 2])
    with pytest.raises(IndexError):
        split["image"][20]


def test_reading_one_feature_does_not_decode_the_images(monkeypatch):
    split = StreamedSplit("test", Records(), CONFIG)
    monkeypatch.setattr(decoding, "decode_center", lambda *_: pytest.fail("an image was decoded"))
    assert len(np.asarray(split["label"])) == 20


def test_a_crop_depends_on_seed_epoch_and_number_only():
    split = StreamedSplit("train", Records(), CONFIG)
    together = read_training(split, np.arange(20).reshape(4, 5))
    assert together["image"].shape == (4, 5, 16, 16, 3)
    assert together["label"].shape == (4, 5)
    alone = np.stack([read_training(split, [i])["image"][0] for i in reversed(range(20))])[::-1]
    np.testing.assert_array_equal(together["image"].reshape(alone.shape), alone)
    other = StreamedSplit("train", Records(), CONFIG)
    np.testing.assert_array_equal(read_training(other, [7])["image"][0], alone[7])
    for changes in ({"epoch": 1}, {"seed": 1}):
        changed = read_training(split, np.arange(20), **changes)["image"]
        assert all((x != y).any() for x, y in zip(changed, alone))


def test_evaluation_is_the_center_of_each_image():
    split = StreamedSplit("test", Records(), book_config(center_crop=1.0))
    arrays, intact = split.evaluation(np.array([[3, 4]]))
    assert intact.all()
    assert intact.shape == (1, 2)
    assert arrays["image"].shape == (1, 2, 16, 16, 3)
    np.testing.assert_array_equal(arrays["label"], [[0, 1]])


def test_training_images_may_have_another_size():
    config = book_config(train_image_size=12)
    train, test = (StreamedSplit(role, Records(), config) for role in ("train", "test"))
    assert train["image"].shape[1:] == (12, 12, 3)
    assert test["image"].shape[1:] == (16, 16, 3)
    assert read_training(train, [0])["image"].shape == (1, 12, 12, 3)


def test_crops_follow_thebook_config():
    whole = [
        read_training(StreamedSplit("train", Records(), book_config(**changes)), np.arange(20))["image"]
        for changes in ({}, {"crop_min_area": 1.0}, {"train_crop": "resize"})
    ]
    assert all((a != b).any() for a in whole for b in whole if a is not b)
    configs = [book_config(center_crop=fraction) for fraction in (0.5, 1.0)]
    fractions = [StreamedSplit("test", Records(), config)["image"][:] for config in configs]
    assert (fractions[0] != fractions[1]).any()


def test_a_batch_is_read_by_several_threads():
    records = Records(64)
    read_training(StreamedSplit("train", records, CONFIG), np.arange(64))
    assert len({name for number, name in records.reads[1:]} - {"MainThread"}) >= 1
    assert sorted(number for number, _ in records.reads[1:]) == list(range(64))


def test_statistics_are_those_of_a_fixed_sample_spread_over_the_split():
    records = Records(30)
    column = StreamedSplit("train", records, CONFIG)["image"]
    assert isinstance(column, Column)
    np.testing.assert_array_equal(column.sample(4), np.asarray(column)[[0, 9, 19, 29]])
    assert len(column.sample()) == 30


def test_a_subset_has_the_records_labels_and_names_of_its_source():
    records = Records(10)
    records.labels = np.arange(10, dtype=np.int32)
    part = Subset(records, np.array([7, 2]))
    assert len(part) == 2
    assert part[0]["label"] == 7 % 3
    assert part.record_name(1) == "page 2"
    np.testing.assert_array_equal(part.labels, [7, 2])
    assert part.fingerprint != Subset(records, np.array([2, 7])).fingerprint != records.fingerprint
    split = StreamedSplit("train", part, CONFIG)
    np.testing.assert_array_equal(split["label"], [7, 2])  # known without reading


def test_streaming_gives_the_pixels_of_the_resident_set():
    resident = sources.load(DatasetConfig(name="digits"))
    streamed = sources.load(DatasetConfig(name="digits", image_size=32, train_crop="resize", center_crop=1.0))
    numbers = np.arange(100)
    np.testing.assert_array_equal(read_training(streamed.train, numbers)["image"], resident.train["image"][:100])
    np.testing.assert_array_equal(streamed.test["image"][:], resident.test["image"])
    np.testing.assert_array_equal(streamed.test["label"], resident.test["label"])
    assert not resident.train.keys() - streamed.train.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_crop": "resize"}, "train_crop=resize: no effect with --config.dataset.image_size=0"),
        (
            {"crop_min_area": 0.5},
            "crop_min_area=0.5: no effect with .*, or restore --config.dataset.crop_min_area=0.08",
        ),
        ({"center_crop": 0.5}, "center_crop=0.5: no effect with --config.dataset.image_size=0"),
        ({"train_image_size": 16}, "train_image_size=16: no effect with --config.dataset.image_size=0"),
        ({"max_damaged": 1}, "max_damaged needs --config.dataset.image_size"),
        (
            {"image_size": 32, "train_crop": "resize", "crop_min_area": 0.5},
            "no effect .*train_crop=resize",
        ),
        ({"name": "pydoc", "image_size": 32}, "pydoc has no images"),
    ],
)
def test_fields_without_effect_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        sources.load(DatasetConfig(**{"name": "digits"} | changes))


def test_the_check_lists_every_damaged_example(tmp_path, capsys):
    folder = photographs.make_folder(tmp_path / "pets")
    assert check.run(["folder", f"--data_dir={folder}"]) == 0
    (folder / "train/cat/3.jpg").write_bytes(b"no image")
    data = (folder / "test/dog/1.jpg").read_bytes()
    (folder / "test/dog/1.jpg").write_bytes(data[: len(data) // 2])
    capsys.readouterr()
    assert check.run(["folder", f"--data_dir={folder}"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[-1] == "folder: 2 of 36 examples are damaged"
    assert any("train/cat/3.jpg is not an intact image" in line for line in lines)
    assert any("test/dog/1.jpg is not an intact image" in line for line in lines)
    assert check.run(["digits"]) == 0
    with pytest.raises(UserError, match="pydoc has no images"):
        check.run(["pydoc"])


def test_each_process_reads_only_its_own_rows(monkeypatch):
    config = Config(batch_size=8, microbatch_size=4, dataset=CONFIG)
    mesh = sharding.make_mesh(config, jax.devices()[:1])

    def batches():
        records = Records(24)
        split = StreamedSplit("train", records, CONFIG)
        records.reads.clear()
        return records, pipeline.TrainBatches(split, config, mesh, resident=False, capacity=1)

    whole = batches()[1].local_batch(4)
    for rows in ([0, 1], [2, 3], [1, 3]):
        monkeypatch.setattr(pipeline.TrainBatches, "_local_rows", lambda *_, rows=rows: np.array(rows))
        records, part = batches()
        batch = part.local_batch(4)
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name], whole[name][:, rows])
        assert sorted(number for number, _ in records.reads) == sorted(whole.index[:, rows].ravel().tolist())


def test_training_may_start_at_any_step_without_reading_what_came_before():
    config = Config(batch_size=8, dataset=CONFIG)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    records = Records(24)
    split = StreamedSplit("train", records, CONFIG)
    first = pipeline.TrainBatches(split, config, mesh, resident=False, capacity=1)
    steps = [first.take_local(1) for _ in range(5)]
    late = pipeline.TrainBatches(split, config, mesh, resident=False, capacity=1, start=4)
    np.testing.assert_array_equal(late.take_local(1)["image"], steps[4]["image"])
    first.seek(2)
    np.testing.assert_array_equal(first.take_local(1)["image"], steps[2]["image"])


def test_every_example_is_evaluated_once_for_any_batch_size():
    split = StreamedSplit("test", Records(21, damaged={5}), book_config(max_damaged=1))
    for size in (1, 4, 8, 32):
        config = Config(batch_size=size, dataset=CONFIG)
        batches = pipeline.EvalBatches(split, config, sharding.make_mesh(config, jax.devices()[:1]), resident=False)
        seen = [(batch.index[batch.mask > 0], batch["label"][batch.mask > 0]) for batch in batches]
        numbers, labels = (np.concatenate(part) for part in zip(*seen))
        np.testing.assert_array_equal(numbers, [i for i in range(21) if i != 5])
        np.testing.assert_array_equal(labels, numbers % 3)
