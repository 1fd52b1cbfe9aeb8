"""`python -m research.data.resize`: the command, its flags and what it refuses."""

import fcntl
import os

import numpy as np
import pytest
from resizing import NAMES, ListSource, contents, decoded, encoded, example, examples, pixels, read, write

from research.data import resize, resized_copy, sources
from research.data.resized_shards import Job
from research.data.source import DamagedError
from research.dataset_config import DatasetConfig
from research.errors import UserError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(resized_copy, "_LEAST_EXAMPLES", 3)


def test_a_copy_in_use_or_not_a_copy(tmp_path):
    (tmp_path / "pets").mkdir()
    other = os.open(tmp_path / "pets", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="pets is being written by another process"):
        write(tmp_path, example(0))
    os.close(other)
    write(tmp_path, example(0))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"pets has 1\.0\.0 and is not an unfinished copy.*--out"):
        write(tmp_path, example(0))
    assert contents(tmp_path) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out=.*file cannot be written"):
        write(tmp_path / "file", example(0))


@pytest.mark.parametrize(
    ("sources", "names", "message"),
    [
        ({"train": ListSource([])}, NAMES, "the split train has no examples"),
        ({"a.b": ListSource([example(0)])}, NAMES, "the split 'a.b'"),
        ({"train": ListSource([example(0)], channels=4)}, NAMES, "4 channels; JPEG stores 1 or 3"),
        ({"train": ListSource([{"text": b""}])}, (), "no images, only text"),
        ({"train": ListSource([DamagedError("")])}, (), "every example is damaged"),
        ({"train": ListSource([example(0)])}, ("a\nb",), r"class name 'a\\nb' cannot be stored"),
        ({"train": ListSource([example(0)])}, ("\udce4",), r"class name '\\udce4' cannot be stored"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sources_that_cannot_be_copied(tmp_path, sources, names, message):
    with pytest.raises(UserError, match=message):
        resized_copy.write_copy("pets", names, sources, tmp_path, 16)
    assert not list(tmp_path.iterdir())


def test_a_label_that_is_no_class(tmp_path):
    with pytest.raises(UserError, match=r"train: picture 0.jpg: label 2 is not in 0\.\.1"):
        write(tmp_path, example(2), names=("cat", "dog"))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command on a source of 10 examples: returns the exit code, stdout and stderr."""
    monkeypatch.setattr(resize, "open_sources", lambda name, data_dir: (NAMES, {"train": ListSource(examples(10))}))

    def run(*flags):
        try:
            resize.main(flags)
        except SystemExit as exit_:
            return exit_.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def test_the_command(command, tmp_path, monkeypatch):
    monkeypatch.setattr(resize, "_PROGRESS_SECONDS", -1)
    flags = ["--name=folder", "--data_dir=/data/My pets!", f"--out={tmp_path}", "--side=12", "--processes=1"]
    code, stdout, _ = command(*flags)
    assert code == 0
    first, *_, summary, usage = stdout.splitlines()
    assert first.startswith("resize: 3/10 images  00:")
    assert summary.startswith("10 images: 0.0 MB before, 0.0 MB after, ")
    assert usage.endswith(f"1.0.0: use --config.dataset.name=My_pets --config.dataset.data_dir={tmp_path}")
    assert all(min(decoded(x["image"]).shape[:2]) == 12 for x in read(tmp_path / "My_pets" / "1.0.0"))
    assert command(*flags)[0] == 2


def test_the_command_uses_all_cores_and_passes_its_options(command, tmp_path, monkeypatch):
    given = {}

    def write_copy(*args, **options):
        given.update(options, args=args)
        return resized_copy.Copy(tmp_path, 7, 7, 1, 1, ("train: a is broken",))

    monkeypatch.setattr(resized_copy, "write_copy", write_copy)
    monkeypatch.setattr(resize.joblib, "cpu_count", lambda: 5)
    code, stdout, _ = command("--name=mnist:3.0.1", f"--out={tmp_path}", "--quality=80", "--max_damaged=3")
    assert code == 0
    assert "left out: train: a is broken" in stdout
    assert given["args"][0] == "mnist"
    assert given["args"][3:] == (tmp_path, 256)
    assert (given["quality"], given["processes"], given["max_damaged"]) == (80, 5, 3)
    command("--name=mnist", f"--out={tmp_path}", "--processes=2")
    assert given["processes"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out=OUT"], "--name is missing"),
        (["--name=pets"], "--out is missing"),
        (["--name=pets", "--out=OUT", "--side=0"], "side"),
        (["--name=pets", "--out=OUT", "--quality=101"], "quality"),
        (["--name=pets", "--out=OUT", "--processes=0"], "processes"),
        (["--name=pets", "--out=OUT", "--max_damaged=-1"], "max_damaged"),
        (["--name=pets", "--out=OUT", "--sied=3"], "sied"),
        (["--name=pets", "--out=OUT", "extra"], "'extra'"),
        (["--name=pets", "--out=gs://bucket/x"], "a local folder"),
    ],
    ids=str,
)
def test_bad_flags(command, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command(*flags)
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert words in stderr
    assert not list(tmp_path.iterdir())


def test_interrupting_the_command(command, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "write", interrupt)
    code, _, stderr = command("--name=pets", f"--out={tmp_path}", "--processes=1")
    assert (code, stderr.splitlines()[-1]) == (130, "error: interrupted; the same command continues the copy")


@pytest.mark.slow
def test_arrays_of_gray_images_can_be_copied(tmp_path):
    resize.main(["--name=digits", f"--out={tmp_path}", "--side=8", "--processes=1"])
    original = sources.load(DatasetConfig(name="digits"))
    image = decoded(read(tmp_path / "digits_copy/1.0.0", "test")[0]["image"])
    assert image.shape == (8, 8, 3)  # `decoded` makes it RGB
    expected = original.test["image"][0, ..., 0].reshape(8, 4, 8, 4).mean((1, 3))
    np.testing.assert_allclose(image[..., 0], expected, atol=30)


@pytest.mark.parametrize("out", ["pets", "pets/copy", "link"])
def test_a_copy_within_the_set_itself_is_refused(out, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "1.jpg").write_bytes(encoded(pixels(8, 8), "JPEG"))
    (tmp_path / "link").symlink_to(tmp_path / "pets")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        resize.main(["--name=folder", f"--data_dir={tmp_path / 'pets'}", f"--out={tmp_path / out}"])
    assert exit_.value.code == 2
    assert f"is inside the data set, {tmp_path / 'pets'}: give a folder outside it" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_help_lists_every_flag(command):
    code, stdout, _ = command("--help")
    assert code == 0
    assert "python -m research.data.resize" in stdout
    assert all(f"--{name}" in stdout or f"--[no]{name}" in stdout for name in resize.define_flags())


@pytest.mark.parametrize(
    ("name", "data_dir", "expected"),
    [
        ("imagenet2012", "", "imagenet2012"),
        ("imagenet2012:5.1.0", "", "imagenet2012"),
        ("imagenet_resized/64x64", "", "imagenet_resized_64x64"),
        ("hf:food/101", "", "food_101"),
        ("folder", "/data/caltech101/", "caltech101"),
        ("folder", "/data/101 Pets", "images_101_Pets"),
        ("folder", "/data/\u5199\u771f", "images"),
        ("folder", "/data/digits", "digits_copy"),
    ],
)
def test_the_name_of_the_copy(name, data_dir, expected):
    assert resize.copy_name(name, data_dir) == expected
    from tensorflow_datasets.core import naming

    assert naming.is_valid_dataset_name(expected)
