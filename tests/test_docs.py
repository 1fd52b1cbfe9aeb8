"""The pages of fields and commands that are generated for the documentation say what `--help` says."""

import importlib.util
import re
from pathlib import Path

import pytest
from test_readme import EXPERIMENTS, LAUNCHERS, _options

from research import config as config_lib
from research import flags

SPEC = importlib.util.spec_from_file_location("config_pages", Path(__file__).parent.parent / "docs/config_pages.py")
config_pages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(config_pages)


@pytest.fixture(scope="module")
def fields():
    """The rows of the page of fields, by section: {"Every experiment": {"--config.seed": "| `--config.seed` ..."}}."""
    sections = re.split(r"^## ", "\n".join(config_pages.config_page()), flags=re.MULTILINE)[1:]
    found = {section.splitlines()[0]: re.findall(r"^\| `.*", section, re.MULTILINE) for section in sections}
    return {title: {row.split("`")[1]: row for row in rows} for title, rows in found.items()}


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_every_flag_of_a_config_is_in_the_page_with_its_default_and_help(experiment, fields):
    rows = fields["Every experiment"] | fields[experiment.name]
    named = {name for name in flags.define_flags(experiment) if name.startswith("config.")}
    assert {f"--{name}" for name in named} == {name for name in rows if name.startswith("--config.")}
    for path, field, value in config_lib.walk(experiment.default_config, "--config."):
        assert field.metadata["help"].replace("|", "\\|") in rows[path]
        if value not in ("", (), None):
            assert f"default `{value}` |".replace("|", "\\|", str(value).count("|")) in rows[path]


def test_the_page_shows_bounds_and_choices(fields):
    every = fields["Every experiment"]
    assert "| int, ≥ 0, ≤ 4294967295; default `0` |" in every["--config.seed"]
    assert "| `none`, `blocks`, `all`; default `none` |" in every["--config.remat"]
    assert "| float, ≥ 0, < 1; default `0.0` |" in fields["cifar_cnn"]["--config.model.dropout"]
    assert "--config.remat" not in fields["cifar_cnn"]
    # Its own default, and that of every experiment.
    assert "default `muon`" in fields["cifar_cnn"]["--config.optimizer.name"]
    assert "default `nesterov`" in every["--config.optimizer.name"]


def test_every_flag_of_a_launcher_is_in_the_page_of_commands():
    sections = re.split(r"^## launch\.", "\n".join(config_pages.commands_page()), flags=re.MULTILINE)[1:]
    texts = {section.splitlines()[0]: section for section in sections}
    assert set(texts) == {*LAUNCHERS, "predict"}
    for launcher in LAUNCHERS:
        for name, field, _ in config_lib.walk(_options(launcher)):
            assert f"--{name}=" in texts[launcher]
            assert field.metadata["help"] in texts[launcher]
