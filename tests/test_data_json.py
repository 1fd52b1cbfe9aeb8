"""data.json: evaluation uses its statistics, other data is detected, and a network works without its data."""

import dataclasses
import re
from unittest import mock

import jax
import linear
import numpy as np
import outsider
import pytest

from launch import export
from launch.artifacts import artifact
from research import app, flags, sharding
from research.data import embedded, sources
from research.data.tfds_sets import UnavailableError
from research.errors import UserError
from research.record import data_json
from research.record.workdir import read_json
from research.training import loop

FLAGS = ["--config.num_epochs=2", "--config.batch_size=96", "--config.optimizer.learning_rate=0.05"]


def _app(*args, experiment=linear.EXPERIMENT, signals=None):
    with mock.patch.object(loop.Loop, "draw"):  # the plots take longer than training
        return app.run(experiment, args, signals, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and its summary."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, _app(*FLAGS, f"--workdir={workdir}")


@pytest.fixture
def digits(monkeypatch):
    """Replaces the digits: `digits(change)`, where `change(label_names, splits)` returns others."""

    def replace(change):
        label_names, splits = embedded.digits()
        monkeypatch.setitem(embedded.DATASETS, "digits", lambda: change(label_names, splits))

    return replace


def _darker(*names):
    """A change of the images of some splits."""

    def change(label_names, splits):
        return label_names, splits | {n: splits[n] | {"image": splits[n]["image"] // 2} for n in names}

    return change


@pytest.fixture
def no_data(monkeypatch):
    """Every data set is unavailable."""

    def load(config, own):
        raise UnavailableError(config.name, "is not prepared", "prepare it")

    monkeypatch.setattr(sources, "load", load)


def test_it_describes_the_data(run):
    workdir, summary = run
    train, test = (embedded.digits()[1][name] for name in ("train", "test"))
    found = read_json(workdir / "data.json")
    assert found["name"] == "digits"
    assert found["label_names"] == list("0123456789")
    assert found["num_examples"] == len(train["label"])
    assert found["splits"]["test"]["image"] == {"dtype": "uint8", "shape": list(test["image"].shape)}
    assert found["splits"]["train"]["label"] == {"dtype": "int32", "shape": [len(train["label"])]}
    assert found["fingerprints"] == summary["data_fingerprints"]
    assert len(set(found["fingerprints"].values())) == 2
    (mean,), (std,) = found["statistics"]["image.channel_statistics"]
    assert mean == pytest.approx(train["image"].mean() / 255)
    assert std == pytest.approx(train["image"].std() / 255)


def test_other_training_images_do_not_change_an_evaluation(run, digits, capsys):
    workdir, summary = run
    recorded = summary["data_fingerprints"]["train"]
    digits(_darker("train"))
    assert _app(f"--workdir={workdir}", "--mode=eval")["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert re.search(
        rf"another version of digits .*\(fingerprints: train {recorded} there, [0-9a-f]{{16}} here\)", warning
    )


def test_other_test_images_are_evaluated_with_a_warning(run, digits, capsys):
    workdir, summary = run
    digits(_darker("test"))
    assert _app(f"--workdir={workdir}", "--mode=eval")["test_loss"] != pytest.approx(summary["test_loss"], rel=1e-3)
    assert f"test {summary['data_fingerprints']['test']} there, " in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_data(run, digits):
    workdir, summary = run
    digits(_darker("train"))
    words = f"another version of digits (fingerprints: train {summary['data_fingerprints']['train']} there, "
    with pytest.raises(UserError, match=re.escape(words)) as error:
        _app(f"--workdir={workdir}", "--config.num_epochs=3")
    assert "set --config.dataset.data_dir to the folder of its data set, or give another --workdir" in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda names, splits: (names[::-1], splits), "label names: ('0', '1', "),
        (
            lambda names, splits: (
                names,
                {name: split | {"image": split["image"][:, ::2]} for name, split in splits.items()},
            ),
            "image of test: uint8[32, 32, 1] there, uint8[16, 32, 1] here",
        ),
    ],
)
def test_other_classes_or_shapes_are_an_error(run, digits, change, words):
    digits(change)
    with pytest.raises(UserError, match=re.escape(words)):
        _app(f"--workdir={run[0]}", "--mode=eval")


def test_an_artifact_needs_the_workdir_alone(run, tmp_path, request):
    args = ["linear", f"--workdir={run[0]}"]
    data_dir = f"--config.dataset.data_dir={tmp_path}"  # so that the data set is loaded
    assert export.run([*args, f"--out={tmp_path / 'loaded'}", data_dir]) == 0
    request.getfixturevalue("no_data")
    assert export.run([*args, f"--out={tmp_path / 'without'}"]) == 0
    without, loaded = (artifact.read(tmp_path / name) for name in ("without", "loaded"))
    assert without.programs == loaded.programs
    assert without.manifest["weights"] == loaded.manifest["weights"]
    assert without.manifest["classes"] == list("0123456789")


def test_without_data_json_the_data_set_at_hand_is_used(run, monkeypatch):
    """As for runs of earlier versions."""
    workdir, summary = run
    monkeypatch.setattr(data_json, "_NAME", "absent.json")
    assert _app(f"--workdir={workdir}", "--mode=eval")["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)


def test_flags_of_the_data_set_are_not_ignored(run, no_data):
    command = flags.parse(linear.EXPERIMENT, [f"--workdir={run[0]}", "--mode=eval", "--config.dataset.name=mnist"])
    with pytest.raises(UserError, match="mnist is not prepared"):
        app.restored(linear.EXPERIMENT, command, None, with_examples=False)


def test_the_runs_data_set_may_be_named_among_others(run, no_data):
    """As in a preset."""
    args = [f"--workdir={run[0]}", "--mode=eval", "--config.dataset.name=mnist | digits"]
    command = flags.parse(linear.EXPERIMENT, args)
    mesh = sharding.make_mesh(command.config, jax.devices()[:1])
    assert app.restored(linear.EXPERIMENT, command, mesh, with_examples=False).dataset.name == "digits"


def test_the_recorded_version_is_loaded(run, monkeypatch):
    """Another version may have been prepared since."""
    workdir, _ = run
    names = []
    load, read = sources.load, data_json.read

    def load_version(config, own):
        names.append(config.name)
        return load(dataclasses.replace(config, name="digits"), own)

    monkeypatch.setattr(sources, "load", load_version)
    monkeypatch.setattr(data_json, "read", lambda path: dataclasses.replace(read(path), version="3.0.1"))
    _app(f"--workdir={workdir}", "--mode=eval")
    assert names == ["digits:3.0.1|digits"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("0.3", "0.4", "its checksum differs"), ("shuffle", "shuffled", "its checksum"), ("crc32", "crc", "KeyError")],
)
def test_damage_is_an_error(run, old, new, words, tmp_path):
    """A changed number, name or checksum: the results would be wrong, or the program would fail."""
    text = (run[0] / "data.json").read_text()
    assert old in text
    (tmp_path / "data.json").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"data.json is damaged or of another version \(.*{words}"):
        data_json.read(tmp_path)


def test_statistics_are_exact(tmp_path):
    rng = np.random.default_rng(0)
    values = {
        dtype: (rng.normal(size=(20, 3)) * 10.0 ** rng.integers(-30, 30, (20, 3))).astype(dtype) for dtype in "fd"
    }
    split = {"image": rng.integers(0, 256, (5, 2, 2, 1), np.uint8)}
    dataset = sources.Dataset("drawn", ("a",), split, None, split)

    def single(_):
        return values["f"]

    def double(_):
        return tuple(values["d"])

    computed = [dataset.statistic(single, "image"), dataset.statistic(double, "image")]
    data_json.write(tmp_path, dataset)
    recorded = data_json.read(tmp_path)
    assert recorded is not None
    assert not recorded.has_examples
    assert recorded.num_examples == 5
    assert recorded.label_names == ("a",)
    assert recorded.test["image"].shape == (0, 2, 2, 1)
    assert [recorded.statistic(single, "image"), recorded.statistic(double, "image")] == computed
    np.testing.assert_array_equal(np.asarray(computed[0], np.float32), values["f"])
    np.testing.assert_array_equal(np.asarray(computed[1]), values["d"])

    def another(_):
        raise AssertionError

    with pytest.raises(UserError, match=r"data\.json does not have image\.another"):
        recorded.statistic(another, "image")


@pytest.mark.slow
def test_averaged_parameters_within_an_epoch_get_their_batch_statistics_from_the_data(stop, tmp_path):
    """Only these need examples: a checkpoint at the end of an epoch has its own."""
    args = [*FLAGS, "--config.optimizer.ema_decay=0.9", "--config.steps_per_dispatch=1", f"--workdir={tmp_path}"]
    stop(4, lambda signals: _app(*args, experiment=outsider.EXPERIMENT, signals=signals))
    command = flags.parse(outsider.EXPERIMENT, [f"--workdir={tmp_path}", "--mode=eval"])
    mesh = sharding.make_mesh(command.config, jax.devices()[:1])
    without, loaded = (
        app.restored(outsider.EXPERIMENT, command, mesh, with_examples=with_examples) for with_examples in (False, True)
    )
    assert without.progress.step == 4
    jax.tree.map(np.testing.assert_array_equal, without.state.ema_model_state, loaded.state.ema_model_state)
