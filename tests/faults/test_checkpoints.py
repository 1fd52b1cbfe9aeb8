"""Checkpoints damaged on disk: the command names them in one line and never silently starts over.

Damage to each single file is tested in test_checkpoint.py.
"""

import shutil

import pytest
from command import DIGITS

pytestmark = pytest.mark.faults

ARGS = [*DIGITS, "--config.checkpoint_every_steps=5", "--config.log_every_steps=1"]


@pytest.fixture(scope="module")
def trained(forks):
    """A finished run of 14 steps with checkpoints 10 and 14, without its summary so that it can be resumed."""
    workdir = forks.folder / "trained"
    ended = forks.run("linear", [*ARGS, f"--workdir={workdir}"])
    assert ended.code == 0, ended.output
    (workdir / "summary.json").unlink()
    return workdir


def _half_deleted(step):
    for path in sorted(path for path in step.rglob("*") if path.is_file())[::2]:
        path.unlink()


def _emptied(step):
    shutil.rmtree(step)
    step.mkdir()


def _flipped(step):
    for path in step.rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [*(pytest.param(x, marks=pytest.mark.slow) for x in (_half_deleted, _emptied)), _flipped]
)
def test_the_previous_checkpoint_is_restored(damage, trained, forks, tmp_path):
    lines = (trained / "metrics.jsonl").read_text()
    shutil.copytree(trained, tmp_path / "x")
    damage(tmp_path / "x/checkpoints/14")
    ended = forks.run("linear", [f"--workdir={tmp_path / 'x'}"])
    assert ended.code == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("WARNING")]
    assert line.startswith("WARNING: checkpoint 14 is damaged (")
    assert "resumed at step 10 of 14" in ended.output
    assert (tmp_path / "x/metrics.jsonl").read_text() == lines


def test_without_an_intact_checkpoint_the_command_refuses_to_start_over(trained, forks, tmp_path):
    """On the first start and on the next."""
    shutil.copytree(trained, tmp_path / "x")
    for step in (tmp_path / "x/checkpoints").iterdir():
        _flipped(step)
        (step / "record/metadata").unlink()
    for _ in range(2):
        ended = forks.run("linear", [f"--workdir={tmp_path / 'x'}"])
        assert ended.code == 2, ended.output
        (line,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
        assert "no checkpoint in " in line
        assert "use another --workdir" in line


def test_a_workdir_without_its_config_or_its_checkpoints(trained, forks, tmp_path):
    shutil.copytree(trained, tmp_path / "x")
    (tmp_path / "x/config.json").unlink()
    (tmp_path / "x/metrics.jsonl").unlink()
    args = [*ARGS, f"--workdir={tmp_path / 'x'}"]
    refused = forks.run("linear", args)
    assert (refused.code, "but no config.json" in refused.output) == (2, True)
    shutil.copytree(trained, tmp_path / "y")
    shutil.rmtree(tmp_path / "y/checkpoints")
    ended = forks.run("linear", [f"--workdir={tmp_path / 'y'}"])
    assert ended.code == 0, ended.output
    assert "WARNING: metrics.jsonl has steps, but there is no checkpoint: training from the start" in ended.output
