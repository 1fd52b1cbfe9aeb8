"""Runs start from the weights of a file, of another run's checkpoint or of an artifact (`--config.init.path`)."""

import copy
import dataclasses
import json
import shutil

import jax
import linear
import numpy as np
import outsider
import pytest
from flax import nnx
from safetensors.numpy import save_file
from weights import DATASET, arrays_of, check_same, create_run, drawn_dataset, linear_config, save_run

from experiments import char_rnn, cifar_cnn, image_classifier, mnist_vae
from launch import export
from launch.artifacts import artifact
from research import app, optimizers, sharding
from research.config import InitConfig, MeshConfig
from research.errors import UserError
from research.training import loop
from research.training.loop import Loop
from research.training.mesh_population import MeshPopulation
from research.training.population import Population
from research.training.run import Training


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The workdir of a run of the linear network, and its parameters."""
    run = create_run(linear_config(seed=7))
    return save_run(run, tmp_path_factory.mktemp("source")), arrays_of(run.state.params)


def test_a_run_starts_from_the_parameters_of_another(source):
    run = create_run(linear_config(source[0]))
    assert run.start_from_weights() == f"started from {source[0]}: 4 of 4 arrays"
    check_same(arrays_of(run.state.params), source[1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=1, fsdp=-1), MeshConfig(data=1, fsdp=2, model=2)])
def test_the_arrays_are_placed_as_the_mesh_shards_them(mesh, source, tmp_path):
    save_file({name.replace("/", "."): value for name, value in source[1].items()}, tmp_path / "own.safetensors")
    for path in (source[0], tmp_path / "own.safetensors"):
        run = create_run(linear_config(path, mesh=mesh), devices=4)
        before = jax.tree.map(lambda x: x.sharding, run.state)
        run.start_from_weights()
        assert before == jax.tree.map(lambda x: x.sharding, run.state)
        check_same(arrays_of(run.state.params), source[1])


@pytest.mark.parametrize("frozen", ["", "^first/"])
def test_the_classifier_starts_anew_where_the_number_of_classes_differs(frozen, source):
    config, dataset = linear_config(source[0]), drawn_dataset(classes=5)
    config.optimizer = dataclasses.replace(config.optimizer, freeze=frozen, ema_decay=0.9)
    run = create_run(config, dataset)
    fresh = arrays_of(run.state.all_params)
    line = run.start_from_weights()
    assert line.endswith("2 of 4 arrays; re-initialized: second/bias, second/kernel, for 5 classes here and 3 there")
    expected = {name: (source[1] if name.startswith("first/") else fresh)[name] for name in fresh}
    check_same(arrays_of(run.state.all_params), expected)
    averaged = nnx.merge_state(run.state.eval_params, run.state.eval_model_state)
    check_same({name: x for name, x in arrays_of(averaged).items() if name in fresh}, expected)


def test_reset_arrays_start_anew(source):
    run = create_run(linear_config(source[0], reset="kernel$"))
    fresh = arrays_of(run.state.params)
    assert "re-initialized by init.reset: first/kernel, second/kernel" in run.start_from_weights()
    expected = {name: (fresh if name.endswith("kernel") else source[1])[name] for name in fresh}
    check_same(arrays_of(run.state.params), expected)


def test_the_best_checkpoint_counts_or_else_the_newest(tmp_path):
    run = create_run(linear_config())
    save_run(run, tmp_path, step=1)
    first = arrays_of(run.state.params)
    run.state = dataclasses.replace(run.state, params=jax.tree.map(lambda x: x + 1, run.state.params))
    for best, offset in ((None, 1), ([0.5, 1], 0)):
        save_run(run, tmp_path, step=1, best=best)
        started = create_run(linear_config(tmp_path))
        started.start_from_weights()
        check_same(arrays_of(started.state.params), {name: x + offset for name, x in first.items()})


def _evaluated(run):
    with jax.set_mesh(run.mesh):
        return run.evaluate()


@pytest.mark.slow
def test_averaged_parameters_and_their_statistics_are_taken_from_a_run_that_evaluates_them(tmp_path, monkeypatch):
    """The new run has their accuracy before it has trained, and all state of the network but its random stream."""
    monkeypatch.setattr(Loop, "draw", lambda _: None)
    config = dataclasses.replace(outsider.get_config(), network="Everything", batch_size=16, num_epochs=1)
    config.optimizer = optimizers.resolve(dataclasses.replace(config.optimizer, ema_decay=0.5))
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    task = outsider.make_task(config, DATASET)
    earlier, summary = loop.train_and_evaluate("outsider", config, task, DATASET, mesh, tmp_path)
    config = copy.deepcopy(config)
    config.init.path, config.seed, config.optimizer.ema_decay = str(tmp_path), 3, 0.0
    run = create_run(config, make_task=outsider.make_task)
    streams = arrays_of(nnx.filter_state(run.state.model_state, nnx.RngState))
    run.start_from_weights()
    assert _evaluated(run)["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    check_same(arrays_of(nnx.filter_state(run.state.model_state, nnx.RngState)), streams)
    assert not np.array_equal(
        arrays_of(earlier.state.params)["last/kernel"], arrays_of(run.state.params)["last/kernel"]
    )


EXPERIMENTS = {
    "cifar_cnn": (cifar_cnn, ["--config=airbench", "--config.model.width=4", "--config.dataset.name=digits"]),
    "char_rnn": (char_rnn, ["--config.dataset.name=pydoc", "--config.model.width=8", "--config.model.layers=1"]),
    "mnist_vae": (mnist_vae, ["--config.dataset.name=digits", "--config.model.width=8"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_starts_from_a_run_or_an_artifact(name, tmp_path):
    module, flags = EXPERIMENTS[name]

    def loaded(seed, path=""):
        config = app.parse(module.EXPERIMENT, [*flags, f"--config.seed={seed}", f"--config.init.path={path}"]).config
        config, dataset, task = app.load(module.EXPERIMENT, config)
        return Training(config, task, dataset, sharding.make_mesh(config, jax.devices()[:1]))

    run = loaded(1)
    state = run.state
    expected = arrays_of(state.eval_params, state.eval_model_state)
    save_run(run, tmp_path / "run")
    weights = {**{f"params.{n}": x for n, x in arrays_of(state.eval_params).items()}}
    weights |= {f"model_state.{n}": x for n, x in arrays_of(state.eval_model_state).items()}
    artifact.write(tmp_path / "artifact", {"functions": {}}, {n.replace("/", "."): x for n, x in weights.items()}, {})
    for path in (tmp_path / "run", tmp_path / "artifact"):
        started = loaded(2, path)
        assert f"{len(expected)} of {len(expected)} arrays" in started.start_from_weights()
        check_same(arrays_of(started.state.params, started.state.model_state), expected)


def test_a_run_starts_from_what_launch_export_wrote(source, tmp_path):
    run = create_run(linear_config(source[0]))
    run.start_from_weights()
    artifact.write(tmp_path / "artifact", *export.contents("linear", run))
    for path in (tmp_path / "artifact", tmp_path / "artifact/weights.safetensors"):
        started = create_run(linear_config(path))
        started.start_from_weights()
        check_same(arrays_of(started.state.params), source[1])


def _torchvision_resnet18(width, classes):
    """A state_dict with the names, shapes and layout of torchvision's resnet18, but narrower; random values."""
    rng = np.random.default_rng(0)
    state = {}

    def add(name, *shape):
        state[name] = rng.standard_normal(shape).astype(np.float32)

    def add_norm(name, features):
        for part in ("weight", "bias", "running_mean", "running_var"):
            add(f"{name}.{part}", features)
        state[f"{name}.num_batches_tracked"] = np.array(3, np.int64)

    add("conv1.weight", width, 3, 7, 7)
    add_norm("bn1", width)
    inputs = width
    for group in range(4):
        outputs = width * 2**group
        for block in range(2):
            name = f"layer{group + 1}.{block}"
            add(f"{name}.conv1.weight", outputs, inputs, 3, 3)
            add(f"{name}.conv2.weight", outputs, outputs, 3, 3)
            add_norm(f"{name}.bn1", outputs)
            add_norm(f"{name}.bn2", outputs)
            if block == 0 and group > 0:
                add(f"{name}.downsample.0.weight", outputs, inputs, 1, 1)
                add_norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    add("fc.weight", classes, inputs)
    add("fc.bias", classes)
    return state


def _resnet18(path, **init):
    config = image_classifier.get_config()
    config.model.width, config.init = 4, InitConfig(str(path), **init)
    dataset = drawn_dataset(classes=5, side=32, channels=3)
    return create_run(image_classifier.EXPERIMENT.resolve(config, dataset), dataset, image_classifier.make_task)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("float32", "float16"))]
)
def test_a_network_starts_from_a_file_with_torchvisions_names(dtype, tmp_path):
    torch = _torchvision_resnet18(4, classes=10)
    stored = {n: x if x.ndim == 0 else x.astype(dtype) for n, x in torch.items()}
    _save(stored, tmp_path / "resnet18.safetensors")
    run = _resnet18(tmp_path / "resnet18.safetensors")
    assert "logits/bias, logits/kernel, for 5 classes here and 10 there" in run.start_from_weights()
    found = arrays_of(run.state.params, run.state.model_state)
    assert not [x for x in found.values() if x.dtype != np.float32]
    expected = {
        "stem/kernel": torch["conv1.weight"].transpose(2, 3, 1, 0),
        "norm/layer/mean": torch["bn1.running_mean"],
        "blocks/0/conv1/kernel": torch["layer1.0.conv1.weight"].transpose(2, 3, 1, 0),
        "blocks/3/norm2/layer/scale": torch["layer2.1.bn2.weight"],
        "blocks/6/shortcut/kernel": torch["layer4.0.downsample.0.weight"].transpose(2, 3, 1, 0),
        "blocks/6/shortcut_norm/layer/var": torch["layer4.0.downsample.1.running_var"],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.astype(dtype).astype(np.float32))


def _save(arrays, path):
    """`safetensors.numpy.save_file`, which does not know bfloat16."""
    path.write_bytes(artifact._serialize(arrays))


def test_everything_that_does_not_match_is_named(tmp_path):
    torch = _torchvision_resnet18(4, classes=5)
    torch["layer5.weight"] = torch.pop("layer3.1.conv2.weight")
    torch["bn1.bias"] = np.zeros(3, np.float32)
    _save(torch, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        _resnet18(tmp_path / "other.safetensors").start_from_weights()
    assert "missing there: blocks/5/conv2/kernel; " in str(error.value)
    assert "of another shape: norm/layer/bias (3,) there, (4,) here; " in str(error.value)
    assert "unknown here: layer5/weight)" in str(error.value)
    run = _resnet18(tmp_path / "other.safetensors", reset="^blocks/5/|^norm/|layer5")
    run.start_from_weights()
    np.testing.assert_array_equal(arrays_of(run.state.params)["logits/kernel"], torch["fc.weight"].T)


def test_the_members_of_a_population_start_from_the_weights(source):
    configs = [linear_config(source[0], reset="^second/", seed=seed) for seed in (3, 4)]
    population = Population(configs[0], linear.make_task(configs[0], DATASET), DATASET, jax.devices()[:1], 2)
    for slot, config in enumerate(configs):
        population.start(slot, config)
    params = arrays_of(population._states.params)
    np.testing.assert_array_equal(params["first/kernel"], np.stack(2 * [source[1]["first/kernel"]]))
    for slot, config in enumerate(configs):
        fresh = arrays_of(create_run(config).state.params)["second/kernel"]
        np.testing.assert_allclose(params["second/kernel"][slot], fresh, rtol=1e-6)


def test_members_over_a_mesh_start_from_the_weights_one_after_another(source):
    config = linear_config(source[0], reset="^second/", mesh=MeshConfig(data=1, fsdp=2))
    population = MeshPopulation(config, linear.make_task(config, DATASET), DATASET, jax.devices()[:2], 1)
    for seed in (3, 4):
        population.start(0, dataclasses.replace(config, seed=seed))
        params = arrays_of(population._members[0].state.params)
        np.testing.assert_array_equal(params["first/kernel"], source[1]["first/kernel"])
        population.stop(0)


FLAGS = ["--config.dataset.name=digits", "--config.dataset.train_fraction=0.1"]


@pytest.mark.slow
def test_a_resumed_run_does_not_need_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Loop, "draw", lambda _: None)

    def run(name, *args):
        flags = [*FLAGS, f"--workdir={tmp_path / name}", *args]
        return app.run(linear.EXPERIMENT, flags, devices=jax.devices()[:1])

    source = run("source")["test_loss"]
    start = run("tuned", f"--config.init.path={tmp_path / 'source'}", "--config.optimizer.learning_rate=0")
    assert start["test_loss"] == source
    assert json.loads((tmp_path / "tuned/config.json").read_text())["init"]["path"] == str(tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    assert run("tuned", "--config.num_epochs=2")["test_loss"] == source
    assert run("tuned", "--mode=eval")["test_loss"] == pytest.approx(source)


@pytest.mark.parametrize(
    ("reset", "words"),
    [
        ("frist", "init.reset=frist matches no parameter: the nearest is first/"),
        (".", "init.reset=. matches every array"),
    ],
)
def test_a_reset_without_effect_is_an_error(reset, words, source):
    with pytest.raises(UserError, match=words):
        create_run(linear_config(source[0], reset=reset)).start_from_weights()
