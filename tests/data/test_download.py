"""Without an archive on disk, `research.data.prepare` downloads it, or fails at once with the reason."""

import hashlib
import http.server
import shutil
import threading

import pytest

from research.data import prepare, tfds_records, tfds_sets
from research.data.tfds_sets import UnavailableError

TEXT = b"To be, or not to be: that is the question. " * 4


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serves TEXT as the only file, and sets Tiny Shakespeare's URL to `path` on this server."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "text").write_bytes(TEXT)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def set_recipe(path, checksum=None):
            url = f"http://127.0.0.1:{server.server_address[1]}/{path}"
            ask_for(url, monkeypatch)
            if checksum:
                tfds = tfds_records.import_tfds()
                known = tfds.builder_cls("tiny_shakespeare").url_infos
                info = next(iter(known.values()))
                monkeypatch.setitem(known, url, type(info)(size=len(TEXT), checksum=checksum, filename="text"))
            return server

        yield set_recipe
        server.shutdown()


def ask_for(url, monkeypatch):
    recipe = prepare._Recipe((url,), prepare._RECIPES["tiny_shakespeare"].sources)
    monkeypatch.setitem(prepare._RECIPES, "tiny_shakespeare", recipe)


def train_text(folder):
    source = tfds_records.import_tfds().data_source("tiny_shakespeare", data_dir=folder, split="train", download=False)
    return source[0]["text"]


def test_without_network_it_fails_at_once_and_leaves_nothing(tmp_path, monkeypatch):
    ask_for("http://127.0.0.1:9/input.txt", monkeypatch)
    with pytest.raises(UnavailableError, match=r"no answer from 127\.0\.0\.1") as caught:
        prepare.prepare("tiny_shakespeare", tmp_path / "data")
    assert "put input.txt into" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_missing_archive_is_downloaded(tmp_path, serve, capfd):
    serve("text")
    prepare.prepare("tiny_shakespeare", tmp_path / "data")
    assert train_text(tmp_path / "data") == TEXT[: int(0.9 * len(TEXT))]
    output = capfd.readouterr()
    assert output.out == ""
    assert [line.split()[0] for line in output.err.splitlines()] == ["downloading", "preparing"]


def test_an_earlier_download_is_used_without_network(tmp_path, serve):
    server = serve("text", hashlib.sha256(TEXT).hexdigest())
    prepare.prepare("tiny_shakespeare", tmp_path)
    shutil.rmtree(tmp_path / "tiny_shakespeare")
    server.shutdown()
    server.server_close()
    prepare.prepare("tiny_shakespeare", tmp_path)
    assert TEXT.startswith(train_text(tmp_path))


@pytest.mark.parametrize(("path", "checksum", "reason"), [("absent", None, "404"), ("text", "0" * 64, "checksum")])
def test_a_failed_download_says_why(tmp_path, serve, path, checksum, reason):
    serve(path, checksum)
    with pytest.raises(UnavailableError, match=reason) as caught:
        prepare.prepare("tiny_shakespeare", tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert tfds_sets.find("tiny_shakespeare", tmp_path / "data") is None
