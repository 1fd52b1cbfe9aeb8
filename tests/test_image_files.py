"""Image files of the network's size are read, alone or in folders; everything else is a clear error."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.artifacts import image_files
from launch.artifacts.artifact import ArtifactError
from research.data import decoding, folder_listing

SHAPE = (4, 6, 3)  # h, w, c
PIXELS = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


def _save(path, array):
    Image.fromarray(np.asarray(array)).save(path)
    return str(path)


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.PNG"])
def test_an_image_of_the_right_size_is_read(tmp_path, name):
    files = [_save(tmp_path / name, PIXELS), _save(tmp_path / "gray.png", PIXELS[..., 0])]
    found = image_files.ImageFiles(files, SHAPE)[np.arange(2)]
    assert (found.dtype, found.shape) == (np.uint8, (2, *SHAPE))
    np.testing.assert_array_equal(found, [PIXELS, PIXELS[..., :1].repeat(3, -1)])


def _cut(path):
    _save(path, PIXELS)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "save", "words"),
    [
        ("none.png", lambda p: None, "no such file"),
        ("folder", lambda p: p.mkdir(), "no such file"),
        ("text.png", lambda p: p.write_text("no image"), "is not an intact image (PNG, JPEG, BMP, WEBP, GIF)"),
        ("x.eps", lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n"), "not an intact image"),
        ("cut.png", _cut, "not an intact image"),
        (
            "large.png",
            lambda p: _save(p, np.zeros((8, 12, 3), np.uint8)),
            "has 12x8 pixels, not 6x4 as this network expects: resize or crop it first",
        ),
    ],
)
def test_an_odd_image_is_named_and_what_is_odd(tmp_path, name, save, words):
    save(tmp_path / name)
    with pytest.raises(ArtifactError) as error:
        image_files.ImageFiles([_save(tmp_path / "good.png", PIXELS), str(tmp_path / name)], SHAPE)[np.arange(2)]
    assert str(error.value).startswith(f"{tmp_path / name} ") or "no such file" in words
    assert words in str(error.value)


def test_a_network_of_other_channels_is_refused():
    with pytest.raises(ArtifactError, match="this network takes 5 channels, and image files have 1 to 4"):
        image_files.ImageFiles([], (4, 6, 5))


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_folder_stands_for_its_image_files_sorted(tmp_path, capsys):
    names = ["a.b/0.webp", "a/0.gif", "a/z.JPG", "b.png", "c.mpo", "d.jpe"]
    _touch(tmp_path / "in", *reversed(names))
    alone, found = str(tmp_path / "any.name"), [str(tmp_path / "in" / name) for name in names]
    assert image_files.list_files([alone, str(tmp_path / "in"), alone]) == [alone, *sorted(found, key=Path), alone]
    assert capsys.readouterr().err == ""


def test_other_files_of_a_folder_are_named_in_one_line(tmp_path, capsys):
    _touch(tmp_path, "in/x.png", "in/._x.png", "in/labels.txt")
    folder = f"{tmp_path / 'in'}"
    assert image_files.list_files([folder]) == [f"{folder}/x.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"not an image file (2): {folder}/._x.png, {folder}/labels.txt")
    _touch(tmp_path, "in/more.txt")
    image_files.list_files([folder, folder])
    (line,) = capsys.readouterr().err.splitlines()
    assert "(6)" in line
    assert line.endswith("more.txt, ...")


def test_the_images_of_a_folder_are_those_that_training_finds(tmp_path):
    _touch(tmp_path, *(f"cat/x{suffix}" for suffix in decoding.SUFFIXES))
    _touch(tmp_path, "cat/.hidden/x.png", "cat/@eaDir/x.png", "cat/__MACOSX/x.png", "cat/deep/x.PNG", "cat/x.txt")
    listing = folder_listing.scan(os.fsencode(tmp_path), {b"cat": 0})
    names = [os.fsdecode(name) for name in folder_listing.split(listing["paths"], listing["ends"])]
    assert sorted(image_files.list_files([str(tmp_path)])) == sorted(str(tmp_path / name) for name in names)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path, capsys):
    _touch(tmp_path, "elsewhere/b.png", "in/a.png")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    found = image_files.list_files([str(tmp_path / "in")])
    assert found == [str(tmp_path / "in/a.png"), str(tmp_path / "in/linked/b.png")]
    assert capsys.readouterr().err == ""


def test_a_folder_without_images_is_refused(tmp_path, monkeypatch):
    _touch(tmp_path, "in/labels.txt")
    with pytest.raises(ArtifactError, match=r"in has no image files \(\.png, .*\): give another folder"):
        image_files.list_files([str(tmp_path / "in")])
    _touch(tmp_path, "in/x.png", "in/closed/y.png")

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    listed = os.scandir  # root may read any folder, so its mode would not do
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ArtifactError, match=r"in/closed cannot be read: Permission denied"):
        image_files.list_files([str(tmp_path / "in")])
