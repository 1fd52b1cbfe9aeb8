"""The `forks` fixture: a process that starts training runs by forking, so that tests can kill them."""

import os
from pathlib import Path

import pytest
from compiling import QUICKLY
from forks import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    # One for all files, since importing everything takes seconds.
    folder = tmp_path_factory.mktemp("forks")
    env = os.environ | {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "XLA_FLAGS": QUICKLY,
        "MESHWORK_CACHE_DIR": str(folder / "cache"),
    }
    env.pop("TFDS_DATA_DIR", None)
    opened = Forks(env, folder)
    yield opened
    opened.close()
