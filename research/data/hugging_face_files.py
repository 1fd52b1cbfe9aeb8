"""Opens the splits of a Hugging Face data set: a folder, Parquet files, or the local cache, without a network."""

import contextlib
import glob
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.data.file_errors import exists, is_unreadable, unreadable
from research.data.tfds_sets import UnavailableError
from research.errors import UserError

# `datasets` is imported within functions: it is an extra, and takes seconds to import.
if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, DatasetDict

_HUB_NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*){0,2}"


@contextlib.contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Silences `datasets` and keeps it from the network, then restores its settings."""
    import datasets.config
    import huggingface_hub.constants

    # A README.md may list files on the Hub and elsewhere.
    settings: Any
    with contextlib.ExitStack() as stack:
        for settings in (datasets.config, huggingface_hub.constants):
            stack.callback(setattr, settings, "HF_HUB_OFFLINE", settings.HF_HUB_OFFLINE)
            settings.HF_HUB_OFFLINE = True
        stack.callback(datasets.logging.set_verbosity, datasets.logging.get_verbosity())
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns the errors of `datasets` and Arrow, which are of many types, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:  # the outer ones say only that generating the data set failed
            cause = cause.__cause__
        if isinstance(cause, OSError) and is_unreadable(cause):
            raise unreadable(f"hf:{name}", cause) from None
        text = " ".join(str(cause).split())[:300]
        raise UserError(
            f"hf:{name} is damaged, or not a data set ({type(cause).__name__}: {text}): copy or download it again"
        ) from None


def open_splits(name: str, data_dir: str) -> tuple[dict[str, "Dataset"], str]:
    """Returns the data set's splits and its revision."""
    if not name:
        raise UserError("--config.dataset.name=hf: names no data set; use hf:FOLDER or hf:OWNER/NAME")
    path = Path(os.path.expanduser(data_dir), os.path.expanduser(name)).absolute()
    if exists(path):
        return (_open_folder(name, path) if path.is_dir() else _open_parquet(name, {"train": [str(path)]})), ""
    if "/" in name and _has_configs(path.parent):
        return _open_folder(name, path.parent, path.name), ""
    if files := sorted(glob.glob(str(path), recursive=True)):
        return _open_parquet(name, _by_split(files)), ""
    if re.fullmatch(_HUB_NAME, name):
        return _open_cached(name, data_dir)
    raise UserError(f"--config.dataset.name=hf:{name}: no such file or folder: {path}")


def _open_folder(name: str, folder: Path, config: str = "") -> dict[str, "Dataset"]:
    import datasets

    if exists(folder / "dataset_dict.json") or exists(folder / "state.json"):
        return _by_name(datasets.load_from_disk(folder))
    if exists(folder / "README.md"):
        configs = datasets.get_dataset_config_names(str(folder))
        if config not in configs and (config or not datasets.get_dataset_default_config_name(str(folder))):
            raise _choose_config(name, name.removesuffix(f"/{config}"), configs)
    return _convert(name, datasets.load_dataset_builder(str(folder), config or None))


def _has_configs(folder: Path) -> bool:
    import huggingface_hub

    readme = folder / "README.md"
    return exists(readme) and "configs" in (huggingface_hub.metadata_load(readme) or {})


def _by_name(splits: "Dataset | DatasetDict") -> dict[str, "Dataset"]:
    return {str(split): splits[split] for split in splits} if isinstance(splits, dict) else {"train": splits}


def _choose_config(name: str, base: str, configs: list[str]) -> UserError:
    choices = ", ".join(f"hf:{base}/{config}" for config in configs)
    return UserError(f"--config.dataset.name=hf:{name}: choose a config of the data set: {choices}")


def _by_split(files: list[str]) -> dict[str, list[str]]:
    """Groups files by the split in their names, as `datasets` does for the files of a folder; by default "train"."""
    from datasets.data_files import SPLIT_KEYWORDS

    splits: dict[str, list[str]] = {}
    for file in files:
        stem = Path(file).stem
        numbered = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", stem)
        words = set(re.split(r"[\W\d_]+", stem))
        split = next((str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)), "train")
        splits.setdefault(numbered[1] if numbered else split, []).append(file)
    return splits


def _open_parquet(name: str, files: dict[str, list[str]]) -> dict[str, "Dataset"]:
    import datasets

    for file in (file for split in files.values() for file in split):
        if not file.endswith(".parquet"):
            raise UserError(f"--config.dataset.name=hf:{name}: {file} is not a Parquet file (*.parquet)")
    escaped = {split: [glob.escape(file) for file in group] for split, group in files.items()}
    return _convert(name, datasets.load_dataset_builder("parquet", data_files=escaped))


def _convert(name: str, builder: "DatasetBuilder") -> dict[str, "Dataset"]:
    if not exists(Path(builder.cache_dir)):
        print(f"converting hf:{name} to Arrow in {builder.cache_dir} once ...", file=sys.stderr, flush=True)
    builder.download_and_prepare()
    return _by_name(builder.as_dataset())


def _open_cached(name: str, data_dir: str) -> tuple[dict[str, "Dataset"], str]:
    import datasets.config
    import huggingface_hub
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    parts = name.split("/")
    repository, config = "/".join(parts[:2]), "".join(parts[2:])
    # `load_dataset` stores Arrow files in OWNER___NAME/CONFIG/VERSION/REVISION, ...
    cache = Path(os.path.expanduser(data_dir)) if data_dir else datasets.config.HF_DATASETS_CACHE
    *owner, base = parts[:2]
    folder = cache / "___".join([*owner, camelcase_to_snakecase(base)])
    configs = sorted({info.parts[-4] for info in folder.glob("*/*/*/dataset_info.json")})
    if not config and len(configs) > 1:
        raise _choose_config(name, name, configs)
    if config in configs or (configs and not config):
        # What `load_dataset` does offline; but that prefers a folder of this name, and first imports a Hub client.
        builder = Cache(str(cache), base, config or configs[0], version="auto", hash="auto", repo_id=repository)
        return _by_name(builder.as_dataset()), builder.hash or ""
    # ... `hf download` the files of the repository.
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", cache_dir=data_dir or None, local_files_only=True
        )
    except huggingface_hub.errors.LocalEntryNotFoundError:
        arguments = [repository, *([config] if config else [])]
        call = ", ".join([*map(repr, arguments), *([f"cache_dir={data_dir!r}"] if data_dir else [])])
        raise UnavailableError(
            f"hf:{name}",
            f"is neither a file or folder nor in the cache {cache}",
            f'download it by `python -c "import datasets; datasets.load_dataset({call})"` (after `hf auth login`, if '
            "access to it is restricted)",
        ) from None
    return _open_folder(name, Path(snapshot), config), Path(snapshot).name
