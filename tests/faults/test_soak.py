"""A long run: memory, open files and checkpoints do not grow."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import read_lines, run

from research.record import writer
from research.training import loop
from research.training.checkpoint import Checkpoints

FIRST, EVERY = 100, 25  # warm-up steps, and steps between samples


def _resident():
    """MiB of resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize(
    "epochs",
    [pytest.param(24, marks=[pytest.mark.faults, pytest.mark.slow]), pytest.param(900, marks=pytest.mark.soak)],
)
def test_memory_open_files_and_checkpoints_do_not_grow(epochs, tmp_path, monkeypatch):
    """Dispatches of one step: 270, and 10,125 in the soak; checkpoints after every epoch and every tenth step."""
    monkeypatch.setattr(loop.Loop, "draw", lambda _: None)
    samples, created = [], []
    progress, make = writer.Writer.progress, Checkpoints.__init__

    def record_instance(self, *args, **kwargs):
        make(self, *args, **kwargs)
        created.append(self)

    def sample(self, step, *args):
        progress(self, step, *args)
        if step >= FIRST and step % EVERY == 0:
            saved = sum(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
            created[-1].wait()  # a checkpoint that is being written has files open
            files = len(os.listdir("/proc/self/fd"))
            samples.append((_resident(), files, saved, time.monotonic()))

    monkeypatch.setattr(Checkpoints, "__init__", record_instance)
    monkeypatch.setattr(writer.Writer, "progress", sample)
    state, _ = run(tmp_path, num_epochs=epochs, steps_per_dispatch=1, checkpoint_every_steps=10)
    memory, files, saved, times = map(np.array, zip(*samples))
    count = int(state.step)
    assert count == epochs * 90 // 8
    assert len(read_lines(tmp_path)) == count
    # Two are kept, one may be being written and one being deleted.
    assert saved.max() <= 4
    assert sum(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir()) == 2
    half = len(samples) // 2
    assert np.median(files[half:]) <= np.median(files[:half]) + 2
    seconds = np.diff(times) / EVERY
    print(
        f"{count:,} dispatches: memory {memory[0]:.0f} to {memory[-1]:.0f} MiB, open files {files[0]} to {files[-1]}, "
        f"{1000 * np.median(seconds[:half]):.1f} to {1000 * np.median(seconds[half:]):.1f} ms a step"
    )
    if epochs > 100:
        assert memory[-1] < 1.05 * memory[half] + 10
