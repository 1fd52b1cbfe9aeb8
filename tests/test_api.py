"""The Python API: the same bits as the command, and runs that are inspected without it."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import linear
import numpy as np
import pytest
from absl import flags as absl_flags
from drawn import read_lines

import research
from experiments import cifar_cnn, cifar_speedrun
from research import app
from research.config import Config, MeshConfig, assign
from research.errors import OutOfMemoryError, UserError
from research.process.signals import StoppedError
from research.tasks.task import ExportedFunction
from research.training.callbacks import Callback
from research.training.loop import Loop
from research.training.run import Training

EXPERIMENT = linear.EXPERIMENT
FLAGS = [
    "--config.log_every_steps=1",
    "--config.optimizer.learning_rate=0.01",
    "--config.optimizer.ema_decay=0.9",
    "--config.dataset.validation_fraction=0.1",
]


def _config(**fields):
    config = dataclasses.replace(EXPERIMENT.default_config, log_every_steps=1, **fields)
    config.optimizer.learning_rate, config.optimizer.ema_decay = 0.01, 0.9
    config.dataset.validation_fraction = 0.1
    return config


@pytest.fixture(autouse=True, scope="module")
def _digits_without_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TFDS_DATA_DIR", raising=False)
        patch.setattr(Loop, "draw", lambda _: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch."""
    return research.train(EXPERIMENT, _config(), tmp_path_factory.mktemp("api"))


def _checksums(workdir):
    """The newest checkpoint's record: the checksums of all arrays."""
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return json.loads((newest / "record/metadata").read_text())["checksums"]


def _logits(network, images):
    """The linear network in NumPy float64, with the training set's statistics of the pixels."""
    data = EXPERIMENT.load_data(_config().dataset).train["image"] / 255.0
    x = (images / 255.0 - data.mean()) / data.std()
    for layer in (network.first, network.second):
        x = x.reshape(len(x), layer.kernel.shape[0]) @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])
    return x


def test_the_bits_are_those_of_the_command(run, tmp_path):
    summary = app.run(EXPERIMENT, [f"--workdir={tmp_path}", *FLAGS])
    assert len(_checksums(tmp_path)) > 8
    assert _checksums(run.workdir) == _checksums(tmp_path)
    for name in ("metrics.jsonl", "config.json", "data.json"):
        assert (run.workdir / name).read_bytes() == (tmp_path / name).read_bytes()
    assert run.summary.keys() == summary.keys()
    assert run.summary["test_loss"] == summary["test_loss"]


def test_the_run_holds_the_record(run):
    assert run.metrics == read_lines(run.workdir)
    assert [row["step"] for row in run.metrics] == list(range(1, run.step + 1))
    assert run.summary == json.loads((run.workdir / "summary.json").read_text())
    assert dataclasses.asdict(run.config) == json.loads((run.workdir / "config.json").read_text())
    assert repr(run).startswith(f"<run of linear, step {run.step}, test_accuracy=0.")


def test_the_network_is_the_one_of_evaluation(run):
    """The averaged parameters give the summary's loss; with those of the last step it differs by more than this."""
    images, labels = run.dataset.test.values()
    logits = _logits(run.network, images)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert -log_p[np.arange(len(labels)), labels].mean() == pytest.approx(run.summary["test_loss"], rel=1e-5)
    assert np.mean(run.predict(images).argmax(-1) == labels) == pytest.approx(run.summary["test_accuracy"])


@pytest.mark.parametrize("count", [0, 1, 5, 64, 100])
def test_predict_takes_any_number_of_rows(count, run):
    images = run.dataset.test["image"][:count]
    logits = run.predict(images)
    assert (logits.shape, logits.dtype) == ((count, 10), np.float32)
    np.testing.assert_allclose(logits, _logits(run.network, images), atol=1e-4)
    np.testing.assert_allclose(run.predict({"image": images}, "classify", batch_size=16), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((2, 8, 8, 1), np.uint8),), r"image must be uint8 \[b, 32, 32, 1\] with any b, not uint8 \[2, 8, 8"),
        ((np.zeros((32, 32, 1), np.uint8),), r"not uint8 \[32, 32, 1\]"),
        ((np.zeros((2, 32, 32, 1)),), "not float64"),
        ((np.full((2, 32, 32, 1), 256, np.uint16),), "image must be uint8, and these values of uint16 do not fit"),
        (({"images": np.zeros((2, 32, 32, 1), np.uint8)},), "classify has the inputs image, not images"),
        ((np.zeros((2, 32, 32, 1), np.uint8), "classfy"), "the functions of this task are 'classify'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments, words, run):
    with pytest.raises(UserError, match=words):
        run.predict(*arguments)


def test_functions_may_have_several_inputs_and_outputs(run, monkeypatch):
    def call(_, inputs):
        return {"number": inputs["index"], "sum": inputs["one"] + inputs["two"][:, 0]}

    shapes = {"one": ("b", "float32"), "two": ("b, 1", "float32"), "index": ("b", "int32")}
    functions = {"add": ExportedFunction(call, shapes, "")}
    functions["scale"] = ExportedFunction(call, {"by": ("", "float32")}, "")
    monkeypatch.setattr(linear.Classification, "functions", lambda *_: functions)
    loaded = research.load(EXPERIMENT, run.workdir)
    x = np.arange(70.0)
    found = loaded.predict({"one": x, "two": x[:, None]})
    np.testing.assert_array_equal(found["number"], np.arange(70))
    np.testing.assert_array_equal(found["sum"], 2 * x)
    own = loaded.predict({"one": x, "two": x[:, None], "index": np.arange(70)[::-1]})
    np.testing.assert_array_equal(own["number"], np.arange(70)[::-1])
    for inputs, function, words in [
        (x, "add", "add has the inputs one, two: give a dictionary"),
        ({"one": x}, "add", "add has the inputs one, two, index, not one"),
        ({"one": x, "two": x[:9, None]}, "add", "different numbers of examples: {'one': 70, 'two': 9}"),
        (3.0, "scale", "by is a single number, which predict does not support"),
    ]:
        with pytest.raises(UserError, match=words):
            loaded.predict(inputs, function)
    with pytest.raises(UserError, match="batch_size=0: must be at least 1"):
        loaded.predict({"one": x, "two": x[:, None]}, batch_size=0)


def test_a_task_without_functions_still_has_a_predictor(run, monkeypatch):
    monkeypatch.setattr(linear.Classification, "functions", lambda *_: {})
    loaded = research.load(EXPERIMENT, run.workdir)
    images = run.dataset.test["image"][:3]
    with pytest.raises(UserError, match=r"Classification does not define `functions`: use run\.predictor"):
        loaded.predict(images)
    means = loaded.predictor(lambda network, batch, key: batch["image"].mean((1, 2, 3)), {"image": images})
    np.testing.assert_allclose(means, images.mean((1, 2, 3)), rtol=1e-5)


def test_a_loaded_run_is_the_trained_one_on_any_mesh(run):
    images = run.dataset.test["image"][:20]
    sharded = MeshConfig(data=2, fsdp=4)
    for loaded in (research.load(EXPERIMENT, str(run.workdir)), research.load(EXPERIMENT, run.workdir, mesh=sharded)):
        assert (loaded.metrics, loaded.summary, loaded.step) == (run.metrics, run.summary, run.step)
        np.testing.assert_allclose(loaded.predict(images), run.predict(images), atol=1e-5)
        np.testing.assert_array_equal(loaded.dataset.test["image"][:20], images)
        for one, other in zip(jax.tree.leaves(loaded.network), jax.tree.leaves(run.network)):
            np.testing.assert_array_equal(one, other)


def test_a_finished_run_is_extended(run, tmp_path):
    shutil.copytree(run.workdir, tmp_path, dirs_exist_ok=True)
    config = dataclasses.replace(run.config, num_epochs=2)
    longer = research.train(EXPERIMENT, config, tmp_path)
    assert longer.step == 2 * run.step
    assert longer.metrics[: run.step] == run.metrics
    assert research.load(EXPERIMENT, tmp_path, checkpoint="best").step == longer.summary["best_step"]
    assert research.load(EXPERIMENT, tmp_path, checkpoint=run.step).step == run.step
    assert research.train(EXPERIMENT, config, tmp_path).summary == longer.summary  # evaluates it
    config.seed = 1
    with pytest.raises(UserError, match="seed 0 there, 1 here"):
        research.train(EXPERIMENT, config, tmp_path)


class _Kill(Callback):
    every_steps = 7

    def __init__(self, number):
        self.number = number

    def on_step(self, run, metrics):
        if run.progress.step == 7:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedError)])
def test_an_interrupted_run_saves_a_checkpoint_and_resumes_to_the_same_bits(number, kind, run, tmp_path):
    killed = dataclasses.replace(EXPERIMENT, callbacks=lambda _: [_Kill(number)])
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(kind, match="at step 7 with a checkpoint") as error:
        research.train(killed, _config(), tmp_path)
    assert len(error.traceback) == 2  # this function and `train`
    gc.collect()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert not [found for found in gc.get_objects() if isinstance(found, Training)]  # though `error` is alive
    unfinished = research.load(EXPERIMENT, tmp_path)
    assert (unfinished.step, unfinished.summary, len(unfinished.metrics)) == (7, {}, 7)
    research.train(EXPERIMENT, _config(), tmp_path)
    assert _checksums(tmp_path) == _checksums(run.workdir)


def test_another_thread_may_train(run, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(research.train(EXPERIMENT, _config(), tmp_path)))
    thread.start()
    thread.join()
    assert results[0].metrics == run.metrics


def _changed(path, value):
    config = _config()
    assign(config, path, value)
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (linear.get_config, "config is a function; call it: give a Config"),
        ("default", "config is of type str: give a Config"),
        (Config(), r"this config \(Config\) has no field label_smoothing, which the configs of linear have"),
        (_changed("learning_rate", 0.1), r"config\.learning_rate is not a field: did you mean config\.optimizer\.lea"),
        (_changed("model.widht", 8), r"config\.model\.widht is not a field: did you mean config\.model\.width"),
        (_changed("batch_size", 7.5), r"config\.batch_size=7\.5: must be of type int"),
        (_changed("num_epochs", True), "must be of type int"),
        (_changed("optimizer.name", None), "must be of type str"),
        (_changed("batch_size", 0), "--config.batch_size=0: must be at least 1"),
        (_changed("optimizer.name", "sdg"), "'sgd'"),
        (_changed("dataset.name", "no_such_set"), "no_such_set"),
        (_changed("mesh.fsdp", 3), "must multiply to the 8 devices"),
    ],
)
def test_bad_configs_are_user_errors_and_leave_nothing_behind(config, words, tmp_path):
    with pytest.raises(UserError, match=words):
        research.train(EXPERIMENT, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda _: research.train(linear, _config()), "experiment is of type module: give an Experiment"),
        (lambda _: research.train(cifar_speedrun.EXPERIMENT, _config()), "a train loop of its own: run its command"),
        (lambda _: research.train(EXPERIMENT, _config(), tracker="mlfow"), "'mlfow' is unknown: use wandb, mlflow"),
        (lambda _: research.load(linear, "x"), "experiment is of type module"),
        (lambda _: research.load(EXPERIMENT, "nowhere"), "^there is no config.json in nowhere: give the --workdir"),
        (lambda run: research.load(cifar_cnn.EXPERIMENT, run.workdir), "is of another experiment or version"),
        (lambda run: research.load(EXPERIMENT, run.workdir, checkpoint=3), "there is no checkpoint of step 3"),
    ],
)
def test_bad_arguments_are_user_errors(call, words, run):
    with pytest.raises(UserError, match=words):
        call(run)


def test_numbers_of_numpy_are_numbers(monkeypatch):
    commands = []
    monkeypatch.setattr(app, "execute", lambda _, command, __: commands.append(command) or 1 / 0)
    config = _changed("optimizer.learning_rate", np.float32(0.5))
    config.num_epochs, config.optimizer.momentum = np.int64(3), 0
    with pytest.raises(ZeroDivisionError):
        research.train(EXPERIMENT, config, "x", tracker="mlflow")
    (command,) = commands
    found = command.config.optimizer.learning_rate, command.config.num_epochs, command.config.optimizer.momentum
    assert [(value, type(value)) for value in found] == [(0.5, float), (3, int), (0.0, float)]
    assert command.trackers == ("mlflow",)
    assert type(config.num_epochs) is np.int64  # the caller's is not changed


def test_out_of_memory_is_a_user_error(monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: 7 GiB")

    monkeypatch.setattr(app, "execute", fail)
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        research.train(EXPERIMENT, _config(), "x")


def test_importing_the_package_imports_no_jax():
    code = "import sys, research; assert 'jax' not in sys.modules and 'train' in research.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = research.trian
    assert not {"workdir", "config.seed", "config"} & set(absl_flags.FLAGS)  # global flags, after all of the above
