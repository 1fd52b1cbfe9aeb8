"""Examples that cannot be read or do not fit are named, or skipped and counted."""

import concurrent.futures
import errno
import warnings

import numpy as np
import photographs
import pytest
from photographs import Records, book_config, read_training
from PIL import Image

from research.data import decoding, example_reader
from research.data.file_errors import unreadable
from research.data.streamed import StreamedSplit
from research.errors import UserError

CONFIG = book_config(data_dir="my shelf")


def test_a_damaged_example_ends_it_with_its_name_and_the_command_that_finds_the_others():
    split = StreamedSplit("train", Records(damaged={3}), CONFIG)
    command = r"`python -m research\.data\.check book '--data_dir=my shelf'` lists all"
    with pytest.raises(UserError, match=f"^train, page 3 is torn: {command}"):
        read_training(split, np.arange(20))
    split = StreamedSplit("test", Records(damaged={3}), CONFIG)
    with pytest.raises(UserError, match="max_damaged=10"):
        split.evaluation(np.arange(20))


def test_damaged_examples_are_replaced_counted_and_logged_once(capsys):
    split = StreamedSplit("train", Records(damaged={3, 4, 19}), book_config(max_damaged=3))
    for epoch in (0, 1):
        arrays = read_training(split, np.arange(20), epoch)
        np.testing.assert_array_equal(arrays["label"][[3, 4, 19]], [5 % 3, 5 % 3, 0])
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(":")[1] for line in lines} == {f" train, page {number} is torn" for number in (3, 4, 19)}
    assert [line.split(":")[2] for line in lines] == [f" skipped ({i} of at most 3)" for i in (1, 2, 3)]
    split = StreamedSplit("train", Records(damaged={3, 4, 19}), book_config(max_damaged=2))
    with pytest.raises(UserError, match=r"is torn.*max_damaged=10"):
        read_training(split, np.arange(20))


def test_evaluation_leaves_damaged_examples_out():
    split = StreamedSplit("test", Records(damaged={3}), book_config(max_damaged=1))
    arrays, intact = split.evaluation(np.arange(5))
    np.testing.assert_array_equal(intact, [True, True, True, False, True])
    assert not arrays["image"][3].any()


def test_labels_out_of_range_are_damage():
    split = StreamedSplit("train", Records(), CONFIG, num_classes=2)
    with pytest.raises(UserError, match=r"page 2 has the label 2, which is not in 0\.\.1"):
        read_training(split, np.arange(20))


def test_features_whose_shape_varies_are_named():
    split = StreamedSplit("train", Records(boxes=lambda i: np.zeros(i + 1)), CONFIG)
    with pytest.raises(UserError, match=r"train, page 1: boxes is float32\[2\], but float32\[1\] in other examples"):
        read_training(split, np.arange(20))


@pytest.mark.parametrize(
    ("records", "changes", "words"),
    [
        (Records(0), {}, "name=book: the train split has no examples"),
        (Records(4, damaged=range(4)), {}, "none of 3 examples of train is readable: page 0 is torn"),
        (Records(4), {"image_size": 0}, "image files of any size: choose the size .* --config.dataset.image_size=128"),
    ],
)
def test_a_split_that_cannot_be_used_is_named_beforeread_training(records, changes, words):
    with pytest.raises(UserError, match=words):
        StreamedSplit("train", records, book_config(**changes))


def test_all_examples_may_be_damaged_but_one():
    split = StreamedSplit("train", Records(4, damaged={0, 1, 2}), book_config(max_damaged=3))
    np.testing.assert_array_equal(read_training(split, np.arange(4))["label"], [0, 0, 0, 0])
    broken = Records(4)
    split = StreamedSplit("train", broken, book_config(max_damaged=4))
    broken._damaged = range(4)
    with pytest.raises(UserError, match="every example of train is damaged"):
        read_training(split, np.arange(4))


def test_statistics_leave_damaged_examples_out():
    split = StreamedSplit("train", Records(damaged={0}), book_config(max_damaged=1))
    assert split["image"].sample().shape == (19, 16, 16, 3)


def test_labels_may_be_required():
    unlabeled = Records(4)
    unlabeled._features["label"] = lambda number: -1
    split = StreamedSplit("train", unlabeled, CONFIG)
    np.testing.assert_array_equal(read_training(split, np.arange(4))["label"], [-1] * 4)
    split.require_labels()
    with pytest.raises(UserError, match="has the label -1"):
        read_training(split, np.arange(4))


def test_a_file_system_that_is_away_for_a_while_delays_reading(monkeypatch, capsys):
    class Away(Records):
        failures = 2

        def __getitem__(self, number):
            if self.failures:
                self.failures -= 1
                raise unreadable("page.png", OSError(errno.ESTALE, "Stale file handle"))
            return super().__getitem__(number)

    waits = []
    monkeypatch.setattr(example_reader.time, "sleep", waits.append)
    split = StreamedSplit("train", Away(), CONFIG)
    assert (len(split["label"]), waits) == (20, [1, 4])
    assert capsys.readouterr().err.count("Stale file handle") == 2
    away = Away()
    away.failures = 100
    with pytest.raises(UserError, match=r"page\.png could not be read"):
        StreamedSplit("train", away, CONFIG)
    assert waits[2:] == [1, 4, 16, 64]


def test_missing_permission_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(example_reader.time, "sleep", lambda _: pytest.fail("waited"))

    class Forbidden(Records):
        def __getitem__(self, number):
            raise unreadable("page.png", PermissionError(errno.EACCES, "Permission denied"))

    with pytest.raises(UserError, match="Permission denied"):
        StreamedSplit("train", Forbidden(), CONFIG)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ((1, 2), "is a tuple, not a dictionary"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, r"the image is float32\[4, 4, 3\]; it must be"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"the image is uint8\[4, 4\]"),
        ({"image": np.zeros((4, 4, 5), np.uint8)}, r"the image is uint8\[4, 4, 5\]"),
        ({"image": Image.new("F", (4, 4))}, r"the image is float32\[4, 4\]"),
        ({"label": 0.7}, r"the label 0\.7 is not an integer"),
        ({"label": "cat"}, "the label 'cat' is not an integer"),
        ({"label": np.eye(3)[0]}, "is not an integer"),
        ({"label": 2**40}, "has the label 1099511627776"),
        ({"caption": "a cat"}, "caption has the dtype <U5; use numbers"),
    ],
)
def test_records_of_users_that_do_not_fit_are_named(record, words):
    class Own(Records):
        def __getitem__(self, number):
            return super().__getitem__(number) | record if isinstance(record, dict) else record

    with pytest.raises(UserError, match=words):
        StreamedSplit("train", Own(), CONFIG)


def test_bombs_are_found_in_every_thread(monkeypatch):
    """Python's warning filters are not safe for threads, so they must not decide."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    small, large = (photographs.encode(photographs.gradient(*size), "PNG") for size in ((30, 40), (40, 50)))
    filters = list(warnings.filters)

    def is_refused(encoded):
        try:
            decoding.decode(encoded, 3)
        except decoding.ImageError:
            return True
        return False

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        refused = list(threads.map(is_refused, [small, large] * 200))
    assert refused == [False, True] * 200
    assert warnings.filters == filters
