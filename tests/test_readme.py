"""What README and those of the folders show works as it stands there."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import char_rnn, cifar_cnn, cifar_speedrun, mnist_vae
from research import app
from research.errors import UserError

MODULES = (cifar_cnn, cifar_speedrun, char_rnn, mnist_vae)
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOLDERS = [ROOT / name / "README.md" for name in ("launch", "experiments", "research", "benchmarks", "tests/faults")]
ALL = "\n".join([README, *(path.read_text() for path in FOLDERS)])


def test_the_experiment_of_one_file_runs(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "digits_linear.py").write_text(program)
    args = [sys.executable, "digits_linear.py", "--config.num_epochs=10", "--workdir=run"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["test_accuracy"] > 0.85


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--config[.\w]*=[\w|.-]+", ALL))))
def test_every_flag_exists_and_takes_its_value(flag):
    name, values = flag.split("=")
    for value in values.split("|"):
        assert any(_takes(module.EXPERIMENT, f"{name}={value}") for module in MODULES)


MUP = ["--config.model.parametrization=mup", "--config.model.base_width=32"]  # neither means anything alone


def _takes(experiment, flag):
    try:
        return bool(app.parse(experiment, MUP if flag in MUP else [flag]))
    except UserError:
        return False


@pytest.mark.parametrize("line", re.findall(r"^python -m launch\.(.*?)(?:\s+#.*)?$", ALL, re.MULTILINE))
def test_every_launch_is_understood(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where, *args = line.split()
    assert importlib.import_module(f"launch.{where}").run([*args, "--dry_run"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", [ROOT / "README.md", *FOLDERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        found = page.parent / name
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target


def test_every_module_of_a_folder_is_named_in_its_readme():
    for page in FOLDERS[:1] + FOLDERS[2:4]:
        named = set(re.findall(r"\w+\.py", page.read_text()))
        assert {path.name for path in page.parent.glob("*.py")} - named == {"__init__.py"}
