"""MLflow as a tracker. Its environment variables apply; without MLFLOW_TRACKING_URI the store is in the workdir."""

import importlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAG = "meshwork_run_id"
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # in one call
_MAX_CHARACTERS = 6000  # of a param


def _import() -> Any:
    for name in ("alembic", "mlflow.store"):  # they log every table that they create
        logging.getLogger(name).setLevel(logging.WARNING)
    return importlib.import_module("mlflow")


def _flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the fields of a config by path, as in ("optimizer.name", "adam")."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:_MAX_CHARACTERS]


class MlflowClient:
    """The client of `trackers.Tracker`.

    MLflow cannot change a parameter: if a resumed run has another config, `config.json` among the artifacts has the
    newest one and the parameters those of the start.

    Args:
      workdir: the run's folder.
      experiment: MLflow's experiment, unless MLFLOW_EXPERIMENT_NAME is set.
      run_id: the same after every resume; a tag of the run.
    """

    def __init__(self, workdir: Path, experiment: str, run_id: str):
        self._workdir = workdir
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", experiment)
        self._id = run_id
        self._client: Any = None
        self._run = ""  # MLflow's own id

    def open(self, config: dict[str, Any]) -> tuple[int, str]:
        """Opens the run that has this id, or creates it."""
        mlflow = _import()
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            folder = self._workdir.resolve()
            uri, artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "mlflow-artifacts").as_uri()
        self._client = mlflow.MlflowClient(uri)
        place = self._experiment_id(artifacts)
        runs = self._client.search_runs([place], f"tags.{_TAG} = '{self._id}'")
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {_TAG: self._id}
            self._run = self._client.create_run(place, run_name=self._workdir.name, tags=tags).info.run_id
        known = runs[0].data.params if runs else {}
        params = [mlflow.entities.Param(name, value) for name, value in _flatten(config) if name not in known]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _MAX_PARAMS])
        self._client.log_dict(self._run, config, "config.json")
        sent = self._client.get_metric_history(self._run, "epoch")  # every row has it
        return max((metric.step for metric in sent), default=-1), f"run {self._run} in {uri}"

    def _experiment_id(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return self._client.create_experiment(self._experiment, artifacts)
            except Exception:
                # Another run may have created it since.
                found = self._client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        return found.experiment_id

    def scalars(self, rows: list[dict[str, Any]]) -> None:
        """Logs the numbers of each row at its step."""
        metric = _import().entities.Metric
        now = int(time.time() * 1000)
        at_once = max(1, _MAX_METRICS // max(map(len, rows)))  # a call stores whole rows, or nothing
        for start in range(0, len(rows), at_once):
            metrics = [
                metric(name, float(value), now, row["step"])
                for row in rows[start : start + at_once]
                for name, value in row.items()
                if name != "step"
            ]
            self._client.log_batch(self._run, metrics=metrics)

    def image(self, name: str, png: bytes, step: int) -> None:
        """Stores the plot as an artifact, in place of an earlier one of this name."""
        del step
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.png"
            path.write_bytes(png)
            self._client.log_artifact(self._run, str(path), "plots")

    def summary(self, summary: dict[str, Any]) -> None:
        """Stores the summary as an artifact, and its numbers that are not the newest values of metrics as such."""
        self._client.log_dict(self._run, summary, "summary.json")
        known = self._client.get_run(self._run).data.metrics
        new = {name: x for name, x in summary.items() if isinstance(x, (int, float)) and known.get(name) != x}
        self.scalars([{"step": summary["num_train_steps"], **new}])

    def close(self, failed: bool) -> None:
        """Marks the run as finished or failed."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
