"""--describe: the table of layers has the network's shapes, parameters and FLOPs, and nothing is trained or written."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from command import complains, run_here
from drawn import DATASET, Linear
from flax import nnx
from linear import EXPERIMENT

from experiments import char_rnn, cifar_speedrun
from launch import scaling
from research import app, optimizers, sharding
from research.config import AugmentConfig, CNNConfig, Config, MeshConfig, OptimizerConfig, RNNConfig
from research.data.sources import Dataset
from research.errors import UserError
from research.models import cnn
from research.process.signals import Signals
from research.tasks.classification import Classification
from research.training import describe
from research.training.layers import layers
from research.training.run import Training

SGD = optimizers.resolve(OptimizerConfig(name="sgd", learning_rate=0.1))
B, T, W, V = 8, 6, 16, 20  # examples, time steps, width, vocabulary
TEXT = {"text": np.random.default_rng(0).integers(97, 97 + V, 1200, dtype=np.uint8)}


def _layers(task, config, dataset, devices=1):
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return layers(Training(config, task, dataset, mesh, abstract=True))


def _text(**fields):
    model = RNNConfig(**{"width": W, "layers": 3, **fields})
    config = char_rnn.CharRNNConfig(batch_size=B, optimizer=SGD, model=model, sequence_length=T)
    dataset = char_rnn.prepare(config, Dataset("drawn", (), TEXT, None, TEXT))
    return char_rnn.make_task(config, dataset), config, dataset


def _images(network):
    return Classification(network, (0.5,), (0.25,), AugmentConfig(), 0.0), Config(batch_size=B, optimizer=SGD), DATASET


@pytest.mark.parametrize(("devices", "mesh"), [(1, {}), (8, {"data": 2, "fsdp": 2, "model": 2})], ids=["one", "eight"])
def test_every_iteration_of_a_scan_counts_in_the_layer_that_runs_it(devices, mesh):
    task, config, dataset = _text(name="lstm")
    found = {
        one.path: one for one in _layers(task, dataclasses.replace(config, mesh=MeshConfig(**mesh)), dataset, devices)
    }
    product = 2 * W * 4 * W
    # The first layer projects the vocabulary, the others each token.
    assert found["layers/0/inputs"][1:] == ("Linear", f"[{V}, {4 * W}]", W * 4 * W, V * product / B)
    assert found["layers/0"].flops == found["layers/0/inputs"].flops + T * product
    assert found["layers/1-2"][1:] == (
        "Recurrent",
        f"[{T}, {B}, {W}] [{B}, {W}] [{B}, {W}]",
        8 * W * W + 4 * W,
        2 * T * product,
    )
    assert found[""].flops == found["layers/0"].flops + 2 * 2 * T * product + T * 2 * W * V
    assert found[""].num_params == 3 * (8 * W * W + 4 * W) + 2 * W * V + V


def test_layers_are_in_the_order_of_their_calls_and_equal_blocks_are_one():
    config = CNNConfig(name="resnet", width=2, depth=18, norm="batch")
    images = {"image": np.zeros((90, 8, 8, 1), np.uint8), "label": DATASET.train["label"]}
    found = _layers(
        *_images(lambda rngs: cnn.create(config, image_shape=(8, 8, 1), num_classes=3, rngs=rngs))[:2],
        dataclasses.replace(DATASET, train=images, test=images),
    )
    paths = [one.path for one in found]
    assert paths[:5] == ["", "stem", "norm", "blocks/0-1", "blocks/0-1/conv1"]
    assert paths[-1] == "logits"
    assert "norm/layer" not in paths  # all that the module does
    assert found[1].output == f"[{B}, 8, 8, 2]"


def test_a_network_with_shared_and_uncalled_layers():
    class Shared(Linear):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.again, self.unused = self.linear, nnx.Linear(2, 2, rngs=rngs)

    found = _layers(*_images(Shared))
    assert sorted(one[1:] for one in found) == sorted(
        [
            ("Shared", "", 36 * 3 + 3 + 6, 2.0 * 36 * 3),
            ("Linear", f"[{B}, 3]", 36 * 3 + 3, 2.0 * 36 * 3),
            ("Linear", "", 6, 0.0),
        ]
    )


def test_layers_in_a_plain_list_need_no_module_around_them():
    class Listed(Linear):
        def __init__(self, rngs):
            self.blocks = nnx.data([nnx.Linear(36, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])

        def __call__(self, x, *, train, key=None):
            return self.blocks[1](self.blocks[0](x.reshape(len(x), -1)))

    found = _layers(*_images(Listed))
    assert [(one.path, one.flops) for one in found] == [
        ("", 2.0 * 39 * 3),
        ("blocks/0", 2.0 * 36 * 3),
        ("blocks/1", 2.0 * 3 * 3),
    ]


def test_the_memory_is_that_of_the_compiled_program():
    task, config, dataset = _images(Linear)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        memory = Training(config, task, dataset, mesh).train_program.memory_analysis()
        text = "\n".join(describe.lines(Training(config, task, dataset, mesh, abstract=True)))
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    size += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    size += sum(x.nbytes for x in dataset.test.values())
    total = float(re.search(r"([\d.]+) KiB  in all", text)[1])
    assert total == pytest.approx(size / 1024, abs=0.5)  # scalars and alignment differ between versions of jax
    assert "444 B  parameters" in text


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_nothing_is_trained_or_written_and_the_config_is_resolved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    app.main(EXPERIMENT, ["--describe", "--config.batch_size=64"])
    lines = capsys.readouterr().out.splitlines()
    assert not _files(tmp_path)
    assert lines[0].startswith("linear: digits (1,437 train, 360 test), 8 cpu devices")
    assert "  second  Linear  [64, 10]         110                200" in lines
    assert "mesh: data=8 fsdp=1 sequence=1 model=1 (8 x cpu)" in lines
    assert "train steps: 22, each of 64 examples" in lines
    assert f"model FLOPs of a step: {64 * 2 * (2 * 10240 + 3 * 100) / 1e6:.2f} MFLOP" in "\n".join(lines)
    assert "  --config.optimizer.learning_rate=0.1" in lines  # left open on the command line


def test_a_network_that_no_device_here_holds_is_described(capsys):
    app.main(EXPERIMENT, ["--describe", "--config.model.width=50000000", "--config.mesh.fsdp=2"])
    (size,) = re.findall(r"([\d.]+) GiB  parameters", capsys.readouterr().out)
    assert float(size) == pytest.approx(4 * (1024 + 10 + 1) * 50_000_000 / 2 / 2**30, rel=1e-3)


def test_a_runs_config_is_described_and_other_flags_are_checked(tmp_path, capsys):
    config = dataclasses.replace(EXPERIMENT.default_config, batch_size=512, optimizer=SGD)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (tmp_path / "trackers.json").write_text('{"run_id": "0123abcd", "trackers": ["mlflow"]}')
    before = _files(tmp_path)
    describes = ["--describe", f"--workdir={tmp_path}"]
    assert app.parse(EXPERIMENT, describes).trackers == ()  # whether or not their packages are installed
    app.main(EXPERIMENT, describes)
    assert "  --config.batch_size=512" in capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit) as exit_:
        app.main(EXPERIMENT, [*describes, "--config.batch_size=256"])
    assert exit_.value.code == 2
    assert "holds a run with another config: batch_size 512 there, 256 here" in capsys.readouterr().err
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--profile=1:2"], "--profile=1:2 is for training: leave it or --describe out"),
        (["--tracker=wandb"], "--tracker=wandb is for training: leave it or --describe out"),
        (["--describe=5"], "--describe"),
        (["--config.early_stopping_epochs=2"], "needs a validation split"),
        (["--config.batch_size=5000"], "--config.batch_size=5000 is larger than the training set"),
    ],
)
def test_bad_input_is_one_line(args, words, capsys):
    complains(run_here(["--describe", "--config.dataset.name=digits", *args], capsys), words)


def test_other_modes_and_commands_refuse_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(EXPERIMENT.default_config)))
    with pytest.raises(UserError, match="--describe=True is for training: leave it or --mode=eval out"):
        app.parse(EXPERIMENT, [f"--workdir={tmp_path}", "--mode=eval", "--describe"])
    with pytest.raises(UserError, match="--describe is for the runs of an experiment, not of this command"):
        scaling.run(["experiments.cifar_cnn", "--describe"])


def test_a_speedrun_is_described_like_every_training(monkeypatch):
    monkeypatch.setattr(app, "run", lambda experiment, argv, signals: argv)
    assert cifar_speedrun.run(cifar_speedrun.EXPERIMENT, ["--describe"], Signals()) == ["--describe"]
