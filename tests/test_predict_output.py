"""`launch.predict` prints tables, progress, and file names that are not valid UTF-8."""

import csv
import io
import os
import shutil
import sys

import numpy as np
import pytest
from artifacts import SHAPE, color_images, save_image, write_classifier

from launch import predict
from launch.artifacts import batches
from launch.artifacts.artifact import ArtifactError


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier") / "a")


def test_a_file_name_may_be_any_bytes(classifier, tmp_path, capsys):
    (image,) = color_images(tmp_path, 1)
    odd = str(tmp_path / "caf\udce9.png")
    shutil.copy(image, odd)
    predict.run([f"--artifact={classifier}", odd])
    assert "caf\ufffd.png  " in capsys.readouterr().out
    predict.run([f"--artifact={classifier}", f"--csv={tmp_path / 't.csv'}", odd])
    assert (tmp_path / "t.csv").read_bytes().splitlines()[1].startswith(os.fsencode(odd) + b",")


def _rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_table_has_a_row_for_each_file_and_columns_for_each_rank(classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_SIZE", 2)
    (tmp_path / "in").mkdir()
    names = ["a.png", 'b, "x".png', "c\nd.png", "猫 é.png"]
    colors = np.full(SHAPE, 80, np.uint8) + np.eye(3, dtype=np.uint8)[[0, 1, 2, 0], None, None] * 100
    paths = [save_image(tmp_path / "in" / name, color) for name, color in zip(names, colors)]
    predict.run([f"--artifact={classifier}", f"--csv={tmp_path / 't.csv'}", "--top=2", str(tmp_path / "in")])
    assert capsys.readouterr().out == f"{tmp_path / 't.csv'}\n"
    header, *rows = _rows(tmp_path / "t.csv")
    assert header == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row[0] for row in rows] == paths
    assert [row[1] for row in rows] == ["red", "green", "blue", "red"]
    high, low = np.exp(24 * 180 * 2e-4), np.exp(24 * 80 * 2e-4)
    expected = np.tile([high, low], (4, 1)) / (high + 2 * low)
    np.testing.assert_allclose([[float(row[2]), float(row[4])] for row in rows], expected, rtol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "t.csv"}
    # The same without --csv, with a line for each file.
    predict.run([f"--artifact={classifier}", "--top=3", str(tmp_path / "in")])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [len(line) for line in lines] == [4] * 4
    assert [line[0] for line in lines] == [path.replace("\n", "\ufffd") for path in paths]


def test_no_table_is_left_when_an_image_is_damaged(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_SIZE", 2)
    (tmp_path / "odd.png").write_text("no image")
    with pytest.raises(ArtifactError, match=r"odd\.png is not an intact image"):
        predict.run(
            [f"--artifact={classifier}", f"--csv={tmp_path / 't.csv'}", *color_images(tmp_path), f"{tmp_path}/odd.png"]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "odd.png"]


def test_progress_is_a_line_now_and_then_where_stderr_is_no_terminal(classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batches, "BATCH_SIZE", 2)
    paths = color_images(tmp_path, 5)
    predict.run([f"--artifact={classifier}", *paths])
    assert len(capsys.readouterr().err.splitlines()) == 1  # the speed
    monkeypatch.setattr(batches, "_PROGRESS_SECONDS", -1)
    predict.run([f"--artifact={classifier}", *paths])
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("classify: 2 of 5 images, ")
    assert second.startswith("classify: 4 of 5 images, ")
    assert last.startswith("classify: 5 images, ")


def test_progress_is_a_bar_on_a_terminal(classifier, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(batches, "_PROGRESS_SECONDS", -1)
    predict.run([f"--artifact={classifier}", *color_images(tmp_path)])
    assert "| 0/3 [" in terminal.getvalue()
    assert "of 3 images" not in terminal.getvalue()


def test_names_that_stdout_cannot_encode_are_escaped(classifier, tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    predict.main([f"--artifact={classifier}", save_image(tmp_path / "é.png", np.full(SHAPE, 9, np.uint8))])
    assert rb"\xe9.png  red 0.333" in stdout.buffer.getvalue()
