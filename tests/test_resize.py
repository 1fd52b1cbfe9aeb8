"""`python -m research.data.resize`: what the copy of an image set contains, and how an unfinished one continues."""

import io
import resource
import signal

import numpy as np
import pytest
from PIL import Image
from resizing import NAMES, ListSource, contents, decoded, encoded, example, examples, pixels, read, rotated, write

from research.data import jpeg, resized_copy, tfds_records, tfds_sets
from research.data.source import DamagedError
from research.errors import RecordError, UserError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(resized_copy, "_LEAST_EXAMPLES", 3)


def test_order_labels_names_and_splits_are_those_of_the_source(tmp_path):
    splits = {"train": ListSource(examples(8)), "test": ListSource(examples(2))}
    calls = []
    copy = resized_copy.write_copy("pets", NAMES, splits, tmp_path, 16, progress=lambda *call: calls.append(call))
    assert copy.path == tmp_path / "pets" / "1.0.0"
    assert calls == [(0, 10), (3, 10), (6, 10), (8, 10), (10, 10)]
    builder = tfds_records.import_tfds().builder_from_directory(copy.path)
    assert tuple(builder.info.features["label"].names) == NAMES
    assert builder.info.disable_shuffling
    assert builder.info.splits["train"].shard_lengths == [3, 3, 2]
    for split, source in splits.items():
        images = read(copy.path, split)
        assert [image["label"] for image in images] == [record["label"] for record in source.records]
        for image, record in zip(images, source.records):
            # The sources are smooth, so any decent filter gives almost the same pixels, and every other image differs.
            width, height = Image.open(io.BytesIO(record["image"])).size
            assert (height, width) == decoded(record["image"]).shape[:2]
            small = Image.open(io.BytesIO(record["image"])).resize((round(width * 16 / height), 16))
            assert np.abs(decoded(image["image"]) - np.asarray(small)).mean() < 3
            assert list(image) == ["image", "label"]
    assert copy.num_examples == 10
    assert copy.bytes_before == sum(len(x["image"]) for source in splits.values() for x in source.records)
    assert copy.bytes_after == sum(len(x["image"]) for split in splits for x in read(copy.path, split))


def test_this_project_reads_the_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "cache"))
    squares = [example(number, encoded(pixels(20 + number, 20 + number, number), "PNG")) for number in range(4)]
    path = write(tmp_path, *squares).path
    assert path == tfds_sets.find("pets", tmp_path)
    names, splits = tfds_sets.load("pets", path)
    assert names == NAMES
    arrays = splits["train"]()
    assert arrays["image"].shape == (4, 16, 16, 3)
    assert arrays["label"].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (encoded(pixels(20, 45), "JPEG", "CMYK", quality=95), pixels(20, 45)),
        (encoded(pixels(45, 20), "PNG", "L"), np.repeat(pixels(45, 20).dot([0.299, 0.587, 0.114])[..., None], 3, -1)),
        (rotated(pixels(20, 30)), np.rot90(pixels(20, 30), -1)),
        (rotated(pixels(10, 12)), np.rot90(pixels(10, 12), -1)),
        (pixels(33, 66), pixels(33, 66)),
        (encoded(pixels(10, 12), "PNG"), pixels(10, 12)),
        (encoded(pixels(10, 12), "JPEG", progressive=True, quality=95), pixels(10, 12)),
    ],
    ids=["CMYK", "gray PNG", "rotated", "small rotated", "array", "small PNG", "small progressive JPEG"],
)
def test_pixels(tmp_path, image, expected):
    (stored,) = read(write(tmp_path, {"image": image, "label": 0}, side=16).path)
    assert stored["image"] is not image
    with Image.open(io.BytesIO(stored["image"])) as opened:
        assert opened.format == "JPEG"
        assert "progressive" not in opened.info
        assert not opened.getexif()
    height, width, _ = expected.shape
    if min(height, width) > 16:
        scale = 16 / min(height, width)
        size = round(width * scale), round(height * scale)
        expected = Image.fromarray(np.uint8(expected)).resize(size, Image.Resampling.LANCZOS)
    found = decoded(stored["image"])
    assert found.shape == np.asarray(expected).shape
    assert np.abs(found - np.asarray(expected)).mean() < 4


def test_resizing_averages_over_all_pixels(tmp_path):
    """Without antialiasing, a checkerboard of single pixels becomes black, white or stripes."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    (stored,) = read(write(tmp_path, {"image": encoded(np.uint8(board), "PNG"), "label": 0}).path)
    assert np.abs(decoded(stored["image"])[2:-2, 2:-2] - 127.5).max() < 8


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_small_jpeg_files_are_copied_byte_for_byte(tmp_path, mode):
    image = encoded(pixels(16, 40), "JPEG", mode, quality=50)
    (stored,) = read(write(tmp_path, {"image": image, "label": 0}, side=16).path)
    assert stored["image"] == image


def test_crops_of_a_copy_are_decoded_without_the_rows_above(tmp_path):
    (stored,) = read(write(tmp_path, {"image": encoded(pixels(128, 100), "JPEG"), "label": 0}, side=64).path)
    header = jpeg.read_header(stored["image"])
    assert header.row_restarts
    _, start = jpeg.decode_rows(stored["image"], header, 40, 50, 1)
    assert start == 32


def test_quality(tmp_path):
    noise = {"image": np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "label": 0}
    low, high = (write(tmp_path / str(quality), noise, side=64, quality=quality).bytes_after for quality in (30, 95))
    assert low < high / 2


def test_gray_sources_and_labels_without_names(tmp_path):
    gray = {"image": pixels(32, 32)[..., :1], "label": 70_000}
    path = write(tmp_path, gray, {"image": encoded(pixels(9, 9), "JPEG", "L")}, names=(), channels=1).path
    first, second = read(path)
    assert [first["label"], second["label"]] == [70_000, -1]
    assert all(Image.open(io.BytesIO(x["image"])).mode == "L" for x in (first, second))
    assert tfds_sets.load("pets", path)[0] == ()


def test_a_set_without_labels(tmp_path):
    path = write(tmp_path, {"image": pixels(32, 32)}, names=()).path
    assert [list(x) for x in read(path)] == [["image"]]


def test_two_processes_write_the_same_bytes(tmp_path):
    expected = contents(write(tmp_path / "one", *examples(10)).path)
    assert len(expected) == 4 + 3  # shards; dataset_info.json, features.json, label.labels.txt
    interrupted = examples(10)
    interrupted[5] = signal.SIGINT  # which Ctrl-C sends to the workers, too, but only the command reacts to it
    assert contents(write(tmp_path / "two", *interrupted, processes=2).path) == expected


def test_a_killed_copy_continues(tmp_path):
    """Two of the four shards kill their worker process, as the operating system does when memory is short."""
    expected = contents(write(tmp_path / "whole", *examples(10)).path)
    good, bad = examples(10), examples(10)
    bad[4] = bad[7] = signal.SIGKILL
    with pytest.raises(UserError, match=r"killed.*same command continues.*--processes") as caught:
        write(tmp_path, *bad, processes=2)
    assert caught.value.exit_code == 5
    assert tfds_sets.find("pets", tmp_path) is None
    (tmp_path / "pets" / ".unfinished" / "pets-train.array_record-00001-of-00004-1.partial").write_bytes(b"torn")
    source = ListSource(good)
    copy = resized_copy.write_copy("pets", NAMES, {"train": source}, tmp_path, 16)
    assert contents(tmp_path / "pets") == {f"1.0.0/{name}": content for name, content in expected.items()}
    assert copy.num_examples == 10


def test_finished_shards_are_not_read_again(tmp_path):
    whole = write(tmp_path / "whole", *examples(10))
    broken = examples(10)
    broken[7] = OSError("a bug in the source")
    with pytest.raises(RecordError):
        write(tmp_path, *broken)
    source, calls = ListSource(examples(10)), []
    copy = resized_copy.write_copy(
        "pets", NAMES, {"train": source}, tmp_path, 16, progress=lambda *call: calls.append(call)
    )
    assert source.num_read == 1 + 4  # the first one shows which features there are
    assert calls == [(6, 10), (9, 10), (10, 10)]
    assert contents(copy.path) == contents(whole.path)
    assert copy.num_resumed == 6
    assert copy.bytes_before == whole.bytes_before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"side": 12}, r"side has changed since it was begun \(16 then, 12 now\)"),
        ({"quality": 95}, r"quality has changed .*\(90 then, 95 now\)"),
        ({"names": ("a", "b", "c")}, "the set of features has changed"),
    ],
    ids=str,
)
def test_other_parameters_do_not_continue_a_copy(tmp_path, changed, message):
    broken = [*examples(5), DamagedError("is broken")]
    with pytest.raises(UserError, match="is broken"):
        write(tmp_path, *broken)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        write(tmp_path, *broken, **changed)
    with pytest.raises(UserError, match="the data set has changed"):
        write(tmp_path, *examples(7))
    assert contents(tmp_path) == before


def test_damaged_examples(tmp_path):
    truncated = example(1)
    truncated["image"] = truncated["image"][:200]
    records = [example(0), truncated, *examples(4), DamagedError("is missing")]
    with pytest.raises(UserError, match=r"train: picture 1\.jpg is not an intact image.*--max_damaged=N"):
        write(tmp_path, *records)
    (tmp_path / "pets" / ".unfinished" / "of a killed process.partial").touch()
    with pytest.raises(UserError, match=r"picture 6\.jpg is missing, and with 1 others more than --max_damaged=1"):
        write(tmp_path, *records, max_damaged=1)
    assert tfds_sets.find("pets", tmp_path) is None
    assert not list(tmp_path.rglob("*.partial"))
    copy = write(tmp_path, *records, max_damaged=2)  # continues, and leaves the last shard empty
    assert [text.partition(" is ")[0] for text in copy.damaged] == ["train: picture 1.jpg", "train: picture 6.jpg"]
    assert copy.num_examples == 5
    assert [x["label"] for x in read(copy.path)] == [0, 0, 1, 2, 0]
    assert tfds_records.import_tfds().builder_from_directory(copy.path).info.splits["train"].shard_lengths == [2, 3, 0]


def test_an_image_too_long_for_jpeg_is_damaged(tmp_path):
    with pytest.raises(UserError, match=r"picture 1\.jpg has 65,501 pixels in a row"):
        write(tmp_path, example(0), {"image": np.zeros((1, 65_501, 3), np.uint8), "label": 0})


def test_a_full_disk(tmp_path, monkeypatch):
    noise = [{"image": np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8), "label": 0} for i in range(6)]
    expected = contents(write(tmp_path / "whole", *noise, side=64).path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(RecordError, match=r"could not be written.*File too large.*same command continues"):
            write(tmp_path, *noise, side=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(write(tmp_path, *noise, side=64).path) == expected
