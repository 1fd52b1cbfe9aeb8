"""Data sets of Hugging Face `datasets`: every format, every way to name them, and no network."""

import logging
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from hugging_face_sets import FEATURES, IMAGES, NAMES, examples, open_split, save, save_parquet

from research.data import hugging_face
from research.data.tfds_sets import UnavailableError
from research.errors import UserError

REVISION = "0123456789abcdef0123456789abcdef01234567"


def check_pets(name, data_dir=""):
    """Checks that a name means the data set `pets`; returns the revision and the fingerprints."""
    label_names, loaders, revision = hugging_face.load(str(name), str(data_dir))
    assert label_names == NAMES
    assert {*loaders} == {"train", "test"}
    sources = {split: open_one() for split, open_one in loaders.items()}
    for split, count in (("train", 7), ("test", 4)):
        records = [sources[split][number] for number in range(len(sources[split]))]
        assert records == [{"image": IMAGES[i], "label": i % 3} for i in range(count)]
        assert all(type(record["label"]) is int for record in records)
        np.testing.assert_array_equal(sources[split].labels, [i % 3 for i in range(count)])
        assert sources[split].labels.dtype == np.int32
        assert sources[split].record_name(2) == f"example 2 of {name}/{split}"
        assert sources[split].keys() is None
    return revision, {split: source.fingerprint for split, source in sources.items()}


def test_every_local_format_has_the_same_records_and_fingerprints(pets, tmp_path):
    names = [
        save(pets, tmp_path / "saved"),
        save_parquet(pets, tmp_path / "flat"),
        save_parquet(pets, tmp_path / "hub" / "data", "{split}-00000-of-00001.parquet").removesuffix("/data"),
        save_parquet(pets, tmp_path / "glob [1]", "pets_{split}.parquet").replace("[", "[[]") + "/*.parquet",
        f"{tmp_path}/hub/**/*.parquet",
    ]
    results = [check_pets(name) for name in names]
    assert results == [("", results[0][1])] * len(names)
    assert results[0][1]["train"] != results[0][1]["test"]


def test_shards_are_joined_in_order(pets, tmp_path):
    for split, dataset in pets.items():
        for shard in range(3):
            part = dataset.shard(3, shard, contiguous=True)
            save_parquet({split: part}, tmp_path / "pets", f"{{split}}-0000{shard}-of-00003.parquet")
    check_pets(tmp_path / "pets")
    check_pets(f"{tmp_path}/pets/*.parquet")
    pets.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "test": 2})
    check_pets(tmp_path / "saved")


@pytest.mark.parametrize("name", ["numbers-00000-of-00001.parquet", "numbers.parquet", "test.parquet"])
def test_a_single_file_or_dataset_is_train(tmp_path, name):
    examples(5).to_parquet(tmp_path / name)
    save(examples(5), tmp_path / "saved")
    for path in (tmp_path / name, tmp_path / "saved"):
        assert [*hugging_face.load(str(path), "")[1]] == ["train"]
        assert len(open_split(path)) == 5


def test_a_pattern_finds_the_split_in_each_file_name(tmp_path):
    counts = {"a_training": 1, "rest": 2, "dev-2": 4, "eval": 5, "test-a-00000-of-00001": 6, "contest": 7}
    for name, count in counts.items():
        examples(count).to_parquet(tmp_path / f"{name}.parquet")
    _, loaders, _ = hugging_face.load(f"{tmp_path}/*.parquet", "")
    lengths = {split: len(open_one()) for split, open_one in loaders.items()}
    assert lengths == {"train": 1 + 2 + 7, "validation": 4, "test": 5 + 6}


def test_relative_paths_start_from_data_dir_or_the_working_directory(pets, tmp_path, monkeypatch):
    save(pets, tmp_path / "sets" / "pets")
    save(datasets.DatasetDict(train=examples(1)), tmp_path / "work" / "pets")
    check_pets("pets", tmp_path / "sets")
    assert len(open_split("pets")) == 1
    check_pets("../sets/pets")
    monkeypatch.setenv("HOME", str(tmp_path / "sets"))
    check_pets("~/pets")


def test_the_default_cache_holds_converted_files_whatever_data_dir_is(pets, tmp_path, cache, capfd):
    save_parquet(pets, tmp_path / "sets" / "pets")
    before = sorted((tmp_path / "sets").rglob("*"))
    capfd.readouterr()
    check_pets("pets", tmp_path / "sets")
    (info,) = (cache / "datasets").rglob("dataset_info.json")
    assert capfd.readouterr() == ("", f"converting hf:pets to Arrow in {info.parent} once ...\n")
    check_pets("pets", tmp_path / "sets")
    assert capfd.readouterr() == ("", "")
    assert sorted((tmp_path / "sets").rglob("*")) == before


def store(cache_dir, config="big", repo_id="someone/MyPets"):
    """Stores a config in the cache: big, which is `pets`, or small."""
    from cached_builder import CachedBuilder

    CachedBuilder.configs = {
        "big": datasets.DatasetDict(train=examples(7), test=examples(4)),
        "small": datasets.DatasetDict(train=examples(2)),
    }
    builder = CachedBuilder(str(cache_dir), repo_id.split("/")[-1], config, hash=REVISION, repo_id=repo_id)
    builder.download_and_prepare()


def test_arrow_files_in_the_cache(cache, tmp_path, capfd, caplog):
    store(cache / "datasets")
    store(tmp_path / "other")
    store(cache / "datasets", repo_id="oldpets")
    capfd.readouterr()
    caplog.clear()
    for name, data_dir in (
        ("someone/MyPets", ""),
        ("someone/MyPets/big", ""),
        ("someone/MyPets", tmp_path / "other"),
        ("oldpets", ""),
    ):
        assert check_pets(name, data_dir)[0] == REVISION
    assert capfd.readouterr() == ("", "")
    assert not caplog.messages


def test_of_several_configs_one_must_be_chosen(cache, tmp_path):
    store(cache / "datasets")
    store(cache / "datasets", "small")
    with pytest.raises(
        UserError, match="choose a config of the data set: hf:someone/MyPets/big, hf:someone/MyPets/sma"
    ):
        hugging_face.load("someone/MyPets", "")
    check_pets("someone/MyPets/big")
    assert len(open_split("someone/MyPets/small")) == 2
    with pytest.raises(UnavailableError, match=r"datasets.load_dataset\('someone/MyPets', 'huge'\)"):
        hugging_face.load("someone/MyPets/huge", "")


def configs(folder, default=""):
    """A folder with a README.md that names two configs."""
    big = datasets.DatasetDict(train=examples(7), test=examples(4))
    save_parquet(big, folder / "big", "{split}-00000-of-00001.parquet")
    save_parquet({"train": examples(2)}, folder / "small", "{split}-00000-of-00001.parquet")
    entries = [f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small",)]
    files = "".join(f"  - split: {split}\n    path: big/{split}-*\n" for split in big)
    entries.append(f"- config_name: big\n{default}  data_files:\n{files}")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n# Pets\n")
    return folder


def test_configs_of_a_folder(tmp_path):
    folder = configs(tmp_path / "pets")
    check_pets(folder / "big")
    assert len(open_split(folder / "small")) == 2
    for name in (folder, folder / "huge"):
        with pytest.raises(UserError, match=f"choose a config of the data set: hf:{folder}/small, hf:{folder}/big$"):
            hugging_face.load(str(name), "")
    check_pets(configs(tmp_path / "default", "  default: true\n"))


def test_configs_in_the_working_directory_do_not_hide_the_cache(cache):
    configs(Path.cwd())
    store(cache / "datasets", repo_id="pets")
    assert check_pets("pets")[0] == REVISION
    check_pets("./big")


def test_downloaded_files_in_the_cache(pets, cache, tmp_path):
    for folder in (cache / "hub", tmp_path / "other"):
        repository = folder / "datasets--someone--pets"
        save_parquet(pets, repository / "snapshots" / REVISION / "data", "{split}-00000-of-00001.parquet")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
    assert check_pets("someone/pets")[0] == REVISION
    shutil.rmtree(cache / "hub")
    assert check_pets("someone/pets", tmp_path / "other")[0] == REVISION
    configs(repository / "snapshots" / REVISION)
    assert check_pets("someone/pets/big", tmp_path / "other")[0] == REVISION
    with pytest.raises(UserError, match="choose a config of the data set: hf:someone/pets/small, hf:someone/pets/big"):
        hugging_face.load("someone/pets", str(tmp_path / "other"))


def test_a_set_that_is_not_in_the_cache_is_not_downloaded(cache, tmp_path):
    with pytest.raises(UnavailableError) as error:
        hugging_face.load("someone/pets", "")
    call = "datasets.load_dataset('someone/pets')"
    assert str(error.value) == (
        f"hf:someone/pets is neither a file or folder nor in the cache {cache / 'datasets'}; download it by "
        f'`python -c "import datasets; {call}"` (after `hf auth login`, if access to it is restricted)'
    )
    with pytest.raises(UnavailableError, match=rf"load_dataset\('pets', cache_dir='{tmp_path}'\)"):
        hugging_face.load("pets", str(tmp_path))


def test_files_elsewhere_are_not_downloaded(tmp_path):
    for number, url in enumerate(("https://example.com/train.parquet", "hf://datasets/someone/pets/train.parquet")):
        folder = tmp_path / f"pets{number}"
        folder.mkdir()
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {url}\n---\n")
        with pytest.raises(UserError, match=f"hf:{folder} is damaged, or not a data set"):
            hugging_face.load(str(folder), "")


def test_settings_of_the_library_are_restored(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    hugging_face.load(save(pets, tmp_path / "pets"), "")
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_import_logs_nothing(tmp_path, monkeypatch, caplog):
    text = "import logging; logging.getLogger('datasets').info('JAX version'); raise ImportError"
    (tmp_path / "datasets.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "datasets")
    level = logging.getLogger("datasets").level
    with caplog.at_level(logging.INFO), caplog.at_level(logging.NOTSET, "datasets"), pytest.raises(UnavailableError):
        hugging_face.load("x", "")
    assert not caplog.messages
    assert logging.getLogger("datasets").level == level


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UnavailableError, match=r"hf:x needs Hugging Face datasets; install it with pip install -e '.\[h"
    ):
        hugging_face.load("x", "")


def test_the_fingerprint_depends_on_the_contents_only(tmp_path):
    def fingerprint(name, **changes):
        return open_split(save(examples(6, **changes), tmp_path / name)).fingerprint

    original = fingerprint("pets")
    assert open_split(shutil.copytree(tmp_path / "pets", tmp_path / "copy")).fingerprint == original
    renamed = FEATURES | {"label": datasets.ClassLabel(names=["cat", "dog", "eft"])}
    others = [
        fingerprint("labels", label=[0, 1, 2, 0, 1, 1]),
        fingerprint("names", features=renamed),
        fingerprint("image", image=[*IMAGES[:5], IMAGES[5][:-1] + b"\0"]),
        fingerprint("size", image=[*IMAGES[:1], IMAGES[1] + b"\0", *IMAGES[2:6]]),
    ]
    assert len({original, *others}) == 5


def test_threads_read_at_the_same_time(tmp_path):
    examples(9).save_to_disk(tmp_path / "pets", num_shards=4)
    source = open_split(tmp_path / "pets")
    order = np.random.default_rng(0).integers(0, 9, 2000)
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(source.__getitem__, order.tolist()))
    assert records == [{"image": IMAGES[number], "label": number % 3} for number in order]
