"""Disks that are full, read-only, out of inodes or over quota: one error line, and the last checkpoint intact."""

import os
import shutil
import subprocess

import pytest
from command import DIGITS, read_summary

pytestmark = pytest.mark.faults


@pytest.fixture
def disk(tmp_path):
    """A folder with its own tmpfs, and a function that remounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else ""

    def remount(options):
        assert not (error := mount(f"remount,{options}")), error

    if reason := mount("size=400k"):
        pytest.skip(f"mounting is not permitted here: {reason}")
    yield folder, remount
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def quota(tmp_path):
    """A Btrfs subvolume and a function that sets its quota, which applies to root too."""
    image, top = tmp_path / "image", tmp_path / "btrfs"
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("mkfs.btrfs is missing: apt-get install btrfs-progs")
    image.touch()
    os.truncate(image, 128 * 2**20)
    top.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, top], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")

    def btrfs(*args):
        subprocess.run(["btrfs", *args], check=True, capture_output=True)

    try:
        btrfs("quota", "enable", top)
        btrfs("subvolume", "create", top / "limited")
        yield top / "limited", lambda limit: btrfs("qgroup", "limit", limit, top / "limited")
    finally:
        subprocess.run(["umount", top], check=True)


ARGS = [*DIGITS, "--config.batch_size=256", "--config.checkpoint_every_steps=2", "--config.keep_checkpoints=100"]


def _stops_with_one_line(ended, reason):
    assert ended.code == 4, ended.output
    assert "Traceback" not in ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert f"could not be written ({reason}): the last good checkpoint is intact;" in line


@pytest.mark.slow
def test_a_run_stopped_by_a_full_disk_resumes_once_there_is_room(disk, forks):
    folder, remount = disk

    def train(workdir, *args, **job):
        return forks.run("linear", [*args, f"--workdir={folder / workdir}"], **job)

    _stops_with_one_line(train("x", *ARGS, "--config.num_epochs=4"), "No space left on device")
    assert not (folder / "x/summary.json").exists()

    remount("ro")
    for workdir in "xy":
        refused = train(workdir)
        assert (refused.code, "cannot be written: Read-only file system" in refused.output) == (2, True)

    inodes = os.statvfs(folder)
    remount(f"rw,size=64m,nr_inodes={inodes.f_files - inodes.f_ffree + 8}")  # enough space, but only a few inodes
    _stops_with_one_line(train("x"), "No space left on device")

    remount("nr_inodes=10000")
    resumed = train("x")
    assert resumed.code == 0, resumed.output
    assert "resumed at step " in resumed.output
    assert "damaged" not in resumed.output
    assert read_summary(folder / "x")["num_epochs"] == 4


@pytest.mark.slow
def test_a_run_stopped_by_a_quota_resumes_once_it_is_raised(quota, forks):
    folder, limit = quota
    workdir = f"--workdir={folder / 'x'}"
    first = forks.run("linear", [*ARGS, "--config.num_epochs=1", workdir])
    assert first.code == 0, first.output
    limit("400k")
    _stops_with_one_line(forks.run("linear", ["--config.num_epochs=8", workdir]), "Disk quota exceeded")
    assert read_summary(folder / "x")["num_epochs"] == 1
    limit("none")
    resumed = forks.run("linear", ["--config.num_epochs=8", workdir])
    assert resumed.code == 0, resumed.output
    assert "resumed at step " in resumed.output
    assert "damaged" not in resumed.output


def test_the_file_size_limit_stops_a_run(forks, tmp_path):
    """As set by `ulimit -f`."""
    args = [*ARGS, "--config.log_every_steps=1", f"--workdir={tmp_path / 'x'}"]
    _stops_with_one_line(forks.run("linear", args, limits={"FSIZE": 3000}), "File too large")
    assert (tmp_path / "x/config.json").exists()
    assert not (tmp_path / "x/summary.json").exists()


def test_a_plot_that_cannot_be_written_is_a_warning(forks, tmp_path):
    (tmp_path / "x/curves.png/in the way").mkdir(parents=True)
    ended = forks.run("drawn:run", [tmp_path / "x", {"plots": True}], plots=True)
    assert ended.code == 0, ended.output
    assert "WARNING: curves.png was not drawn: " in ended.output
    names = {path.stem for path in (tmp_path / "x").glob("*.png")}
    assert names == {"curves", "confusion", "reliability", "examples"}
    assert read_summary(tmp_path / "x")["num_epochs"] == 2
