"""The cache of decoded arrays is exact, and recovers from damage, full disks and killed processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from research.data import cache

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
LABELS = np.arange(20, dtype=np.int32)


class Source:
    """Yields the arrays in pieces, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        for start in range(0, 20, 7):
            yield {"image": IMAGES[start : start + 7], "label": LABELS[start : start + 7]}


def check(arrays):
    np.testing.assert_array_equal(arrays["image"], IMAGES)
    np.testing.assert_array_equal(arrays["label"], LABELS)
    assert (arrays["image"].dtype, arrays["label"].dtype) == (np.uint8, np.int32)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_decoded_once_then_mapped_read_only(cache_dir):
    source = Source()
    for _ in range(2):
        arrays = cache.load("set-1", source)
        check(arrays)
        assert isinstance(arrays["image"], np.memmap)
        assert not arrays["image"].flags.writeable
    assert source.calls == 1
    assert [p.name for p in cache_dir.iterdir()] == ["set-1"]


@hypothesis.given(
    array=hypothesis.extra.numpy.arrays(
        st.sampled_from([np.uint8, np.int32, np.float32]),
        hypothesis.extra.numpy.array_shapes(min_dims=1, max_dims=4, max_side=5),
    ),
    data=st.data(),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_pieces_are_concatenated(tmp_path_factory, array, data):
    cut = data.draw(st.integers(0, len(array)))
    pieces = [{"x": part} for part in (array[:cut], array[cut:])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWORK_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        for _ in range(2):
            loaded = cache.load("x", lambda: iter(pieces))["x"]
            assert loaded.dtype == array.dtype
            np.testing.assert_array_equal(loaded, array)


def test_a_header_grows_from_one_piece_to_millions(cache_dir):
    piece = {"x": np.zeros(100_000, np.uint8)}
    assert cache.load("long", lambda: iter([piece] * 100))["x"].shape == (10_000_000,)


def damage_truncate(entry):
    os.truncate(entry / "image.npy", (entry / "image.npy").stat().st_size - 5)


def damage_one_bit(entry):
    data = bytearray((entry / "image.npy").read_bytes())
    data[-1] ^= 1
    (entry / "image.npy").write_bytes(data)


def damage_header(entry):
    data = (entry / "label.npy").read_bytes()
    (entry / "label.npy").write_bytes(data.replace(b"<i4", b"<u4"))


def damage_pickle(entry):
    np.save(entry / "label.npy", np.array([{}], object), allow_pickle=True)


def damage_missing(entry):
    (entry / "label.npy").unlink()


def damage_empty_summary(entry):
    (entry / "entry.json").write_text("")


def damage_other_summary(entry):
    (entry / "entry.json").write_text(json.dumps([1]))


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_one_bit,
        damage_header,
        damage_pickle,
        damage_missing,
        damage_empty_summary,
        damage_other_summary,
    ],
)
def test_a_damaged_entry_is_decoded_again_with_one_line(damage, cache_dir, capsys):
    source = Source()
    cache.load("set-1", source)
    damage(cache_dir / "set-1")
    check(cache.load("set-1", source))
    assert source.calls == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "set-1 is damaged" in err
    check(cache.load("set-1", source))
    assert source.calls == 2
    assert [p.name for p in cache_dir.iterdir()] == ["set-1"]


def test_an_error_while_decoding_leaves_no_files(cache_dir):
    def decode():
        yield {"x": np.zeros(3)}
        raise ValueError("bad example")

    with pytest.raises(ValueError, match="bad example"):
        cache.load("set-1", decode)
    assert list(cache_dir.iterdir()) == []


def test_works_without_a_cache_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "file" / "below"))
    check(cache.load("a", Source()))
    check(cache.load("b", Source()))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "warning: no cache in" in err


def test_works_with_a_full_disk(cache_dir, monkeypatch, capsys):
    def full(self, array):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache._ArrayWriter, "append", full)
    check(cache.load("a", Source()))
    assert "No space left on device" in capsys.readouterr().err
    assert list(cache_dir.iterdir()) == []


def test_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MESHWORK_CACHE_DIR", "~/mine")
    assert cache.folder() == Path("/home/someone/mine")
    monkeypatch.delenv("MESHWORK_CACHE_DIR")
    assert cache.folder() == Path("/xdg/meshwork")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path("/home/someone/.cache/meshwork")


def test_a_user_without_a_home_gets_the_temporary_folder(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.user_folder("XDG_CACHE_HOME", "x") == Path(tempfile.gettempdir()) / "x"


WRITER = """
import sys, time
import numpy as np
from research.data import cache
def decode():
    for i in range(5):
        print("piece", flush=True)
        time.sleep(float(sys.argv[1]))
        yield {"x": np.full(1000, i, np.uint8)}
x = cache.load("set-1", decode)["x"]
print("sum", int(x.sum()), flush=True)
"""


def start_writer(seconds):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(cache_dir):
    outputs = [process.communicate(timeout=60)[0] for process in [start_writer(0.1), start_writer(0.1)]]
    assert all(output.endswith("sum 10000\n") for output in outputs)
    assert [output.count("piece") for output in outputs] == [5, 5], "they did not run at once"
    assert [p.name for p in cache_dir.iterdir()] == ["set-1"]


def test_a_killed_writers_leftovers_are_no_entry_and_are_removed_after_a_day(cache_dir):
    process = start_writer(30)
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (leftover,) = cache_dir.iterdir()
    source = Source()
    check(cache.load("set-1", source))
    assert source.calls == 1
    assert leftover.exists(), "a process might still have been writing it"
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(leftover, (two_days_ago, two_days_ago))
    cache.load("set-2", source)
    assert sorted(p.name for p in cache_dir.iterdir()) == ["set-1", "set-2"]
