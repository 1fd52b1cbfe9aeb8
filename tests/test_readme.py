"""The commands, flags, presets, links and paths that the Markdown files show exist and work."""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from flax import nnx

from experiments import char_rnn, cifar_cnn, cifar_speedrun, image_classifier, image_vae, mnist_vae, sequential_images
from launch import job, predict
from research import app, flags
from research import config as config_lib
from research.data import resize, tokenizer
from research.data.batch import Batch
from research.errors import UserError

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "docs", "experiments", "launch", "research", "tests")
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))))
PAGES = [path for path in PAGES if path.name != "CHANGELOG.md"]  # it may name what is gone
MODULES = (char_rnn, cifar_cnn, cifar_speedrun, image_classifier, image_vae, mnist_vae, sequential_images)
EXPERIMENTS = {module.__name__: module.EXPERIMENT for module in MODULES}
LAUNCHERS = ("export", "gke", "local", "plan", "scaling", "slurm", "sweep", "tpu")
DRY_RUN = ("gke", "local", "scaling", "slurm", "tpu")
NOT_OURS = (
    "--logdir",
    "--xla_force_host_platform_device_count",
    "--xla_cpu_experimental_onednn_custom_call",
)
MISSPELLED = "--config.optimizer.lr"  # the tutorial shows its error
ONE_LINE = ("peers", "input")  # folders whose files have one line together
MUP = ["--config.model.parametrization=mup", "--config.model.base_width=32"]  # each is an error without the other

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, language, block) for page in PAGES for language, block in _FENCE.findall(page.read_text())]
PYTHON = [(page, block) for page, language, block in BLOCKS if language == "python"]
# The complete programs among them, by the names that the pages' commands give them; a test below runs each.
PROGRAMS = {found[1]: block for _, block in PYTHON if (found := re.search(r'app\.Experiment\(\s*"(\w+)"', block))}
EXAMPLES = {f"experiments.{name}" for name in PROGRAMS}


def _code(page):
    """The inline code of a page, and the lines of its code blocks, each on one line."""
    text = page.read_text()
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _FENCE.sub("", text))]
    blocks = [block.replace("\\\n", " ") for language, block in _FENCE.findall(text) if language != "python"]
    return spans + [line for block in blocks for line in block.splitlines()]


CODE = [(page, code) for page in PAGES for code in _code(page)]


def _commands():
    """(module, arguments) of every `python -m MODULE ...` that is shown."""
    for _, code in CODE:
        for command in re.findall(r"python -m ((?:(?! && ).)+)", code):
            module, *args = shlex.split(command, comments=True)
            if not re.search(r"[A-Z]", module):  # python -m launch.WHERE
                yield module, tuple(args)


COMMANDS = sorted(set(_commands()))
FLAGS = sorted({flag for _, code in CODE for flag in re.findall(r"(?<![\w-])--[a-z][\w.]*(?:=[^\s;,]+)?", code)})
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text())]
PATHS = sorted({(page, code) for page, code in CODE if re.fullmatch(rf"\.?(?:{'|'.join(FOLDERS)}|ci)/[\w./-]*", code)})
EXTRAS = sorted({extra for _, code in CODE for extra in re.findall(r'"\.\[(\w+)\]"', code)})
NAMES = sorted({code for _, code in CODE if re.fullmatch(r"(research|experiments|launch|benchmarks)(\.\w+)+", code)})


def test_the_patterns_find_what_the_pages_show():
    """Otherwise the tests below would pass on nothing."""
    assert len(PAGES) >= 8
    assert len(COMMANDS) >= 30
    assert len([module for module, _ in COMMANDS if module.startswith("launch.")]) >= 12
    assert len(FLAGS) >= 80
    assert len([flag for flag in FLAGS if flag.startswith("--config.")]) >= 25
    assert len([flag for flag in FLAGS if flag.startswith("--config=")]) >= 8
    assert len(LINKS) >= 24
    assert len(PATHS) >= 6
    assert len(NAMES) >= 4
    assert len(EXTRAS) >= 6


def _options(launcher):
    """A launcher's options, with their defaults."""
    for value in vars(importlib.import_module(f"launch.{launcher}")).values():
        if dataclasses.is_dataclass(value) and value.__name__.lower() == f"{launcher}options":
            return value()
    raise AssertionError(f"launch.{launcher} defines no options")


@functools.cache
def _names():
    """Every flag of every command, without its dashes."""
    names = {"help", "dry_run", "workdir"}
    for experiment in EXPERIMENTS.values():
        names |= set(flags.define_flags(experiment))
    for launcher in LAUNCHERS:
        names |= {name for name, _, _ in config_lib.walk(_options(launcher))}
    names |= set(vars(predict.parse(["--artifact=x"]))) | set(resize.define_flags()) | set(tokenizer.define_flags())
    return names | {name for found in _benchmarks()["flags"].values() for name in found}


BENCHMARKS = r"""
import importlib, json, sys
from absl import flags
commands, found, errors = json.load(sys.stdin), {}, []
for module, args in commands:
    # Benchmarks define flags of the same name: each is imported without the others.
    for name in [name for name in sys.modules if name.startswith("benchmarks")]:
        del sys.modules[name]
    before = set(flags.FLAGS)
    main = importlib.import_module(module)
    if hasattr(main, "__path__"):
        importlib.import_module(f"{module}.__main__")
    getattr(main, "define_flags", lambda: None)()
    found[module] = sorted(set(flags.FLAGS) - before)
    try:
        rest = flags.FLAGS([module, *args])[1:]
        errors += [f"{module}: unexpected {rest}"] if rest else []
    except flags.Error as error:
        errors.append(f"{module}: {error}")
    for name in found[module]:
        delattr(flags.FLAGS, name)
print(json.dumps({"flags": found, "errors": errors}))
"""


@functools.cache
def _benchmarks():
    """The flags of each benchmark that is shown, and what is wrong with the commands, found in another process."""
    shown = [(module, [arg for arg in args if arg != "--help"]) for module, args in COMMANDS]
    shown = [command for command in shown if command[0].startswith("benchmarks.")]
    command = [sys.executable, "-c", BENCHMARKS]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(shown), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_benchmark_takes_its_flags():
    assert _benchmarks()["errors"] == []
    assert len(_benchmarks()["flags"]) >= 6


@pytest.mark.parametrize(("module", "args"), COMMANDS, ids=str)
def test_every_command_is_understood(module, args, tmp_path, monkeypatch):
    if module in EXAMPLES:
        flags.define_flags(_example(module))([module, *args])
        return
    if any(arg.startswith(f"{MISSPELLED}=") for arg in args):
        with pytest.raises(UserError, match=r"did you mean --config\.optimizer\.learning_rate"):
            app.parse(EXPERIMENTS[module], args)
        return
    assert importlib.util.find_spec(module), module
    monkeypatch.chdir(tmp_path)
    args = [arg for arg in args if arg != "--help"]
    if module in (resize.__name__, tokenizer.__name__):
        own = resize if module == resize.__name__ else tokenizer
        assert own.define_flags()([module, *args]) == [module]
        return
    if "..." in args or EXAMPLES & set(args) or module.startswith(("benchmarks.", "research.")):
        return
    kind, _, name = module.partition(".")
    if kind == "experiments":
        flags.define_flags(EXPERIMENTS[module])([module, *args])
    elif name == "predict":
        assert isinstance(predict.parse(args), argparse.Namespace)
    elif name in DRY_RUN:
        assert importlib.import_module(module).run([*args, "--dry_run"]) == 0
    elif args:
        job.parse(name, "", _options(name), args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_exists_and_takes_its_value(flag):
    name, _, values = flag.partition("=")
    if name in (*NOT_OURS, MISSPELLED):
        return
    assert name[2:] in _names() or any(known.startswith(f"{name[2:]}.") for known in _names())  # --config.mesh
    if name.startswith("--config") and values:
        experiments = [*EXPERIMENTS.values(), *map(_example, sorted(EXAMPLES))]
        for value in values.split("|"):
            assert any(_takes(experiment, f"{name}={value}") for experiment in experiments), value


@functools.cache
def _example(module):
    names = {"__name__": "shown", "__doc__": ""}
    exec(PROGRAMS[module.removeprefix("experiments.")], names)
    return names["EXPERIMENT"]


def _takes(experiment, flag):
    try:
        return bool(app.parse(experiment, MUP if flag in MUP else [flag]))
    except UserError:
        return False


@pytest.mark.parametrize(("page", "target"), LINKS, ids=str)
def test_every_link_leads_somewhere(page, target):
    name, _, anchor = target.partition("#")
    found = page.parent / name if name else page
    assert found.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", found.read_text()), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize(("page", "path"), PATHS, ids=str)
def test_every_path_exists(page, path):
    examples = {f"{module.replace('.', '/')}.py" for module in EXAMPLES}
    assert path in examples or (ROOT / path).exists() or (page.parent / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_module_or_function_exists(name):
    if name not in EXAMPLES:
        pkgutil.resolve_name(name)


def test_every_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) <= set(extras)


@pytest.mark.parametrize("folder", ["launch", "research", "benchmarks"])
def test_a_folders_readme_names_its_files(folder):
    named = set(re.findall(r"(?<![\w/])\w+\.py", (ROOT / folder / "README.md").read_text()))
    files = {path.name for path in (ROOT / folder).rglob("*.py") if path.parent.name not in ONE_LINE} - {"__init__.py"}
    assert named == files


@pytest.mark.parametrize(
    ("name", "accuracy"), [("digits_linear", 0.85), pytest.param("spirals_perceptron", 0.75, marks=pytest.mark.slow)]
)
def test_an_experiment_of_one_file_runs(name, accuracy, tmp_path):
    (tmp_path / f"{name}.py").write_text(PROGRAMS[name])
    args = [sys.executable, f"{name}.py", "--config.num_epochs=10", "--workdir=run"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["test_accuracy"] > accuracy


def test_the_network_with_flags_of_its_own_is_what_they_say():
    """This program is not trained: compiling it would take longer than all of the tests above."""
    assert sorted(PROGRAMS) == ["digits_linear", "digits_mlp", "spirals_perceptron"]
    experiment = _example("experiments.digits_mlp")
    config = app.parse(experiment, ["--config=wide", "--config.model.depth=3"]).config
    dataset = experiment.load_data(config.dataset)
    task = experiment.build_task(experiment.resolve(config, dataset), dataset)
    batch = Batch({}, np.arange(4)).gather(dataset.train)

    def kernels_and_losses():
        model = task.create_model(nnx.Rngs(0))
        kernels = [layer.kernel[...] for layer in model.hidden]
        return kernels, task.evaluate(model, batch, key=jax.random.key(0), train=True)["loss"]

    kernels, losses = nnx.eval_shape(kernels_and_losses)
    assert [kernel.shape for kernel in kernels] == [(1024, 256), (256, 256), (256, 256)]
    assert losses.shape == (4,)


def _is_slow(block):
    return [pytest.mark.slow] if "research.train(" in block else []


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(page, block, marks=_is_slow(block), id=page.name) for page, block in PYTHON],
)
def test_every_block_of_python_can_be_executed(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page, "exec"), {"__name__": "shown", "__doc__": ""})


def test_a_misspelt_flag_is_noticed():
    assert "config.optimizer.nme" not in _names()
    with pytest.raises(absl_flags.UnrecognizedFlagError):
        flags.define_flags(cifar_cnn.EXPERIMENT)(["experiments.cifar_cnn", "--config.optimizer.nme=lion"])
    with pytest.raises(UserError, match="--proceses"):
        job.parse("local", "", _options("local"), ["experiments.cifar_cnn", "--proceses=2"])
