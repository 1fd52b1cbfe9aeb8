"""A long run: nothing grows but the record."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import read_lines, run

from research.record import writer
from research.training import loop
from research.training.checkpoint import Checkpoints

FIRST, EVERY = 100, 25  # steps until all is warm, and between two looks


def _resident():
    """MiB of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize(
    "epochs", [pytest.param(40, marks=pytest.mark.faults), pytest.param(900, marks=pytest.mark.soak)]
)
def test_memory_open_files_and_checkpoints_stay_as_they_are(epochs, tmp_path, monkeypatch):
    """Every step a dispatch: 450, and 10,125 in the soak; a checkpoint after every epoch, and every tenth step."""
    monkeypatch.setattr(loop.Loop, "draw", lambda _: None)
    looks, made = [], []
    progress, make = writer.Writer.progress, Checkpoints.__init__

    def makes(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.append(self)

    def look(self, step, *args):
        progress(self, step, *args)
        if step >= FIRST and step % EVERY == 0:
            saved = sum(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
            made[-1].wait()  # one that is being written has files open, now more, now fewer
            files = len(os.listdir("/proc/self/fd"))
            looks.append((_resident(), files, saved, time.monotonic()))

    monkeypatch.setattr(Checkpoints, "__init__", makes)
    monkeypatch.setattr(writer.Writer, "progress", look)
    state, _ = run(tmp_path, num_epochs=epochs, steps_per_dispatch=1, checkpoint_every_steps=10)
    memory, files, saved, times = map(np.array, zip(*looks))
    count = int(state.step)
    assert count == epochs * 90 // 8
    assert len(read_lines(tmp_path)) == count
    # Two are kept; one may be being written, and one being deleted.
    assert saved.max() <= 4
    assert sum(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir()) == 2
    half = len(looks) // 2
    assert np.median(files[half:]) <= np.median(files[:half]) + 2
    seconds = np.diff(times) / EVERY
    print(
        f"{count:,} dispatches: memory {memory[0]:.0f} to {memory[-1]:.0f} MiB, open files {files[0]} to {files[-1]}, "
        f"{1000 * np.median(seconds[:half]):.1f} to {1000 * np.median(seconds[half:]):.1f} ms a step"
    )
    if epochs > 100:
        assert memory[-1] < 1.05 * memory[half] + 10
