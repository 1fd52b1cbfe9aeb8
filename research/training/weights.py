"""Weights to start from: those of a safetensors file, of another run's checkpoint, or of an exported artifact."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import numpy as np
import safetensors

from research.errors import UserError, brief
from research.models import torch_layout
from research.paths import open_path
from research.training.checkpoint import Checkpoints
from research.training.checkpoint_choice import best_or_newest

FLAG = "--config.init.path"
Names = Mapping[str, tuple[str, ...]]  # in PyTorch, by path, with dots: `Task.torch_names`
_ARTIFACT, _RUN, _WEIGHTS = "manifest.json", "config.json", "weights.safetensors"
_OWN_NAME = re.compile(r"(?:params|model_state)\.(.+?)(?:\.value\.data)?")  # in an artifact
_DTYPES = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}
_COUNTERS = "num_batches_tracked"  # of PyTorch's batch norm, used only without a momentum


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays of a source.

    Attributes:
      shapes: their shapes in this project's layout, by path; arrays of another network have their own names, and those
        of PyTorch that do not fit have their own shapes.
      read: reads arrays: from paths to `jax.Array`s or `jax.ShapeDtypeStruct`s of the shape in `shapes` to arrays with
        their dtypes and shardings. Raises `UserError` if they cannot be read.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Mapping[str, Any]], dict[str, jax.Array]]


def check(text: str) -> None:
    """Raises `UserError` unless `text` names a file or folder that may hold weights."""
    _find(text)


def open_weights(text: str, shapes: Mapping[str, tuple[int, ...]], torch_names: Names) -> Weights:
    """Opens weights.

    Args:
      text: a safetensors file, the workdir of a run, or the folder of an artifact.
      shapes: those of the network's arrays, by path.
      torch_names: the network's `Task.torch_names`.

    Raises:
      UserError: there are no weights, or they cannot be read or are damaged.
    """
    path, kind = _find(text)
    if kind == _RUN:
        return _open_checkpoint(text, path)
    if kind == _ARTIFACT:
        _check_artifact(text, path)
        path = path / _WEIGHTS
    arrays = _by_path(_read_file(text, path), shapes, torch_names)
    return Weights({name: array.shape for name, array in arrays.items()}, lambda like: _placed(arrays, like))


@contextmanager
def _reading(text: str) -> Iterator[None]:
    """Turns the errors of readers into a `UserError`: safetensors, Orbax and fsspec raise types of their own."""
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise UserError(f"{FLAG}={text} is damaged or cannot be read ({brief(error)})") from None


def _find(text: str) -> tuple[Path, str]:
    """Returns the path, and which of its files tells what it is ("" for a safetensors file)."""
    path = open_path(text)
    with _reading(text):
        if path.is_dir():
            kinds = [name for name in (_ARTIFACT, _RUN) if (path / name).exists()]
            if not kinds:
                raise UserError(f"{FLAG}={text}: this folder is neither the workdir of a run nor an artifact")
            return path, kinds[0]
        if not path.exists():
            raise UserError(f"{FLAG}={text}: there is no such file or folder")
    if path.suffix != ".safetensors":
        raise UserError(
            f"{FLAG}={text} is not a .safetensors file: convert it, from PyTorch with "
            "safetensors.torch.save_file(state_dict, 'FILE.safetensors')"
        )
    return path, ""


def _check_artifact(text: str, path: Path) -> None:
    """Raises `UserError` if the weights of an artifact are not those that `launch.export` wrote."""
    with _reading(text):
        expected = json.loads((path / _ARTIFACT).read_bytes())["files"][_WEIGHTS]["sha256"]
        if hashlib.sha256((path / _WEIGHTS).read_bytes()).hexdigest() != expected:
            raise UserError(f"{FLAG}={text}: {_WEIGHTS} does not match its checksum: export it again")


def _read_file(text: str, path: Path) -> dict[str, np.ndarray]:
    with _reading(text):
        stored = safetensors.deserialize(path.read_bytes())  # `safetensors.numpy` does not know bfloat16
        return {name: np.frombuffer(x["data"], _dtype(x["dtype"])).reshape(x["shape"]) for name, x in stored}


def _dtype(name: str) -> np.dtype:
    found = re.fullmatch(r"(BF|F|I|U)(\d+)", name)
    return np.dtype(f"{_DTYPES[found[1]]}{found[2]}" if found else name.lower())  # "BOOL"


def _by_path(
    arrays: dict[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], torch_names: Names
) -> dict[str, np.ndarray]:
    """Renames the arrays of a file to paths, and converts those with names of PyTorch to this project's layout."""
    own = {name: found[1] for name in arrays if (found := _OWN_NAME.fullmatch(name))}
    left = {own.get(name, name).replace(".", "/"): name for name in arrays if not name.endswith(_COUNTERS)}
    named = {}
    for path, shape in shapes.items():
        if path in left:
            named[path] = arrays[left.pop(path)]
            continue
        peers = [name.replace(".", "/") for name in torch_names.get(path.replace("/", "."), ())]
        if peer := next((name for name in peers if name in left), None):
            named[path] = _from_torch(arrays[left.pop(peer)], shape)
    return named | {name: arrays[original] for name, original in left.items()}


def _from_torch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Converts an array to this project's layout if it has this shape, with any number of outputs; else returns it."""
    try:
        return torch_layout.from_torch(array, (*shape[:-1], *array.shape[:1]))  # outputs: our last axis, their first
    except ValueError:
        return array


def _placed(arrays: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, jax.Array]:
    def placed(array: np.ndarray, x: Any) -> jax.Array:
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: array[index].astype(x.dtype))

    return {name: placed(arrays[name], x) for name, x in like.items()}


def _open_checkpoint(text: str, workdir: Path) -> Weights:
    """Opens the best checkpoint of a run, or the newest: the arrays that its evaluation uses."""
    with _reading(text), _checkpoints(workdir) as checkpoints:
        step = best_or_newest(checkpoints)
        if step is None:
            raise UserError(f"{FLAG}={text}: this run has no checkpoint yet")
        record = checkpoints.read_record(step)
    kinds = record["kinds"]
    parts = ["model_state", "params"]
    if any(name.startswith("ema_params.") for name in kinds):
        # The averaged parameters' own batch statistics exist only where there was an evaluation.
        own_statistics = record["progress"]["statistics_step"] == step
        parts = ["model_state", *["ema_model_state"] * own_statistics, "ema_params"]
    found = [(part, re.fullmatch(rf"{part}\.(.+)\.value(?:\.data)?", name)) for part in parts for name in kinds]
    names = {match[1].replace(".", "/"): match[0] for _, match in found if match}

    def read(like: Mapping[str, Any]) -> dict[str, jax.Array]:
        structs = {names[path]: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in like.items()}
        with _reading(text), _checkpoints(workdir) as checkpoints:
            arrays = checkpoints.read_arrays(step, structs, record["checksums"])
        return {path: arrays[names[path]] for path in like}

    # The kinds are such as "float32[3, 8]".
    shapes = {path: tuple(json.loads(f"[{kinds[name].partition('[')[2]}")) for path, name in names.items()}
    return Weights(shapes, read)


def _checkpoints(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir, keep=1, message=lambda _: None, read_only=True)
