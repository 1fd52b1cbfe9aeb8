"""`experiments.cifar_speedrun` records repeated runs, and does not overwrite earlier ones."""

import json

import numpy as np
import pytest
from flax import nnx

from experiments import cifar_speedrun
from research.data.sources import Dataset
from research.errors import UserError
from research.process.signals import Signals

ARGS = ["--config=quick", "--config.dataset.name=digits", "--config.model.width=4", "--config.num_runs=2"]


@pytest.mark.slow
def test_every_run_has_another_seed_and_its_accuracy_is_recorded(tmp_path, capsys):
    args = [*ARGS, f"--workdir={tmp_path / 'x'}", "--config.seed=5"]
    summary = cifar_speedrun.run(cifar_speedrun.EXPERIMENT, args, Signals())
    recorded = json.loads((tmp_path / "x/speedrun.json").read_text())
    assert recorded == json.loads(json.dumps(summary))
    assert [run["seed"] for run in recorded["runs"]] == [5, 6]
    accuracies = [run["test_accuracy"] for run in recorded["runs"]]
    assert recorded["accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    assert accuracies[0] != accuracies[1]
    assert all(run["seconds"] > 0 for run in recorded["runs"])
    assert "2 runs: test accuracy " in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another run"):
        cifar_speedrun.run(cifar_speedrun.EXPERIMENT, args, Signals())


@pytest.mark.parametrize("flag", ["--mode=eval", "--reproduce=x", "--config.seed=4294967295"])
def test_unsupported_flags_are_refused(flag, tmp_path):
    with pytest.raises(UserError):
        cifar_speedrun.run(cifar_speedrun.EXPERIMENT, [*ARGS, flag, f"--workdir={tmp_path / 'x'}"], Signals())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "flag",
    [
        "--config.log_every_steps=1",
        "--config.plot_every_epochs=1",
        "--config.checkpoint_every_steps=1",
        "--config.keep_checkpoints=1",
    ],
)
def test_fields_of_records_that_it_does_not_keep_are_refused(flag, tmp_path):
    with pytest.raises(UserError, match=f"{flag[:-2]}: .*remove the flag"):
        cifar_speedrun.run(cifar_speedrun.EXPERIMENT, [*ARGS, flag, f"--workdir={tmp_path / 'x'}"], Signals())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("preset", "channels", "momentum"), [("airbench94", (64, 256, 256), 0.6), ("airbench96", (128, 384, 512), 0.9)]
)
def test_the_presets_networks_are_the_published_ones(preset, channels, momentum):
    """Channels, and batch norm's momentum, equal those of airbench94_muon.py and airbench96_faster.py."""
    config = cifar_speedrun.EXPERIMENT.presets[preset]()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    dataset = Dataset(
        "drawn", tuple("abcdefghij"), {"image": pixels, "label": np.arange(8, dtype=np.int32)}, None, None
    )
    config = cifar_speedrun.EXPERIMENT.resolve(config, dataset)
    task = cifar_speedrun.EXPERIMENT.make_task(config, dataset)
    network = nnx.eval_shape(lambda: task.network(nnx.Rngs(0)))
    assert tuple(group.convs[-1].kernel.shape[-1] for group in network.groups) == channels
    assert {norm.layer.momentum for group in network.groups for norm in group.norms} == {momentum}
    assert (config.model.width, len(network.groups[0].convs)) == (channels[0], config.model.depth)
