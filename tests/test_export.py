"""`launch.export`: the artifact computes what the checkpoint does, on JAX and on IREE, and is written whole or not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export as jax_export
from jax.extend.mlir import ir
from jax.interpreters.mlir import make_ir_context

from experiments import char_rnn, cifar_cnn, mnist_vae
from launch import export
from launch.artifacts import artifact, runtimes
from research import app, flags, sharding
from research import config as config_lib
from research.data import images, sources
from research.errors import RecordError, UserError
from research.tasks.classification import Classification
from research.tasks.task import Task
from research.training import evaluation
from research.training.checkpoint import Checkpoints, checksums_of
from research.training.run import Training

_BYTES = np.frombuffer(b"how doth the little crocodile improve his shining tail, " * 8, np.uint8)
TEXT = sources.Dataset("drawn", (), {"text": _BYTES}, None, {"text": _BYTES[:100]})


def _begun(experiment, config, dataset):
    dataset = experiment.prepare(config, dataset)
    config = experiment.resolve(config, dataset)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    return Training(config, experiment.make_task(config, dataset), dataset, mesh)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a classifier of digits, whose average of the parameters is not its parameters."""
    folder, config = tmp_path_factory.mktemp("run"), cifar_cnn.get_config()
    config.dataset.name, config.model.width, config.batch_size = "digits", 4, 96
    config.optimizer.ema_decay = 0.9
    training = _begun(cifar_cnn.EXPERIMENT, config, sources.load(config.dataset))
    average = jax.tree.map(lambda x: 1.5 * x + 0.01, training.state.ema_params)
    state = dataclasses.replace(training.state, ema_params=average)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(training.config)))
    with Checkpoints(folder, keep=1, message=print) as saved:
        saved.save(state, checksums_of(state), dataclasses.asdict(training.progress) | {"step": 1}, None)
    return folder


@pytest.fixture(scope="module")
def checkpoint(run):
    """As `--mode=eval` restores it, on eight devices."""
    asked = flags.parse(cifar_cnn.EXPERIMENT, ["--mode=eval", f"--workdir={run}"])
    return app.restored(cifar_cnn.EXPERIMENT, asked, app.start(asked.config))


@pytest.fixture(scope="module")
def classifier(run, tmp_path_factory):
    """What the command makes of it."""
    out = tmp_path_factory.mktemp("artifact") / "out"
    assert export.run(["experiments.cifar_cnn", f"--workdir={run}", f"--out={out}"]) == 0
    return artifact.read(out)


def _written(folder, name, training):
    artifact.write(folder, *export.contents(name, training))
    return artifact.read(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """At its initial parameters, and its artifact."""
    config = mnist_vae.get_config()
    config.model.width, config.model.latents = 8, 3
    training = _begun(mnist_vae.EXPERIMENT, config, sources.load(config_lib.DatasetConfig(name="digits")))
    return training, _written(tmp_path_factory.mktemp("vae") / "out", "mnist_vae", training)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """At its initial parameters, and its artifact."""
    config = char_rnn.lstm()
    config.model.width, config.batch_size, config.sequence_length = 8, 4, 8
    training = _begun(char_rnn.EXPERIMENT, config, TEXT)
    return training, _written(tmp_path_factory.mktemp("rnn") / "out", "char_rnn", training)


def _logits(checkpoint, examples):
    """By the path of evaluation, not of the export."""
    task = checkpoint.task

    def logits(model, batch, _):
        return model(images.normalize(batch["image"], task.mean, task.std), train=False)

    return checkpoint.predictor()(logits, {"image": examples})


def test_the_classifier_is_the_checkpoint_on_the_test_set(checkpoint, classifier):
    test = checkpoint.dataset.test
    runtime = runtimes.JaxRuntime(classifier)
    logits = runtime("classify", {"image": test["image"]})["logits"]
    np.testing.assert_allclose(logits, _logits(checkpoint, test["image"]), atol=1e-5)
    assert (logits.argmax(-1) == test["label"]).mean() == pytest.approx(
        evaluation.evaluate(checkpoint)["test_accuracy"]
    )
    few = runtime("classify", {"image": test["image"][:7]})["logits"]
    np.testing.assert_allclose(few, logits[:7], atol=1e-5)


@pytest.mark.slow
def test_an_artifact_runs_with_64_bit_numbers_and_another_generator(vae):
    _, exported = vae
    inputs = {"seed": np.array(3, np.uint32), "index": np.arange(4, dtype=np.int32)}
    usual = runtimes.JaxRuntime(exported)("sample", inputs)["image"]
    before = jax.config.jax_enable_x64, jax.config.jax_default_prng_impl
    try:
        for values in ((True, "rbg"), before):
            jax.config.update("jax_enable_x64", values[0])
            jax.config.update("jax_default_prng_impl", values[1])
            np.testing.assert_array_equal(runtimes.JaxRuntime(exported)("sample", inputs)["image"], usual)
    finally:
        jax.config.update("jax_enable_x64", before[0])
        jax.config.update("jax_default_prng_impl", before[1])


def test_the_average_of_the_parameters_is_what_is_exported(checkpoint, classifier):
    exported = classifier.weights["params.logits.kernel"]
    np.testing.assert_array_equal(exported, checkpoint.state.ema_params["logits"]["kernel"][...])
    assert not np.array_equal(exported, checkpoint.state.params["logits"]["kernel"][...])


def test_the_manifest_says_what_goes_in_and_out(checkpoint, classifier):
    manifest = classifier.manifest
    function = manifest["functions"]["classify"]
    assert function["inputs"] == {"image": {"shape": ["b", 32, 32, 1], "dtype": "uint8"}}
    assert function["outputs"] == {"logits": {"shape": ["b", 10], "dtype": "float32"}}
    assert str(checkpoint.task.mean) in function["preprocessing"]
    assert manifest["classes"] == [str(i) for i in range(10)]
    assert manifest["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    assert manifest["versions"]["jax_version"] == jax.__version__
    assert manifest["step"] == checkpoint.progress.step
    assert manifest["config"]["optimizer"]["ema_decay"] == 0.9


def test_each_platform_gets_its_form_of_the_convolution(classifier):
    """Two of the three, of 1 and 4 channels, are products of patches on a CPU, and convolutions elsewhere."""
    exported = jax_export.deserialize(bytearray(classifier.programs["classify"]))
    assert b"test_export" not in classifier.programs["classify"]  # nor other paths of source files
    assert b".py" not in classifier.programs["classify"]
    weights = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in classifier.weights.items()}
    counts = {}
    for platform in exported.platforms:
        shapes = weights, {"image": jax.ShapeDtypeStruct((2, 32, 32, 1), np.uint8)}
        fixed = jax_export.export(jax.jit(exported.call), platforms=[platform])(*shapes)
        refined = runtimes.mlir.refine_polymorphic_shapes(fixed.mlir_module().encode(), enable_shardy=True)
        counts[platform] = _assembly(refined).count("stablehlo.convolution")
    assert counts == {"cpu": 1, "cuda": 3, "rocm": 3, "tpu": 3}


def _assembly(module):
    with make_ir_context():
        return str(ir.Module.parse(module))


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, classifier, tmp_path):
    again = _written(tmp_path / "again", "cifar_cnn", checkpoint)
    assert again.manifest["sha256"] == classifier.manifest["sha256"]


def test_encoder_decoder_and_sampler(vae):
    training, exported = vae
    runtime, predict, task = runtimes.JaxRuntime(exported), training.predictor(), training.task
    batch = {"image": training.dataset.test["image"][:6], "index": np.arange(6, dtype=np.int32)}
    targets, means = predict(task.encoded, batch)
    encoded = runtime("encode", batch)
    np.testing.assert_array_equal(encoded["targets"], targets)
    np.testing.assert_allclose(encoded["mean"], means, atol=1e-5)
    decoded = runtime("decode", {"latents": encoded["mean"]})
    np.testing.assert_allclose(decoded["image"], predict(task.decoded, {"latents": means}), atol=1e-5)
    sigmoid = 1 / (1 + np.exp(-decoded["parameters"].astype(np.float64)))
    np.testing.assert_allclose(decoded["image"].reshape(6, -1), sigmoid, atol=1e-6)

    def drawn(seed, *index):
        return runtime("sample", {"seed": np.array(seed, np.uint32), "index": np.array(index, np.int32)})["image"]

    some = drawn(0, 0, 1, 2)
    np.testing.assert_allclose(drawn(0, 2, 0), some[[2, 0]], atol=1e-6)
    assert not np.allclose(some[0], some[1])
    assert not np.allclose(drawn(1, 0, 1, 2), some)


def _steps(runtime, tokens):
    """The logits after each character, [b, T, characters], one step at a time from a memory of nothing."""
    memory = {f"carry.{i}": np.zeros((len(tokens), 8), np.float32) for i in range(2)}
    logits = []
    for column in tokens.T:
        outputs = runtime("step", {"token": column, **memory})
        memory = {name: outputs[name] for name in memory}
        logits.append(outputs["logits"])
    return np.stack(logits, 1)


def _tokens(training):
    return training.dataset.test["tokens"][:3][:, :8].astype(np.int32)


def test_steps_are_the_whole_text_at_once(language_model):
    training, exported = language_model
    tokens = _tokens(training)

    def whole(model, batch, _):
        carry = training.task.initial_carry(len(batch["tokens"]))
        return model(batch["tokens"], carry, jnp.zeros(len(batch["tokens"]), bool), train=False)[0]

    expected = training.predictor()(whole, {"tokens": tokens})
    np.testing.assert_allclose(_steps(runtimes.JaxRuntime(exported), tokens), expected, atol=1e-5)


@pytest.mark.slow
def test_iree_gives_the_same(checkpoint, classifier, vae, language_model):
    pytest.importorskip("iree.compiler", reason="IREE is not installed: pip install -e '.[iree]'")
    examples = checkpoint.dataset.test["image"][:16]
    iree = runtimes.IreeRuntime(classifier)
    np.testing.assert_allclose(
        iree("classify", {"image": examples})["logits"], _logits(checkpoint, examples), atol=1e-5
    )
    tokens = _tokens(language_model[0])
    pair = [_steps(kind(language_model[1]), tokens) for kind in (runtimes.IreeRuntime, runtimes.JaxRuntime)]
    np.testing.assert_allclose(*pair, atol=1e-5)
    inputs = {"seed": np.array(3, np.uint32), "index": np.arange(4, dtype=np.int32)}
    pair = [kind(vae[1])("sample", inputs)["image"] for kind in (runtimes.IreeRuntime, runtimes.JaxRuntime)]
    np.testing.assert_allclose(*pair, atol=1e-5)


def test_bad_flags_are_named_before_anything_is_restored(run, tmp_path):
    full, workdir = tmp_path / "full", f"--workdir={run}"
    full.mkdir()
    (full / "file").touch()
    for args, words in (
        ([workdir], "give --out=DIR"),
        ([f"--out={tmp_path / 'x'}"], "give --workdir=DIR, the folder of the run"),
        ([workdir, f"--out={full}"], "full exists and is not an empty folder"),
        ([workdir, f"--out={full / 'file'}"], "exists and is not an empty folder"),
        ([workdir, "--out=gs://bucket/x"], "is not on this machine"),
        ([f"--workdir={full}", f"--out={tmp_path / 'x'}"], "full does not hold a run"),
        ([workdir, f"--out={tmp_path / 'x'}", "--mode=eval"], "--mode does not apply to launch.export"),
        ([workdir, f"--out={tmp_path / 'x'}", "--reproduce=x"], "--reproduce"),
        (
            [workdir, f"--out={tmp_path / 'x'}", "--config.model.pool=average"],
            "holds a run with another config: model.pool",
        ),
    ):
        with pytest.raises(UserError, match=words):
            export.run(["experiments.cifar_cnn", *args])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.os, "fsync", fails)
    with pytest.raises(RecordError, match="No space left on device"):
        export.run(["experiments.cifar_cnn", f"--workdir={run}", f"--out={tmp_path / 'x'}"])
    assert not list(tmp_path.iterdir())


class _Counts(nnx.Module):
    """Asks for the batch size as a number."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(32 * 32, 10, rngs=rngs)

    def __call__(self, images, *, train, key=None):
        return self.linear(images.reshape(len(images), -1))


def test_a_network_that_counts_its_batch_is_told_what_to_write(checkpoint):
    task = Classification(_Counts, checkpoint.task.mean, checkpoint.task.std)
    function = task.functions(_Counts(nnx.Rngs(0)), checkpoint.dataset)["classify"]
    with pytest.raises(UserError, match=r"x.shape\[0\] instead of len\(x\)"):
        export._export("classify", function, lambda _: _Counts(nnx.Rngs(0)), {})


def test_a_task_without_functions_cannot_be_exported(checkpoint, monkeypatch):
    monkeypatch.setattr(Classification, "functions", Task.functions)
    with pytest.raises(UserError, match="Classification does not define `functions`"):
        export.contents("cifar_cnn", checkpoint)
