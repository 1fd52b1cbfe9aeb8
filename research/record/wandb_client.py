"""Weights & Biases as a tracker. Its environment variables (WANDB_MODE, WANDB_PROJECT, ...) apply."""

import importlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

from research.record.storage import is_local

_INIT_SECONDS = 20.0  # how long to try to reach the server before logging offline
# How long to upload at the end, unless WANDB_FINISH_TIMEOUT says it; without a limit W&B's process would keep this one
# from ending as long as the server does not answer. Less than a `Tracker` waits after a stop.
_FINISH_SECONDS = 12.0


class WandbClient:
    """The client of `trackers.Tracker`.

    An offline run cannot be resumed: each process of the run writes it from its first step to a new folder, which
    replaces the one before. So there is one folder to upload, with every step once.

    Args:
      workdir: the run's folder; on an object store the files of W&B are in the current directory.
      experiment: the project, unless WANDB_PROJECT is set.
      run_id: the same after every resume.
    """

    def __init__(self, workdir: Path, experiment: str, run_id: str):
        self._run: Any = None
        self._id = run_id
        self._options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", experiment),
            "name": os.environ.get("WANDB_NAME", workdir.name),
            "id": run_id,
            "resume": "allow",
        }
        if is_local(workdir) and "WANDB_DIR" not in os.environ:
            self._options["dir"] = str(workdir)

    def open(self, config: dict[str, Any]) -> tuple[int, str]:
        """Opens the run, offline if that is asked for, if there are no credentials, or if the server is not reached."""
        wandb: Any = importlib.import_module("wandb")
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_INIT_SECONDS,
            finish_timeout=wandb.setup().settings.finish_timeout or _FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        if wandb.setup().settings.mode != "online":
            why = ""
        elif wandb.login(prompt=False, verify=False):
            try:
                self._run = wandb.init(**self._options, settings=settings)
            except Exception as error:
                why = f", since the server was not reached ({' '.join(str(error).split())[:100]})"
        else:
            why = ", since there is no API key (`wandb login`)"
        if self._run is None:
            mode = wandb.setup().settings.mode
            self._run = wandb.init(**self._options, mode="offline" if mode == "online" else mode, settings=settings)
        self._run.config.update(config, allow_val_change=True)
        folder = Path(self._run.settings.sync_dir)
        for superseded in folder.parent.glob(f"offline-run-*-{self._id}"):
            if superseded != folder:
                shutil.rmtree(superseded)
        place = f"offline{why}; `wandb sync {folder}` uploads it" if self._run.offline else str(self._run.url)
        return self._run.step - 1, place

    def scalars(self, rows: list[dict[str, Any]]) -> None:
        """Logs each row at its step."""
        for row in rows:
            self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def image(self, name: str, png: bytes, step: int) -> None:
        """Logs the plot at its step, or at the newest if that is later: W&B ignores what is logged to earlier ones."""
        from PIL import Image

        wandb: Any = importlib.import_module("wandb")
        self._run.log({name: wandb.Image(Image.open(io.BytesIO(png)))}, step=max(step, self._run.step))

    def summary(self, summary: dict[str, Any]) -> None:
        """Updates the run's summary."""
        self._run.summary.update(summary)

    def close(self, failed: bool) -> None:
        """Waits for the upload, but raises `TimeoutError` after some seconds."""
        self._run.finish(exit_code=int(failed))
