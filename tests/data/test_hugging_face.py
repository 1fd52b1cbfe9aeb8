"""Data sets of Hugging Face `datasets`: every format, every way to name them, bad input, and no network."""

import errno
import io
import logging
import os
import re
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from research.data import hugging_face
from research.data.source import DamagedError
from research.data.tfds_sets import UnavailableError
from research.errors import UserError

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")

REVISION = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("cat", "dog", "newt")
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}


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


def encode(number, kind="PNG"):
    """An encoded image; its size and mode depend on the number."""
    shape = (4 + number % 3, 5 + number % 2) + ((3,) if number % 4 else ())
    pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


IMAGES = [encode(number, ("PNG", "JPEG")[number % 2]) for number in range(9)]


def examples(count, features=FEATURES, **columns):
    """A `Dataset` of the first images, with labels 0, 1, 2, 0, ..."""
    columns = {"image": IMAGES[:count], "label": [number % 3 for number in range(count)]} | columns
    columns = {name: [*columns[name]] for name in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def pets():
    return datasets.DatasetDict(train=examples(7), test=examples(4))


def save(dataset, path):
    """Writes a `Dataset` or `DatasetDict` with `save_to_disk`."""
    dataset.save_to_disk(path)
    return str(path)


def save_parquet(splits, folder, name="{split}.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, dataset in splits.items():
        dataset.to_parquet(folder / name.format(split=split))
    return str(folder)


def open_split(name, split="train", data_dir=""):
    return hugging_face.load(str(name), str(data_dir))[1][split]()


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


def test_images_in_files_of_their_own(tmp_path):
    for number, name in enumerate(["cat/a b.png", "cat/b.png", "dog/ü.png"]):
        path = tmp_path / "pets" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))
    names, loaders, _ = hugging_face.load(f"{tmp_path}/pets", "")
    source = loaders["train"]()
    assert names == ("cat", "dog")
    assert [source[number] for number in range(3)] == [{"image": encode(i), "label": i // 2} for i in range(3)]
    path.unlink()
    with pytest.raises(DamagedError, match=f"refers to the file {path}, which is missing"):
        source[2]


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    path = tmp_path / "pets" / "a.png"
    path.write_bytes(IMAGES[0])
    source = open_split(tmp_path / "pets")

    def refuse(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=rf"{path} could not be read \(Permission denied\)"):
        source[0]


def test_an_example_without_an_image_is_damaged(tmp_path):
    source = open_split(save(examples(3, image=[IMAGES[0], None, IMAGES[2]]), tmp_path / "pets"))
    assert source[2]["image"] == IMAGES[2]
    with pytest.raises(DamagedError, match="has no image"):
        source[1]


INTEGERS = datasets.Value("int64")


def test_missing_labels(tmp_path):
    source = open_split(save(examples(4, label=[0, None, 2, -1]), tmp_path / "pets"))
    assert source.labels.tolist() == [0, -1, 2, -1]
    assert [source[number]["label"] for number in range(4)] == [0, -1, 2, -1]


@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_integer_labels_are_numbered(tmp_path, dtype):
    train = examples(3, FEATURES | {"label": datasets.Value(dtype)}, label=[3, None, 0])
    name = save(datasets.DatasetDict(train=train, test=train.select([0])), tmp_path / "pets")
    assert hugging_face.load(name, "")[0] == ("0", "1", "2", "3")
    assert open_split(name).labels.tolist() == [3, -1, 0]
    assert open_split(name, "test").labels.tolist() == [3]


@pytest.mark.parametrize("labels", [[0, 2**40], [None, -1]])
def test_integers_that_are_not_classes_are_no_labels(tmp_path, labels):
    name = save(examples(2, FEATURES | {"label": INTEGERS}, label=labels), tmp_path / "pets")
    assert hugging_face.load(name, "")[0] == ()
    assert open_split(name)[1] == {"image": IMAGES[1]}


def test_no_labels(tmp_path):
    unlabeled = examples(2, {"image": datasets.Image()})
    name = save(unlabeled, tmp_path / "pets")
    assert hugging_face.load(name, "")[0] == ()
    assert open_split(name).labels is None
    name = save(datasets.DatasetDict(train=examples(2), test=unlabeled), tmp_path / "test")
    assert open_split(name, "test")[1] == {"image": IMAGES[1]}


def test_columns_are_found_by_type_then_by_name(tmp_path):
    other = examples(3).rename_columns({"image": "photo", "label": "species"})
    assert open_split(save(other, tmp_path / "other"))[1] == {"image": IMAGES[1], "label": 1}
    several = {
        "mask": datasets.Image(),
        "img": datasets.Image(),
        "coarse_label": datasets.ClassLabel(2),
        "fine_label": datasets.ClassLabel(names=list(NAMES)),
        "label": INTEGERS,
    }
    values = {
        "mask": IMAGES[5:8],
        "img": IMAGES[:3],
        "coarse_label": [0] * 3,
        "fine_label": [0, 1, 2],
        "label": [9] * 3,
    }
    name = save(examples(3, several, **values), tmp_path / "several")
    assert hugging_face.load(name, "")[0] == NAMES
    assert open_split(name)[1] == {"image": IMAGES[1], "label": 1}


def test_columns_that_cannot_be_chosen(tmp_path):
    images = {"left": datasets.Image(), "right": datasets.Image()}
    name = save(examples(2, images, left=IMAGES[:2], right=IMAGES[:2]), tmp_path / "images")
    with pytest.raises(
        UserError, match="/train has several columns of type Image: left, right; rename one of them to i"
    ):
        open_split(name)
    labels = {"image": datasets.Image(), "kind": datasets.ClassLabel(2), "age": datasets.ClassLabel(2)}
    name = save(examples(2, labels, kind=[0, 1], age=[0, 1]), tmp_path / "labels")
    with pytest.raises(UserError, match="/train has several columns of type ClassLabel: kind, age; rename one of them"):
        hugging_face.load(name, "")


def test_a_set_without_images(tmp_path):
    features = {"text": datasets.Value("string"), "image": datasets.Value("binary"), "label": FEATURES["label"]}
    name = save(examples(2, features, text=["a", "b"]), tmp_path / "text")
    with pytest.raises(
        UserError, match=r"only text \(string\), image \(binary\), label \(ClassLabel\); if one of them holds"
    ):
        open_split(name)


def test_splits_must_have_the_same_labels(tmp_path):
    other = examples(2, FEATURES | {"label": datasets.ClassLabel(names=["dog", "cat", "newt"])})
    name = save(datasets.DatasetDict(train=examples(2), test=other), tmp_path / "order")
    with pytest.raises(UserError, match="order/test has other label names than train, or in another order"):
        open_split(name, "test")
    integers = FEATURES | {"label": INTEGERS}
    splits = datasets.DatasetDict(train=examples(2, integers), test=examples(3, integers))
    with pytest.raises(UserError, match="more/test has the label 2, but there are only 2 classes"):
        open_split(save(splits, tmp_path / "more"), "test")


def test_a_damaged_arrow_file(pets, tmp_path):
    path = Path(save(pets, tmp_path / "pets")) / "train" / "data-00000-of-00001.arrow"
    contents = path.read_bytes()
    for damaged in (contents[:-200], b"\0" * len(contents), b""):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"hf:.*pets is damaged, or not a data set \(.*copy or download it again"
        ) as e:
            hugging_face.load(str(tmp_path / "pets"), "")
        assert "\n" not in str(e.value)


def test_offsets_that_point_outside_of_an_arrow_file(tmp_path):
    path = Path(save(examples(3), tmp_path / "pets")) / "data-00000-of-00001.arrow"
    contents = path.read_bytes()
    offsets = np.cumsum([0, *map(len, IMAGES[:3])], dtype=np.int32)
    damaged = np.array([0, 2**30, *offsets[2:]], np.int32)
    assert contents.count(offsets.tobytes()) == 1
    path.write_bytes(contents.replace(offsets.tobytes(), damaged.tobytes()))
    with pytest.raises(UserError, match=r"pets/train is damaged, or not a data set \(ArrowInvalid"):
        open_split(tmp_path / "pets")


def test_a_damaged_parquet_file(pets, tmp_path):
    path = Path(save_parquet(pets, tmp_path / "pets")) / "test.parquet"
    for damaged in (path.read_bytes()[:-9], b"PAR1", b""):
        path.write_bytes(damaged)
        for name in (tmp_path / "pets", path):
            with pytest.raises(UserError, match=r"is damaged, or not a data set") as error:
                hugging_face.load(str(name), "")
            assert "\n" not in str(error.value)


def test_files_that_are_missing(pets, tmp_path):
    name = save(pets, tmp_path / "pets")
    shutil.rmtree(tmp_path / "pets" / "test")
    with pytest.raises(UserError, match=r"pets is damaged, or not a data set \(.*test"):
        hugging_face.load(name, "")


def test_a_full_disk_is_not_damage(pets, tmp_path, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = save_parquet(pets, tmp_path / "pets")
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", fill)
    with pytest.raises(UserError, match=r"could not be read \(No space left on device\)"):
        hugging_face.load(name, "")


@pytest.mark.parametrize("name", ["/no/such/folder", "./pets", "../*.parquet", "a/b/c/d", "two words"])
def test_names_of_nothing(name):
    with pytest.raises(UserError, match=f"^--config.dataset.name=hf:{re.escape(name)}: no such file or folder: /"):
        hugging_face.load(name, "")


def test_no_name_and_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"--config.dataset.name=hf: names no data set; use hf:FOLDER or hf:OWNER"):
        hugging_face.load("", "")
    with pytest.raises(UserError, match=r"hf:\. is damaged, or not a data set \(EmptyDatasetError: .* any data files"):
        hugging_face.load(".", "")


def test_files_of_another_kind(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match=r"notes.txt is not a Parquet file \(\*.parquet\)"):
        hugging_face.load(f"{tmp_path}/notes.txt", "")
