"""The folder of an exported network: written whole, read only if every byte is what was written.

    manifest.json        what the programs take and give, classes, versions, and a checksum of every file
    weights.npz          the arrays, each under its path in the network
    <function>.jaxexport  a program: StableHLO, as `jax.export` serialises it

Nothing here is pickled, on either side. The checksums find damage and careless changes; they do not say who made an
artifact, and whoever can run `sha256sum` can make others. An artifact is a program: run those that you trust.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # by which NumPy knows the name bfloat16
import numpy as np

FORMAT, FORMAT_VERSION = "meshwork artifact", 1
MANIFEST, WEIGHTS = "manifest.json", "weights.npz"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LARGEST_MANIFEST = 2**24


class ArtifactError(Exception):
    """The artifact, or what is asked of it, is not right. The text is one line: what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What was read, every file checked.

    Attributes:
      manifest: "functions" by name, each with "file", "inputs", "outputs" and "preprocessing"; "classes"; and more.
      weights: the arrays by name, for every function.
      programs: a `jax.export.Exported`, serialised, by the function's name.
    """

    manifest: dict[str, Any]
    weights: dict[str, np.ndarray]
    programs: dict[str, bytes]


def check_free(out: Path) -> None:
    """Raises `ArtifactError` where something is at `out` already, other than an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise ArtifactError(f"--out={out} exists and is not an empty folder: give a new one")


def write(
    out: Path, manifest: Mapping[str, Any], weights: Mapping[str, np.ndarray], programs: Mapping[str, bytes]
) -> str:
    """Writes an artifact: the folder appears with all that is in it, or not at all.

    Args:
      out: a new folder, or an empty one.
      manifest: JSON; the checksums are added, and the files of "functions".
      weights: arrays of any dtype that NumPy can write without pickling.
      programs: by name, those of `manifest["functions"]`.

    Returns:
      The manifest's checksum, which stands for the whole artifact.

    Raises:
      OSError: it could not be written; nothing is left.
    """
    functions = {name: {"file": f"{name}.jaxexport"} | manifest["functions"][name] for name in programs}
    files = {functions[name]["file"]: program for name, program in programs.items()} | {WEIGHTS: _packed(weights)}
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
    """Reads an artifact, each file once, and checks all of it.

    Raises:
      ArtifactError: it is not one, or not as it was written.
    """
    if not folder.is_dir():
        raise ArtifactError(f"--artifact={folder}: there is no such folder")
    manifest = _manifest(folder)
    names = {MANIFEST, *manifest["files"]}
    found = {path.name for path in folder.iterdir()}
    if missing := sorted(names - found):
        raise _wrong(folder, f"{missing[0]} is missing")
    if extra := sorted(found - names):
        raise _wrong(folder, f"{extra[0]!r} does not belong to it")
    try:
        data = {name: _checked(folder, name, entry) for name, entry in manifest["files"].items()}
        programs = {name: data[function["file"]] for name, function in manifest["functions"].items()}
        _check_form(manifest)
        return Artifact(manifest, _unpacked(data[WEIGHTS], manifest["weights"]), programs)
    except ArtifactError:
        raise
    except Exception as error:  # the checksums are right, so it was written like this: anything may be in it
        raise _wrong(folder, f"its parts do not fit together ({type(error).__name__}: {error})") from None


def _check_form(manifest: Mapping[str, Any]) -> None:
    """Raises `TypeError` where a part of the manifest is not of its type."""
    for name in ("classes", "platforms"):
        if not (isinstance(manifest[name], list) and all(isinstance(x, str) for x in manifest[name])):
            raise TypeError(f"{name} is not a list of names")
    arrays = [manifest["weights"]]
    for function in manifest["functions"].values():
        arrays += [function["inputs"], function["outputs"]]
    for entry in (entry for described in arrays for entry in described.values()):
        if not (isinstance(entry["dtype"], str) and all(type(size) in (int, str) for size in entry["shape"])):
            raise TypeError(f"{entry} is not a dtype and a shape")


def _wrong(folder: Path, what: str) -> ArtifactError:
    return ArtifactError(f"--artifact={folder} is damaged or was changed: {what}; export it again")


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Of all that the manifest says, but for the checksum itself."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _contents(folder: Path, name: str, limit: int) -> bytes:
    """A file's bytes, at most one more than `limit`; no link is followed, so nothing outside the folder is read."""
    try:
        file = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise _wrong(folder, f"{name} is not a file")
            return opened.read(limit + 1)
    except OSError as error:
        raise _wrong(folder, f"{name} cannot be read ({error.strerror})") from None


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).exists():
        raise ArtifactError(f"--artifact={folder} has no {MANIFEST}: name a folder that launch.export wrote")
    data = _contents(folder, MANIFEST, _LARGEST_MANIFEST)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        raise _wrong(folder, f"{MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _wrong(folder, f"{MANIFEST} is not of a {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"--artifact={folder} has format version {manifest.get('format_version')!r}, and this program reads "
            f"{FORMAT_VERSION}: use the version that wrote it, or export it again"
        )
    if manifest.get("sha256") != _checksum(manifest):
        raise _wrong(folder, f"{MANIFEST} does not have its checksum")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_PLAIN_NAME.fullmatch, files)) or MANIFEST in files:
        raise _wrong(folder, f"{MANIFEST} names files outside the folder")
    return manifest


def _checked(folder: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    data = _contents(folder, name, int(entry["bytes"]))
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _wrong(folder, f"{name} does not have its checksum")
    return data


def _packed(weights: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: _plain(array) for name, array in weights.items()})  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def _plain(array: np.ndarray) -> np.ndarray:
    """The same bits in a dtype that NumPy has of its own: bfloat16 as uint16."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"uint{8 * array.dtype.itemsize}")


def _unpacked(data: bytes, described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        weights = {name: stored[name] for name in described}
    for name, entry in described.items():
        dtype = np.dtype(entry["dtype"])
        weights[name] = weights[name] if weights[name].dtype == dtype else weights[name].view(dtype)
        if list(weights[name].shape) != entry["shape"]:
            raise ValueError(f"{name} has another shape than the manifest says")
    return weights
