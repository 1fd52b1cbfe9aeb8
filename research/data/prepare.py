"""Prepares CIFAR-10, MNIST and Tiny Shakespeare as TFDS does, but without TensorFlow.

TFDS's own builder and writer are used, so names, features, ids and order are the official ones. Only reading the
archive, for which TFDS needs TensorFlow, is done here. An archive on the local disk takes precedence over a download.
"""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from research.data import archives, cache, tfds_records, tfds_sets
from research.data.file_errors import is_unreadable, unreadable
from research.data.tfds_sets import UnavailableError
from research.errors import UserError

Splits = dict[str, archives.LabeledImages] | dict[str, str]

_CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CONNECT_TIMEOUT_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """The source of a data set.

    Attributes:
      urls: the files to download, which the first reader of `sources` reads.
      sources: the files that may be on disk instead, in order of preference: their names, all of which are needed, and
        their reader.
      label_names: the class names, if TFDS's builder reads them from the archive.
    """

    urls: tuple[str, ...]
    sources: tuple[tuple[tuple[str, ...], Callable[..., Splits]], ...]
    label_names: tuple[str, ...] = ()


def is_preparable(name: str) -> bool:
    """Returns whether `prepare` can prepare this set, in the version that its name gives, if it gives one."""
    base, version = tfds_sets.split_version(name)
    return base in _RECIPES and (not version or version == str(tfds_records.import_tfds().builder_cls(base).VERSION))


def prepare(name: str, folder: Path) -> None:
    """Prepares the set in `folder` from an archive on disk or a download, with a line on stderr.

    Raises:
      UnavailableError: there is no archive and the download failed, or the folder cannot be written.
      UserError: the archive is damaged.
    """
    recipe, found = _RECIPES[name], _on_disk(name, folder)
    tfds = tfds_records.import_tfds()
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = 0  # ten by default: more than three minutes without a network

    def split_generators(dl_manager: Any) -> dict[str, Iterator[tuple[Any, dict[str, Any]]]]:
        paths, read = found or (_download(name, folder, dl_manager), recipe.sources[0][1])
        splits = _read(read, paths)
        print(f"preparing {name} in {folder} once, from {paths[0]} ...", file=sys.stderr, flush=True)
        if recipe.label_names:
            builder.info.features["label"].names = recipe.label_names
        return {split: _examples(name, split, content) for split, content in splits.items()}

    try:
        builder = tfds.builder(name, data_dir=folder)
        if found is None:
            _check_reachable(name, folder, builder.url_infos)
        folder.mkdir(parents=True, exist_ok=True)
        builder._split_generators = split_generators
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints several lines
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        # If two processes prepare at once, TFDS's final rename fails in the second one: the set is there by then.
        if tfds_sets.find(name, folder) is None:
            reason = f"is not prepared, and {folder} cannot be written ({error.strerror or error})"
            raise UnavailableError(name, reason, _remedy(name, folder)) from None


def _remedy(name: str, folder: Path) -> str:
    names = " or ".join(dict.fromkeys(files[0].partition("/")[0] for files, _ in _RECIPES[name].sources[:2]))
    return (
        f"put {names} into {folder}, or set --config.dataset.data_dir=DIR or TFDS_DATA_DIR to a folder that has it or "
        "the prepared set"
    )


def _on_disk(name: str, folder: Path) -> tuple[list[Path], Callable[..., Splits]] | None:
    """Returns the paths of the first source whose files all exist, and its reader."""
    keras = cache.user_folder("KERAS_HOME", ".keras") / "datasets"
    for parent in (folder, folder / "downloads" / "manual", keras):
        for files, read in _RECIPES[name].sources:
            paths = [parent / file for file in files]
            # Not Path.exists, which may raise: an unreadable folder, such as another user's home, has no archive.
            if all(os.path.exists(path) for path in paths):
                return paths, read
    return None


def _check_reachable(name: str, folder: Path, url_infos: dict[str, Any]) -> None:
    """Checks that the server answers within seconds: TFDS has no timeout, and would wait minutes behind a firewall.

    Raises:
      UnavailableError: the server does not answer, and TFDS's download cache does not have the files.
    """
    import requests
    from tensorflow_datasets.core.download import resource

    urls = _RECIPES[name].urls
    cached = [resource.get_dl_fname(url, url_infos[url].checksum) for url in urls if url in url_infos]
    if len(cached) == len(urls) and all(any((folder / "downloads").rglob(file)) for file in cached):
        return
    try:
        requests.head(urls[0], timeout=_CONNECT_TIMEOUT_SECONDS).close()
    except requests.RequestException as error:
        reason = f"no answer from {urlsplit(urls[0]).hostname}: {type(error).__name__}"
        raise _not_downloaded(name, folder, reason) from None
    print(f"downloading {', '.join(urls)} ...", file=sys.stderr, flush=True)


def _download(name: str, folder: Path, dl_manager: Any) -> list[Path]:
    import requests
    from tensorflow_datasets.core.download import download_manager, util

    try:
        return [Path(path) for path in dl_manager.download(list(_RECIPES[name].urls))]
    except (requests.RequestException, util.DownloadError) as error:
        reason = " ".join(str(error).split())
    except download_manager.NonMatchingChecksumError:
        reason = "the downloaded file has a wrong checksum"
    raise _not_downloaded(name, folder, reason)


def _not_downloaded(name: str, folder: Path, reason: str) -> UnavailableError:
    reason = f"is not prepared in {folder} and cannot be downloaded ({reason})"
    return UnavailableError(name, reason, _remedy(name, folder))


def _read(read: Callable[..., Splits], paths: list[Path]) -> Splits:
    try:
        return read(*paths)
    except Exception as error:  # with damaged input, unpickling and decompression can raise anything
        names = ", ".join(map(str, paths))
        if isinstance(error, OSError) and is_unreadable(error):
            raise unreadable(names, error) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{names}: damaged, or not the official file ({reason}); delete or replace it") from error


def _examples(name: str, split: str, content: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields (key, example) pairs, the same as those of TFDS's own builder."""
    if isinstance(content, str):
        yield split, {"text": content}
        return
    from PIL import Image

    for i, (image, label) in enumerate(zip(*content)):
        png = io.BytesIO()  # TFDS stores encoded images unchanged, but needs TensorFlow to encode arrays
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(png, "PNG")
        example = {"image": png.getvalue(), "label": int(label)}
        yield i, example | ({"id": f"{split}_{i:05d}"} if name == "cifar10" else {})


_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_MNIST_FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
# Keras caches the Python archive under names that have changed from version to version.
_CIFAR10_PYTHON = (
    "cifar-10-python.tar.gz",
    "cifar-10-batches-py.tar.gz",
    "cifar-10-batches-py_archive",
    "cifar-10-batches-py-target.tar.gz",
    "cifar-10-batches-py-target_archive",
    "cifar-10-batches-py/cifar-10-batches-py",
    "cifar-10-batches-py-target/cifar-10-batches-py",
    "cifar-10-batches-py",
)
_RECIPES = {
    "cifar10": _Recipe(
        urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        sources=(
            (("cifar-10-binary.tar.gz",), archives.cifar10_binary),
            *(((name,), archives.cifar10_python) for name in _CIFAR10_PYTHON),
            (("cifar-10-batches-bin",), archives.cifar10_binary),
        ),
        label_names=_CIFAR10_LABELS,
    ),
    "mnist": _Recipe(
        urls=tuple(_MNIST_URL + file for file in _MNIST_FILES),
        sources=((_MNIST_FILES, archives.mnist_idx), (("mnist.npz",), archives.mnist_npz)),
    ),
    "tiny_shakespeare": _Recipe(
        urls=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
        sources=((("input.txt",), archives.shakespeare),),
    ),
}
