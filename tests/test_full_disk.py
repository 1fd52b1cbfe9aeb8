"""A real file system that is full, or read-only: one line, the right exit code, and the last checkpoint as it was."""

import subprocess

import pytest
from command import DIGITS, complains, read_summary, run_command, run_here


@pytest.fixture
def disk(tmp_path):
    """Remounts a file system in memory of its own, as a size or as `ro`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")

    mount("-o", "size=400k")
    yield folder, lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", str(folder)], check=True)


ARGS = [*DIGITS, "--config.batch_size=256", "--config.checkpoint_every_steps=2", "--config.keep_checkpoints=100"]


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(disk, env, capsys):
    folder, remount = disk
    full = run_command(env, *ARGS, "--config.num_epochs=4", f"--workdir={folder / 'x'}")
    assert full.returncode == 4, full.stderr
    assert "Traceback" not in full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written (No space left on device): the last good checkpoint is intact" in line
    assert not (folder / "x/summary.json").exists()

    remount("ro")
    complains(run_here([f"--workdir={folder / 'x'}"], capsys), "cannot be written: Read-only file system")
    complains(run_here([f"--workdir={folder / 'y'}"], capsys), "cannot be written: Read-only file system")

    remount("rw,size=64m")
    resumed = run_command(env, f"--workdir={folder / 'x'}")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step " in resumed.stdout
    assert "damaged" not in resumed.stderr
    assert read_summary(folder / "x")["num_epochs"] == 4
