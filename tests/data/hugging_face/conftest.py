"""Tests of Hugging Face sets have an empty cache and no network."""

import socket

import datasets
import huggingface_hub
import pytest
from hugging_face_sets import examples


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """The attempts to use a network, which fail; there must be none."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    yield attempts
    assert not attempts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and an empty working directory."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture
def pets():
    return datasets.DatasetDict(train=examples(7), test=examples(4))
