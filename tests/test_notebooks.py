"""The notebooks run, and an interrupted or failed cell leaves a usable notebook."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from research.errors import UserError

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))

INTERRUPTED = [
    """
import dataclasses, os, signal
import linear, research
from research.training.callbacks import Callback

class Interrupt(Callback):
    every_steps = 5

    def on_step(self, run, metrics):
        if run.progress.step == 10:
            os.kill(os.getpid(), signal.SIGINT)

experiment = dataclasses.replace(linear.EXPERIMENT, callbacks=lambda _: [Interrupt()])
config = experiment.default_config
config.optimizer.learning_rate = 0.01
""",
    "research.train(experiment, config, 'run')",
    "research.load(experiment, 'run').step",
    "research.train(experiment, dataclasses.replace(config, batch_size=0))",
    "research.train(experiment, config, 'run').step",
]


def _execute(notebook, env, folder):
    """Runs all cells, those after an error, too; returns the outputs of each code cell."""
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="python3", timeout=240, allow_errors=True, resources=place).execute(env=env)
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_a_notebook_shows_one_line_instead_of_a_traceback():
    assert UserError("wrong:\n do this")._render_traceback_() == ["UserError: wrong: do this"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, env, tmp_path):
    outputs = _execute(nbformat.read(path, 4), env, tmp_path)
    assert len(NOTEBOOKS) == 2
    assert not [output for cell in outputs for output in cell if output.output_type == "error"]
    assert len([output for cell in outputs for output in cell if output.output_type == "display_data"]) >= 2


@pytest.mark.slow
def test_an_interrupted_cell_leaves_a_checkpoint_and_an_error_is_one_line(env, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in INTERRUPTED])
    _, interrupted, loaded, wrong, resumed = _execute(notebook, env, tmp_path)
    assert interrupted[-1].ename == "KeyboardInterrupt"
    assert "at step 10 with a checkpoint" in interrupted[-1].evalue
    assert loaded[-1].data["text/plain"] == "10"
    assert wrong[-1].traceback == ["UserError: --config.batch_size=0: must be at least 1"]
    assert resumed[-1].data["text/plain"] == "22"
