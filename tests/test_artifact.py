"""The artifact's folder: read only if every byte is what was written, and nothing is ever unpickled."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from launch.artifacts import artifact
from launch.artifacts.artifact import ArtifactError


@pytest.fixture
def folder(tmp_path):
    """An artifact of one function, and weights."""
    weights = {"w": np.ones(2, np.float32)}
    described = {"w": {"shape": [2], "dtype": "float32"}}
    manifest = {
        "classes": ["red"],
        "platforms": ["cpu"],
        "weights": described,
        "functions": {"f": {"inputs": {}, "outputs": {}}},
    }
    artifact.write(tmp_path / "a", manifest, weights, {"f": b"a program"})
    return tmp_path / "a"


def test_what_is_read_is_what_was_written(folder):
    found = artifact.read(folder)
    assert found.programs == {"f": b"a program"}
    np.testing.assert_array_equal(found.weights["w"], np.ones(2, np.float32))
    assert found.manifest["functions"]["f"]["file"] == "f.jaxexport"
    for name, entry in found.manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]


def _edit(folder, change):
    """Changes the manifest, and gives it the checksum that its new text has."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = artifact._checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _flip(name):
    def flipped(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return flipped


def _replace(name, data):
    """With a checksum that is right, as an attacker would."""

    def replaced(folder):
        (folder / name).write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _edit(folder, lambda manifest: manifest["files"].update({name: entry}))

    return replaced


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["MESHWORK_TEST_BOMB"],)


def _pickled(folder):
    buffer = io.BytesIO()
    np.savez(buffer, w=np.array([_Bomb(), _Bomb()], object))
    _replace("weights.safetensors", buffer.getvalue())(folder)


def _elsewhere(name):
    def outside(folder):
        (folder.parent / "elsewhere").write_bytes((folder / "weights.safetensors").read_bytes())
        _edit(folder, lambda m: m["files"].update({name.format(folder.parent): m["files"].pop("weights.safetensors")}))

    return outside


def _linked(folder):
    shutil.move(folder / "weights.safetensors", folder.parent / "elsewhere")
    (folder / "weights.safetensors").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_flip("weights.safetensors"), "weights.safetensors does not match its checksum"),
        (_flip("f.jaxexport"), "f.jaxexport does not match its checksum"),
        (
            lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("red", "rot")),
            "checksum",
        ),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is not JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json does not describe a meshwork artifact"),
        (
            lambda f: (f / "weights.safetensors").write_bytes((f / "weights.safetensors").read_bytes() + b"x"),
            "its checksum",
        ),
        (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "more.py").touch(), "'more.py' does not belong to it"),
        (_linked, "weights.safetensors cannot be read"),
        (_elsewhere("../elsewhere"), "names files outside the folder"),
        (_elsewhere("{}/elsewhere"), "names files outside the folder"),
        (lambda f: _edit(f, lambda m: m.update(format_version=1)), "has format version 1, and this program reads 2"),
        (lambda f: _edit(f, lambda m: m.pop("classes")), "its parts do not fit together"),
        (lambda f: _edit(f, lambda m: m["weights"]["w"].update(shape=[3])), "w has another shape"),
        (_pickled, "its parts do not fit together (SafetensorError: "),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_artifact_is_refused_in_words(folder, monkeypatch, damage, words):
    bomb = folder.parent / "unpickled"
    monkeypatch.setenv("MESHWORK_TEST_BOMB", str(bomb))
    damage(folder)
    with pytest.raises(ArtifactError) as error:
        artifact.read(folder)
    assert words in str(error.value)
    assert not bomb.exists()


def test_weights_of_every_kind_come_back_to_the_bit(tmp_path):
    weights = {"a": np.arange(4).astype(ml_dtypes.bfloat16) / 3, "b": np.array(True), "c": np.float32([[1]])}
    weights["d"] = np.arange(6, dtype=np.float32).reshape(2, 3).T  # not contiguous
    manifest = {"functions": {}, "classes": [], "platforms": [], "weights": {}}
    manifest["weights"] = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in weights.items()}
    artifact.write(tmp_path / "x", manifest, weights, {})
    for name, x in artifact.read(tmp_path / "x").weights.items():
        assert (x.dtype, x.tobytes(), x.shape) == (weights[name].dtype, weights[name].tobytes(), weights[name].shape)
    program = "import pathlib\nfrom launch.artifacts import artifact\n"
    program += f"print(artifact.read(pathlib.{tmp_path / 'x'!r}).weights['a'].dtype)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)  # which has no jax
    assert done.stdout == "bfloat16\n", done.stderr
