"""Reads and writes artifacts: folders with an exported network, checked byte by byte when they are read.

    manifest.json          inputs and outputs of the programs, classes, versions, and a checksum for every file
    weights.safetensors    the arrays, each under its path in the network
    <function>.jaxexport   a program: StableHLO, as serialized by `jax.export`

Nothing is pickled. The checksums detect damage and careless edits. They do not authenticate the author: an artifact is
a program, so run only those that you trust.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import numpy as np
import safetensors
from safetensors.numpy import save

FORMAT, FORMAT_VERSION = "meshwork artifact", 2
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MAX_MANIFEST_BYTES = 2**24


class ArtifactError(Exception):
    """An invalid artifact or request. Its text is one line: what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact whose files have been checked.

    Attributes:
      manifest: "functions" by name, each with "file", "inputs", "outputs" and "preprocessing", "image_files" if it
        takes images (`decoding.describe`), and "context", the tokens that it attends to, if limited; "classes";
        "center_crop", if images of any size are cropped and resized as in evaluation; and more.
      weights: the arrays by name, shared by all functions.
      programs: a serialized `jax.export.Exported` for each function name.
    """

    manifest: dict[str, Any]
    weights: dict[str, np.ndarray]
    programs: dict[str, bytes]


def check_free(out: Path) -> None:
    """Raises `ArtifactError` if `out` exists and is not an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise ArtifactError(f"--out={out} exists and is not an empty folder: give a new folder")


def write(
    out: Path, manifest: Mapping[str, Any], weights: Mapping[str, np.ndarray], programs: Mapping[str, bytes]
) -> str:
    """Writes an artifact atomically: the whole folder appears, or nothing.

    Args:
      out: a new or empty folder.
      manifest: JSON values; checksums and the file of each function are added.
      weights: arrays of any dtype that safetensors supports, bfloat16 included.
      programs: the serialized program of each entry of `manifest["functions"]`.

    Returns:
      The manifest's checksum, which covers the checksums of all files.

    Raises:
      OSError: it could not be written; nothing is left behind.
    """
    functions = {name: {"file": f"{name}.jaxexport"} | manifest["functions"][name] for name in programs}
    files = {functions[name]["file"]: program for name, program in programs.items()} | {WEIGHTS: _serialize(weights)}
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    whole = head | dict(manifest) | {"functions": functions, "files": sums}
    whole |= {"sha256": _checksum(whole)}
    files[MANIFEST] = (json.dumps(whole, indent=2) + "\n").encode()
    new = out.parent / f".{out.name}.{os.getpid()}.new"
    try:
        new.mkdir(parents=True)
        for name, data in files.items():
            with (new / name).open("xb") as file:
                file.write(data)
                os.fsync(file.fileno())
        os.rename(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return whole["sha256"]


def read(folder: Path) -> Artifact:
    """Reads an artifact and checks every file.

    Raises:
      ArtifactError: the folder is not an artifact, or was changed after it was written.
    """
    if not folder.is_dir():
        raise ArtifactError(f"--artifact={folder}: no such folder")
    manifest = _manifest(folder)
    names = {MANIFEST, *manifest["files"]}
    found = {path.name for path in folder.iterdir()}
    if missing := sorted(names - found):
        raise _damaged(folder, f"{missing[0]} is missing")
    if extra := sorted(found - names):
        raise _damaged(folder, f"{extra[0]!r} does not belong to it")
    try:
        data = {name: _checked(folder, name, entry) for name, entry in manifest["files"].items()}
        programs = {name: data[function["file"]] for name, function in manifest["functions"].items()}
        _check_form(manifest)
        return Artifact(manifest, _deserialize(data[WEIGHTS], manifest["weights"]), programs)
    except ArtifactError:
        raise
    except Exception as error:  # the checksums match, but whoever wrote it may have put anything in
        raise _damaged(folder, f"its parts do not fit together ({type(error).__name__}: {error})") from None


def _check_form(manifest: Mapping[str, Any]) -> None:
    """Raises `TypeError` if an entry of the manifest has the wrong type."""
    for name in ("classes", "platforms"):
        if not (isinstance(manifest[name], list) and all(isinstance(x, str) for x in manifest[name])):
            raise TypeError(f"{name} is not a list of names")
    if (crop := manifest.get("center_crop")) is not None and not (isinstance(crop, float) and 0 < crop <= 1):
        raise TypeError(f"center_crop is {crop!r}, not a fraction")
    arrays = [manifest["weights"]]
    for function in manifest["functions"].values():
        if type(function.get("context")) not in (int, type(None)):
            raise TypeError(f"context is {function['context']!r}, not a number of tokens")
        arrays += [function["inputs"], function["outputs"]]
    for entry in (entry for described in arrays for entry in described.values()):
        if not (isinstance(entry["dtype"], str) and all(type(size) in (int, str) for size in entry["shape"])):
            raise TypeError(f"{entry} is not a dtype and a shape")


def _damaged(folder: Path, problem: str) -> ArtifactError:
    return ArtifactError(f"--artifact={folder} is damaged or was changed: {problem}; export it again")


def _checksum(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of the manifest, without the checksum itself."""
    entries = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _contents(folder: Path, name: str, limit: int) -> bytes:
    """Reads at most `limit` + 1 bytes of a file. Links are refused, so that nothing outside the folder is read."""
    try:
        file = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise _damaged(folder, f"{name} is not a regular file")
            return opened.read(limit + 1)
    except OSError as error:
        raise _damaged(folder, f"{name} cannot be read ({error.strerror})") from None


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).exists():
        raise ArtifactError(f"--artifact={folder} has no {MANIFEST}: give a folder that launch.export wrote")
    data = _contents(folder, MANIFEST, _MAX_MANIFEST_BYTES)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        raise _damaged(folder, f"{MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(folder, f"{MANIFEST} does not describe a {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"--artifact={folder} has format version {manifest.get('format_version')!r}, and this program reads "
            f"{FORMAT_VERSION}: use the version that wrote it, or export it again"
        )
    if manifest.get("sha256") != _checksum(manifest):
        raise _damaged(folder, f"{MANIFEST} does not match its checksum")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_PLAIN_NAME.fullmatch, files)) or MANIFEST in files:
        raise _damaged(folder, f"{MANIFEST} names files outside the folder")
    return manifest


def _checked(folder: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    data = _contents(folder, name, int(entry["bytes"]))
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _damaged(folder, f"{name} does not match its checksum")
    return data


def _serialize(weights: Mapping[str, np.ndarray]) -> bytes:
    # safetensors writes an array's memory as it lies: a transposed one would come back scrambled.
    return save({name: np.asarray(array, order="C") for name, array in weights.items()})


def _deserialize(data: bytes, described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    stored = dict(safetensors.deserialize(data))  # `safetensors.numpy.load` does not know bfloat16
    weights = {}
    for name, entry in described.items():
        if stored[name]["shape"] != entry["shape"]:
            raise ValueError(f"{name} has another shape than the manifest says")
        weights[name] = np.frombuffer(stored[name]["data"], np.dtype(entry["dtype"])).reshape(entry["shape"])
    return weights
