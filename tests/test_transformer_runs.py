"""The Transformer as an experiment: the same on any mesh, with the loss in chunks, and exported with its cache."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import char_rnn
from launch import export, predict
from launch.artifacts import artifact, runtimes
from launch.artifacts.artifact import ArtifactError
from research import app, optimizers, sharding
from research.config import MeshConfig, OptimizerConfig, RNNConfig
from research.data.batch import Batch
from research.data.sources import Dataset
from research.errors import UserError
from research.tasks import token_loss
from research.tasks.generation import SampleOptions, generate
from research.training import hyperparams
from research.training.run import Training
from research.training.state import create_state
from research.training.steps import Steps

TEXT = {"text": np.random.default_rng(0).integers(97, 117, 1200, dtype=np.uint8)}
DATASET = Dataset("drawn", (), TEXT, None, TEXT)
MODEL = RNNConfig(name="transformer", width=16, layers=1, heads=2, dropout=0.2)


def _config(axes=None, model=MODEL):
    optimizer = optimizers.resolve(OptimizerConfig(name="sgd", learning_rate=0.5))
    return char_rnn.CharRNNConfig(
        batch_size=8, optimizer=optimizer, model=model, sequence_length=8, mesh=MeshConfig(**axes or {})
    )


def _after_a_step(axes, devices, model=MODEL, remat="none"):
    """Returns the loss and the parameters after one step, and the number of devices with gradients of their own."""
    config = dataclasses.replace(_config(axes, model), remat=remat)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    dataset = char_rnn.prepare(config, DATASET)
    task = char_rnn.make_task(config, dataset)
    hparams = hyperparams.traced(config, 1)
    with jax.set_mesh(mesh):
        graphdef, state = create_state(task, hyperparams.make_optimizer(config, hparams, task.widths), config, mesh)
        steps = Steps(task, graphdef, config, mesh)
        batch = Batch(dataset.train, index=np.arange(8), epoch=np.zeros(8, int)).gather(dataset.train)
        batches = jax.tree.map(lambda x: np.reshape(x, (1, 1, *np.shape(x))), batch)
        state, metrics = steps.jit_train(state)(state, {}, batches, np.int32(1), hparams)
    return jax.device_get((metrics["loss"], state.params)), steps.num_replicas


@functools.cache
def _on_one_device(name):
    """Computed from all logits at once."""
    return _after_a_step({}, 1, dataclasses.replace(MODEL, name=name, heads=2 if name == "transformer" else 0))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axes", "replicas", "remat"),
    [
        ("transformer", {}, 8, "all"),
        ("transformer", {"data": 2, "fsdp": 2, "model": 2}, 1, "blocks"),
        ("mingru", {"data": 2, "sequence": 4}, 1, "none"),
    ],
)
def test_eight_devices_with_the_loss_in_chunks_train_as_one_without(name, axes, replicas, remat, monkeypatch):
    expected = _on_one_device(name)
    monkeypatch.setattr(token_loss, "MAX_LOGITS", 8 if replicas == 1 else 64)  # chunks of 3 or fewer time steps
    axes = {"data": 1, **axes} if axes else axes
    model = dataclasses.replace(MODEL, name=name, heads=2 if name == "transformer" else 0)
    results, num_replicas = _after_a_step(axes, 8, model, remat)
    assert num_replicas == replicas
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6), results, expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network at its initial parameters, and the folder of its artifact."""
    config = _config()
    dataset = char_rnn.prepare(config, DATASET)
    config = char_rnn.EXPERIMENT.resolve(config, dataset)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    training = Training(config, char_rnn.make_task(config, dataset), dataset, mesh)
    folder = tmp_path_factory.mktemp("transformer") / "out"
    artifact.write(folder, *export.contents("char_rnn", training))
    return training, folder


def _generated(training, length):
    """Greedily continues "ab" in this process."""

    def texts(model: nnx.Module, batch, key):
        carry = training.task.generation_carry(1)
        return generate(model, batch["prompt"], carry, key, length=length, temperature=0, top_p=1.0)

    (tokens,) = training.predictor()(texts, {"prompt": np.array([[0, 1]], np.int32)})
    return "".join(training.dataset.label_names[token] for token in tokens)


def test_an_artifact_writes_on_past_its_context_as_the_network_does(exported, capsys):
    training, folder = exported
    predict.run([f"--artifact={folder}", "--prompt=ab", "--length=20", "--temperature=0"])
    assert capsys.readouterr().out.partition("\n")[2].strip() == "ab" + _generated(training, 20)


def test_a_prompt_longer_than_the_context_is_an_error(exported, monkeypatch, capsys):
    """In the artifact, before it is compiled, and in the experiment; a recurrent network has no such limit."""
    training, folder = exported
    predict.run([f"--artifact={folder}", f"--prompt={8 * 'a'}", "--length=1"])
    monkeypatch.setattr(predict, "_runtime", None)
    with pytest.raises(ArtifactError, match="--prompt has 9 tokens, the network's context 8: shorten it"):
        predict.run([f"--artifact={folder}", f"--prompt={9 * 'a'}", "--length=1"])

    def sampled(config, prompt):
        def drawn(function, arrays, *, seed):
            return np.zeros((1, 1), np.int32)

        options = SampleOptions(prompt=prompt, length=1)
        char_rnn.sample(drawn, config, training.dataset, options, folder)  # pyright: ignore[reportArgumentType]

    sampled(training.config, 8 * "a")
    with pytest.raises(UserError, match="--prompt has 9 tokens, the network's context 8: shorten the prompt"):
        sampled(training.config, 9 * "a")
    sampled(_config(model=dataclasses.replace(MODEL, name="gru", heads=0)), 9 * "a")


@pytest.mark.parametrize("context", ["8", 8.0, True])
def test_an_artifact_whose_context_is_no_number_is_refused(exported, tmp_path, context):
    read = artifact.read(exported[1])
    functions = {"step": read.manifest["functions"]["step"] | {"context": context}}
    artifact.write(tmp_path / "a", read.manifest | {"functions": functions}, read.weights, read.programs)
    with pytest.raises(ArtifactError, match="not a number of tokens"):
        artifact.read(tmp_path / "a")


def test_the_state_of_an_artifact_is_the_cache(exported):
    read = artifact.read(exported[1])
    inputs = read.manifest["functions"]["step"]["inputs"]
    cache = {"shape": ["b", 8, 2, 8], "dtype": "float32"}
    assert inputs == {
        "token": {"shape": ["b"], "dtype": "int32"},
        "carry.0": {"shape": ["b"], "dtype": "int32"},
        "carry.1": cache,
        "carry.2": cache,
    }
    state = {name: np.zeros((3, *x["shape"][1:]), x["dtype"]) for name, x in inputs.items()}
    outputs = runtimes.JaxRuntime(read)("step", state | {"token": np.array([1, 2, 1], np.int32)})
    np.testing.assert_array_equal(outputs["carry.0"], 1)
    np.testing.assert_allclose(outputs["logits"][0], outputs["logits"][2], atol=1e-6)
    assert np.abs(outputs["logits"][0] - outputs["logits"][1]).max() > 1e-3


@pytest.mark.slow
def test_the_command_trains_evaluates_and_samples_past_the_context(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    workdir = f"--workdir={tmp_path / 'run'}"
    tiny = ["--config.dataset.name=pydoc", "--config.num_steps=2", "--config.batch_size=256", "--config.model.width=8"]
    tiny += ["--config=transformer", "--config.model.layers=1", "--config.sequence_length=32", "--config.mesh.data=-1"]
    summary = app.run(char_rnn.EXPERIMENT, [workdir, *tiny])
    evaluated = app.run(char_rnn.EXPERIMENT, [workdir, "--mode=eval", "--config.batch_size=64"])
    assert evaluated["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-4)  # no chunk needs another
    app.run(char_rnn.EXPERIMENT, [workdir, "--mode=sample", "--prompt=class ", "--length=50"])
    assert "--- sample 1 of 1\nclass " in capsys.readouterr().out
