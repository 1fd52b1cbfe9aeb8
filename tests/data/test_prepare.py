"""CIFAR-10, MNIST and Tiny Shakespeare are prepared from their published files as TFDS itself does."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from research.data import archives, prepare, tfds_records, tfds_sets
from research.data.tfds_sets import UnavailableError
from research.errors import UserError

RNG = np.random.default_rng(0)
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
PER_BATCH = 4
CIFAR_IMAGES = RNG.integers(0, 256, (len(BATCHES), PER_BATCH, 32, 32, 3), np.uint8)
CIFAR_LABELS = RNG.integers(0, 10, (len(BATCHES), PER_BATCH))
PLANES = CIFAR_IMAGES.transpose(0, 1, 4, 2, 3).reshape(len(BATCHES), PER_BATCH, 3072)
MNIST = {
    "x_train": RNG.integers(0, 256, (7, 28, 28), np.uint8),
    "y_train": RNG.integers(0, 10, 7, np.uint8),
    "x_test": RNG.integers(0, 256, (3, 28, 28), np.uint8),
    "y_test": RNG.integers(0, 10, 3, np.uint8),
}
TEXT = "To be, or not to be: that is the question. Ça va? " * 4


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes str and bytes as Python 2 wrote its str, which is how the original batches were pickled."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def dumps_python2(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(i):
    return {"data": PLANES[i], "labels": CIFAR_LABELS[i].tolist(), "batch_label": "x", "filenames": ["a.png"] * 4}


def python_files(dumps=dumps_python2):
    return {f"cifar-10-batches-py/{name}": dumps(batch(i)) for i, name in enumerate(BATCHES)}


def binary_files():
    records = np.concatenate([CIFAR_LABELS[..., None].astype(np.uint8), PLANES], axis=-1)
    return {f"cifar-10-batches-bin/{name}.bin": records[i].tobytes() for i, name in enumerate(BATCHES)}


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_folder(path, files):
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / os.path.basename(name)).write_bytes(data)


def write_idx(folder):
    for part, split in {"train": "train", "t10k": "test"}.items():
        x, y = MNIST[f"x_{split}"], MNIST[f"y_{split}"]
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">4I", 0x803, *x.shape) + x.tobytes())
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">2I", 0x801, len(y)) + y.tobytes())


def data_source(name, folder, split):
    return list(tfds_records.import_tfds().data_source(name, data_dir=folder, split=split, download=False))


def check_cifar10(folder):
    path = tfds_sets.find("cifar10", folder)
    assert path is not None
    names, splits = tfds_sets.load("cifar10", path)
    assert names[0] == "airplane"
    assert names[9] == "truck"
    for split, rows in {"train": slice(0, 5), "test": slice(5, 6)}.items():
        images, labels = CIFAR_IMAGES[rows].reshape(-1, 32, 32, 3), CIFAR_LABELS[rows].reshape(-1)
        examples = data_source("cifar10", folder, split)
        numbers = [int(example["id"].decode().removeprefix(f"{split}_")) for example in examples]
        assert sorted(numbers) == list(range(len(images)))
        for i, number in enumerate(numbers):
            np.testing.assert_array_equal(examples[i]["image"], images[number])
            assert examples[i]["label"] == labels[number]
        np.testing.assert_array_equal(splits[split]()["image"], images[numbers])
        np.testing.assert_array_equal(splits[split]()["label"], labels[numbers])


def pickle_python3(value):
    return pickle.dumps({key.encode(): content for key, content in value.items()}, protocol=2)


@pytest.mark.parametrize(
    "write",
    [
        lambda d: write_tar(d / "cifar-10-binary.tar.gz", binary_files()),
        lambda d: write_tar(d / "cifar-10-python.tar.gz", python_files()),
        lambda d: write_tar(d / "downloads/manual/cifar-10-python.tar.gz", python_files(pickle_python3)),
        lambda d: write_folder(d / "cifar-10-batches-bin", binary_files()),
        lambda d: write_folder(d / "cifar-10-batches-py", python_files()),
        lambda d: write_tar(d / "../keras/datasets/cifar-10-batches-py-target_archive", python_files()),
        lambda d: write_folder(d / "../keras/datasets/cifar-10-batches-py/cifar-10-batches-py", python_files()),
    ],
    ids=["binary", "python", "manual-python3", "binary-folder", "python-folder", "keras-archive", "keras-folder"],
)
def test_cifar10_equals_what_tfds_reads_back(write, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    prepare.prepare("cifar10", tmp_path / "data")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    check_cifar10(tmp_path / "data")


@pytest.mark.parametrize("write", [write_idx, lambda d: np.savez_compressed(d / "mnist.npz", **MNIST)])
def test_mnist_equals_what_tfds_reads_back(write, tmp_path):
    write(tmp_path)
    prepare.prepare("mnist", tmp_path)
    for split in ("train", "test"):
        examples = data_source("mnist", tmp_path, split)
        expected = {x.tobytes(): y for x, y in zip(MNIST[f"x_{split}"], MNIST[f"y_{split}"])}
        assert {example["image"].tobytes(): example["label"] for example in examples} == expected
        assert examples[0]["image"].shape == (28, 28, 1)


def test_tiny_shakespeare_is_split_by_characters(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT)
    prepare.prepare("tiny_shakespeare", tmp_path)
    parts = [data_source("tiny_shakespeare", tmp_path, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1, 1, 1]
    texts = [part[0]["text"].decode() for part in parts]
    assert "".join(texts) == TEXT
    assert [len(text) for text in texts] == [180, 10, 10]


@pytest.mark.slow
def test_order_ids_and_labels_equal_those_of_a_set_prepared_by_tfds(tmp_path):
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("needs TFDS_DATA_DIR with a prepared cifar10")
    original = tfds_records.import_tfds().data_source("cifar10", data_dir=os.environ["TFDS_DATA_DIR"], split="test")
    examples = {int(e["id"].decode()[5:]): e for e in original.__getitems__(range(10_000))}
    images = np.stack([examples[i]["image"] for i in range(10_000)])
    labels = np.array([examples[i]["label"] for i in range(10_000)])
    records = np.concatenate([labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(-1, 3072)], 1)
    files = binary_files() | {"cifar-10-batches-bin/test_batch.bin": records.tobytes()}
    write_folder(tmp_path / "cifar-10-batches-bin", files)
    prepare.prepare("cifar10", tmp_path)
    copy = tfds_records.import_tfds().data_source("cifar10", data_dir=tmp_path, split="test")
    for ours, theirs in zip(copy.__getitems__(range(100)), original.__getitems__(range(100))):
        assert (ours["id"], ours["label"]) == (theirs["id"], theirs["label"])
        np.testing.assert_array_equal(ours["image"], theirs["image"])


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Attack(), protocol=2),
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
    ],
)
def test_a_pickle_with_any_other_global_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "cifar-10-python.tar.gz", python_files() | {"cifar-10-batches-py/test_batch": data})
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: damaged.*the pickle asks for"):
        prepare.prepare("cifar10", tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_members_are_not_extracted(tmp_path):
    inner = tmp_path / "a" / "b"
    write_tar(inner / "cifar-10-binary.tar.gz", {"../../evil.txt": b"x"} | binary_files())
    prepare.prepare("cifar10", inner)
    check_cifar10(inner)
    assert not list(tmp_path.rglob("evil.txt"))


@hypothesis.given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
@hypothesis.settings(max_examples=150, deadline=None)
def test_damage_anywhere_in_an_archive_is_noticed(tmp_path_factory, position, flip, cut):
    path = tmp_path_factory.mktemp("archive") / "cifar-10-binary.tar.gz"
    write_tar(path, binary_files())
    whole = archives.cifar10_binary(path)
    data = bytearray(path.read_bytes())
    at = int(position * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= flip
    path.write_bytes(data)
    message, splits = "", whole
    try:
        splits = prepare._read(archives.cifar10_binary, [path])
    except UserError as error:
        message = str(error)
    assert not message or (str(path) in message and "\n" not in message)
    for split, (images, labels) in whole.items():  # some bytes do not matter, such as the time in gzip's header
        np.testing.assert_array_equal(splits[split][0], images)
        np.testing.assert_array_equal(splits[split][1], labels)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cifar10", lambda d: write_tar(d / "cifar-10-binary.tar.gz", dict(list(binary_files().items())[1:]))),
        ("cifar10", lambda d: write_folder(d / "cifar-10-batches-bin", {k: v[:-1] for k, v in binary_files().items()})),
        ("cifar10", lambda d: write_folder(d / "cifar-10-batches-bin", dict.fromkeys(binary_files(), b"\n" * 3073))),
        ("cifar10", lambda d: write_folder(d / "cifar-10-batches-bin", dict.fromkeys(binary_files(), b""))),
        ("mnist", lambda d: np.savez(d / "mnist.npz", **(MNIST | {"y_test": MNIST["y_test"][:-1]}))),
        ("mnist", lambda d: np.savez(d / "mnist.npz", **(MNIST | {"y_test": np.array([Attack()])}))),
        ("tiny_shakespeare", lambda d: (d / "input.txt").write_bytes(b"\xff" * 100)),
        ("tiny_shakespeare", lambda d: (d / "input.txt").write_bytes(b"short")),
    ],
    ids=["batch-missing", "cut", "label-10", "empty", "label-missing", "pickled", "not-utf8", "short"],
)
def test_unsuitable_files_are_named(name, write, tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"(cifar-10-\S*|mnist\.npz|input\.txt): damaged"):
        prepare.prepare(name, tmp_path)
    assert tfds_sets.find(name, tmp_path) is None


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "keras" / "datasets").mkdir(parents=True)
    (tmp_path / "keras" / "datasets" / "input.txt").write_text(TEXT)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot be written"):
        prepare.prepare("tiny_shakespeare", tmp_path / "file" / "below")


PREPARE = "import sys; from pathlib import Path; from research.data import prepare; prepare.prepare('mnist', Path('.'))"


def test_two_processes_at_once(tmp_path):
    np.savez(tmp_path / "mnist.npz", **MNIST)
    (tmp_path / "mnist" / "incomplete.ABCDEF_3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "incomplete.ABCDEF_3.0.1" / "dataset_info.json").write_text("{}")
    assert tfds_sets.find("mnist", tmp_path) is None, "an unfinished set was taken for a complete one"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", PREPARE]
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(data_source("mnist", tmp_path, "train")) == 7
