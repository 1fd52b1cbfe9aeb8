"""Gives tests of data sets a folder of their own, and tests of image folders some pictures."""

import os
import time
import types

import pytest
from picture_folders import add

from research.data import folder_listing


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty folder of data sets; no other source is reachable."""
    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def pets(data_dir):
    add(data_dir, "train/cat/1.png", "train/cat/2.jpg", "train/dog/1.png", "val/dog/1.png", "test/cat/1.png")
    return data_dir


@pytest.fixture
def settled(monkeypatch):
    """Makes every folder look as if it had last changed ten seconds ago."""
    later = types.SimpleNamespace(time=time.time, time_ns=lambda: time.time_ns() + 10**10)
    monkeypatch.setattr(folder_listing, "time", later)


@pytest.fixture
def scanned(monkeypatch, data_dir):
    """The folders below `data_dir` that have been scanned, relative to it."""
    scandir, paths = os.scandir, []

    def recording(path="."):
        relative = os.path.relpath(os.fsdecode(path), data_dir)
        if not relative.startswith(".."):
            paths.append(relative)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", recording)
    return paths
