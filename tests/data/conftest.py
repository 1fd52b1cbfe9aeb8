"""Gives tests of data sets a folder of their own."""

import pytest


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
