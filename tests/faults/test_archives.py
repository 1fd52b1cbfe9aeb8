"""Malicious and malformed archives: refused with one line, without writing files or exhausting memory.

Damaged archives, unsafe pickles, wrong labels and wrong shapes are tested in tests/data.
"""

import contextlib
import gzip
import io
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.data import archives, prepare
from research.errors import UserError

pytestmark = pytest.mark.faults

NAMES = [f"{name}.bin" for names in archives._CIFAR10_BATCHES.values() for name in names]


def _tar(path, members):
    """Writes a tar file of members (name, type, content or link target)."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content
                tar.addfile(member)


def _refused(read, *paths):
    with pytest.raises(UserError, match="damaged, or not the official file") as error:
        prepare._read(read, list(paths))
    return str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_not_read(kind, tmp_path):
    """Even if a link leads to a valid file."""
    (tmp_path / "outside").write_bytes(bytes(3073))
    _tar(tmp_path / "x.tar.gz", [(name, kind, str(tmp_path / "outside")) for name in NAMES])
    assert "is missing" in _refused(archives.cifar10_binary, tmp_path / "x.tar.gz")


def _tar_bomb(path):
    _tar(path, [("anything", tarfile.REGTYPE, bytes(2**23))])


def _gzip_bomb(path):
    path.write_bytes(gzip.compress(bytes(2**23)))


def _zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", bytes(2**23))


def _huge_shape(path):
    """A header that promises 100 TiB."""
    with zipfile.ZipFile(path, "w") as archive:
        header = str({"descr": "|u1", "fortran_order": False, "shape": (10**14,)}).encode()
        archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


@pytest.mark.parametrize(
    ("write", "read", "words"),
    [
        (_tar_bomb, archives.cifar10_binary, "unpacks to"),
        (_gzip_bomb, lambda path: archives.mnist_idx(path, path, path, path), "unpacks to"),
        (_zip_bomb, archives.mnist_npz, "unpacks to"),
        (_huge_shape, archives.mnist_npz, ""),
    ],
)
def test_decompression_bombs_are_refused(write, read, words, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_LARGEST", 2**22)
    write(tmp_path / "bomb")
    assert (tmp_path / "bomb").stat().st_size < 2**16
    assert words in _refused(read, tmp_path / "bomb")


kinds = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
names = st.sampled_from([*NAMES, "../evil", "/tmp/evil", "a/../../evil", ".", ""]) | st.text(max_size=9)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(names, kinds, st.binary(max_size=9)), max_size=8), st.integers(0, 2))
def test_archives_of_arbitrary_members(tmp_path, members, more):
    path = tmp_path / "x.tar.gz"
    malformed = [(n, k, c if k == tarfile.REGTYPE else c.decode("latin1")) for n, k, c in members]
    whole = [(name, tarfile.REGTYPE, bytes(3073 * more)) for name in NAMES] if more else []
    try:
        _tar(path, [*malformed, *whole])
    except (ValueError, UnicodeError):  # a name that tar cannot represent
        return
    with contextlib.suppress(UserError):
        splits = prepare._read(archives.cifar10_binary, [path])
        assert all(images.shape[1:] == (32, 32, 3) for images, _ in splits.values())
        assert all(np.all(labels == 0) for _, labels in splits.values())
    assert [found.name for found in tmp_path.iterdir()] == ["x.tar.gz"]


@pytest.mark.parametrize("text", ["s3://key:s3cr3t@host/bucket", "ftp://me:s3cr3t@host:21/x"])
def test_a_url_with_a_password_is_refused_without_repeating_it(text):
    from launch import job
    from launch.local import LocalOptions
    from research import paths

    with pytest.raises(UserError, match="a URL with a password") as error:
        paths.open_path(text)
    assert "s3cr3t" not in str(error.value)
    with pytest.raises(UserError, match="a URL with a password"):
        job.parse("local", "", LocalOptions(), ["experiments.cifar_cnn", f"--workdir={text}"])
    paths.check_no_password("gs://bucket/a@b:c")
