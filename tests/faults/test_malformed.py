"""Malformed flags, configs and artifacts by hypothesis: one error line, no traceback, no stray files.

100 examples each by default, 1,000 with `pytest -m soak`.
"""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_artifact import _edit  # changes a manifest and updates its checksum

from experiments import char_rnn, cifar_cnn, mnist_vae
from launch import export, job, predict
from launch.artifacts import artifact, runtimes
from launch.local import LocalOptions
from research import config as config_lib
from research import flags as flags_lib
from research.errors import UserError
from research.tasks.task import ExportedFunction

EXPERIMENTS = [module.EXPERIMENT for module in (cifar_cnn, char_rnn, mnist_vae)]


def _examples(count):
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=health)


COUNTS = [pytest.param(100, marks=pytest.mark.faults), pytest.param(1000, marks=pytest.mark.soak)]

texts = st.text(max_size=30) | st.sampled_from(["", "-1", "nan", "inf", "1e999", "0x10", "../..", "/", "a|b", "\0"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


@st.composite
def flags(draw, experiment, others=()):
    """Flags with correct and misspelled names, valid and invalid values."""
    known = [f"config.{path}" for path, _, _ in config_lib.walk(experiment.default_config)]
    names = st.sampled_from([*known, "config", "mode", "workdir", "reproduce", *others]) | texts
    name = draw(names)
    if draw(st.booleans()) and name:
        place = draw(st.integers(0, len(name) - 1))
        name = name[:place] + draw(st.sampled_from(["", "x", "."])) + name[place + 1 :]
    form = draw(st.sampled_from(["--{}={}", "-{}={}", "--{}", "--no{}", "{}={}", "--{} {}", "{}"]))
    return form.format(name, draw(texts | st.integers().map(str)))


def _quietly(call):
    """Returns what a call prints; it may raise only `UserError` and `SystemExit`."""
    printed = io.StringIO()
    silent = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with silent[0], silent[1], contextlib.suppress(UserError, SystemExit):
        call()
    return printed.getvalue()


@pytest.mark.parametrize("count", COUNTS)
def test_flags(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @_examples(count)
    @given(st.data())
    def parsed(data):
        experiment = data.draw(st.sampled_from(EXPERIMENTS))
        argv = data.draw(st.lists(flags(experiment, ["processes", "max_restarts"]), max_size=4))
        if data.draw(st.booleans()):
            _quietly(lambda: flags_lib.parse(experiment, argv))
        else:
            where = [f"experiments.{experiment.name}", *argv]
            _quietly(lambda: job.parse("local", "", LocalOptions(), where))

    parsed()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", COUNTS)
def test_search_spaces(count, tmp_path, monkeypatch):
    search_space = pytest.importorskip("launch.sweeps.search_space")
    monkeypatch.chdir(tmp_path)
    known = [path for path, _, _ in config_lib.walk(cifar_cnn.EXPERIMENT.default_config)]
    numbers = texts | st.floats().map(str) | st.integers().map(str)
    specs = st.builds("{}({},{})".format, st.sampled_from(["log", "int", "float", "x"]), numbers, numbers)
    specs |= st.lists(numbers, max_size=3).map(lambda x: f"[{','.join(x)}]") | texts
    entries = st.builds("{}={}".format, st.sampled_from(known) | texts, specs) | texts

    @_examples(count)
    @given(st.lists(entries, max_size=2))
    def parsed(searches):
        config = cifar_cnn.EXPERIMENT.default_config
        _quietly(lambda: search_space.parse(searches, config).grid())

    parsed()
    assert not list(tmp_path.iterdir())


def _places(value, path=()):
    """Yields the path of every value within JSON."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from _places(part, (*path, name))


@st.composite
def changed(draw, value):
    """JSON with one to three values replaced or deleted."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(_places(value), key=str)))
        if not path:
            continue
        parent = value
        for name in path[:-1]:
            parent = parent[name]
        if draw(st.booleans()):
            parent[path[-1]] = draw(values)
        else:
            del parent[path[-1]]
    return value


@pytest.mark.parametrize("count", COUNTS)
def test_configs(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = config_lib.dataclasses.asdict(cifar_cnn.EXPERIMENT.default_config)
    path = tmp_path / "x/config.json"
    path.parent.mkdir()

    @_examples(count)
    @given(changed(whole) | values, st.binary(max_size=20))
    def parsed(value, tail):
        path.write_bytes(json.dumps(value).encode() + (tail if tail.startswith(b"{") else b""))
        _quietly(lambda: flags_lib.parse(cifar_cnn.EXPERIMENT, ["--workdir=x"]))

    parsed()
    assert [found.name for found in tmp_path.rglob("*")] == ["x", "config.json"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a valid artifact and an image for it."""
    folder = tmp_path_factory.mktemp("classifier")
    function = ExportedFunction(
        lambda _, inputs: {"logits": inputs["image"].astype("float32").sum((1, 2))},
        {"image": ("b, 4, 6, 3", "uint8")},
        "",
    )
    weights = {"w": np.ones(2, np.float32)}
    exported = export._export("classify", function, lambda _: None, weights)
    manifest = {
        "classes": ["red", "green", "blue"],
        "platforms": ["cpu"],
        "weights": {"w": {"shape": [2], "dtype": "float32"}},
        "functions": {"classify": runtimes.described(exported)},
    }
    artifact.write(folder / "a", manifest, weights, {"classify": bytes(exported.serialize())})
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "black.png")
    return folder


@pytest.mark.parametrize("count", COUNTS)
def test_malformed_manifests_with_valid_checksums(count, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = json.loads((classifier / "a/manifest.json").read_text())
    kept = ("format", "format_version", "files")
    image, folder = str(classifier / "black.png"), tmp_path / "a"
    shutil.copytree(classifier / "a", folder)
    ends = set()

    @_examples(count)
    @given(changed({name: x for name, x in whole.items() if name not in kept}))
    def predicted(manifest):
        new = {name: whole[name] for name in kept} | (manifest if isinstance(manifest, dict) else {})
        _edit(folder, lambda m: (m.clear(), m.update(new)))
        printed = _quietly(lambda: predict.main([f"--artifact={folder}", image]))
        ends.add("error: " in printed)
        assert "error: " in printed or "black.png  " in printed

    predicted()
    assert True in ends
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("count", COUNTS)
def test_malformed_weights_with_valid_checksums(count, classifier, tmp_path):
    """A weights file with arbitrary bytes replaced, or cut off."""
    shutil.copytree(classifier / "a", tmp_path / "a")
    weights = (tmp_path / "a/weights.safetensors").read_bytes()

    @_examples(count)
    @given(st.integers(0, len(weights) - 1), st.binary(min_size=1, max_size=8), st.integers(0, len(weights)))
    def read(place, patch, end):
        data = (weights[:place] + patch + weights[place + len(patch) :])[: end or None]
        (tmp_path / "a/weights.safetensors").write_bytes(data)
        entry = {"bytes": len(data), "sha256": artifact.hashlib.sha256(data).hexdigest()}
        _edit(tmp_path / "a", lambda manifest: manifest["files"].update({"weights.safetensors": entry}))
        with contextlib.suppress(artifact.ArtifactError):
            artifact.read(tmp_path / "a")

    read()
