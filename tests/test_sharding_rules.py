"""Sharding rules: any mesh trains as one device, the arrays are split as the rules say, and bad rules are named."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import megatron
import numpy as np
import optax
import pytest
from tiny_images import DATASET

from launch import plan
from launch.plans import hlo, lowering, topologies
from launch.plans.planner import Planner
from research import app, optimizers, sharding
from research.config import MeshConfig
from research.errors import UserError
from research.training import loop
from research.training.run import Training


def _training(rules=megatron.RULES, num_epochs=1, log_every_steps=50, **axes):
    """A run of 6 steps an epoch on a mesh, before its first step; one kernel is frozen."""
    fields = {"num_epochs": num_epochs, "log_every_steps": log_every_steps, "mesh": MeshConfig(**{"data": 1, **axes})}
    config = dataclasses.replace(megatron.get_config(), batch_size=16, **fields)
    config.optimizer = optimizers.resolve(dataclasses.replace(config.optimizer, freeze="0/up/kernel"))
    mesh = sharding.make_mesh(config, jax.devices()[: math.prod(axes.values())])
    task = dataclasses.replace(megatron.EXPERIMENT, sharding_rules=rules).build_task(config, DATASET)
    return Training(config, task, DATASET, mesh)


def _losses(training):
    """The losses of all steps."""
    with jax.set_mesh(training.mesh):
        return np.concatenate([metrics["loss"] for _, metrics in training.dispatches(training.epoch_end_steps[-1])])


def _train(training):
    """The training, its losses and its results."""
    losses = _losses(training)
    with jax.set_mesh(training.mesh):
        return training, losses, training.evaluate()


@functools.cache
def _one_device():
    return _train(_training({}))


def _agrees(found):
    (training, losses, results), (one, one_losses, one_results) = found, _one_device()
    np.testing.assert_allclose(losses, one_losses, rtol=1e-5)
    assert results == pytest.approx(one_results, rel=1e-4)
    for many, single in zip(jax.tree.leaves(training.state), jax.tree.leaves(one.state), strict=True):
        np.testing.assert_allclose(many, single, rtol=1e-3, atol=1e-5)


def _shards(tree, block=1):
    """The shapes of the shards of a block's arrays."""
    return {
        name: tree["blocks"][block][layer][kind][...].addressable_shards[0].data.shape
        for name, layer, kind in (("up", "up", "kernel"), ("bias", "up", "bias"), ("down", "down", "kernel"))
    }


@pytest.mark.slow
def test_column_and_row_parallel_layers_train_as_on_one_device_with_one_all_reduce_each_way():
    """Activations are summed once per block and direction (Shoeybi et al. 2019, figure 3); no kernel is gathered."""
    found = _train(_training(model=4))
    _agrees(found)
    training = found[0]
    moments = [optax.tree.get(training.state.opt_state, name) for name in ("mu", "nu")]
    for tree in (training.state.params, training.state.ema_params, *moments):
        assert _shards(tree) == {"up": (16, 8), "bias": (8,), "down": (8, 16)}
    collectives = hlo.Program(training.train_program.as_text()).collectives()
    assert {collective.kind for collective in collectives} == {"all-reduce"}
    activations = 4 * 16 * 16
    moved = sum(collective.bytes * collective.count for collective in collectives)
    assert 4 * activations <= moved < 4 * activations + 200  # and the scalars of metrics and norms


ALL_AXES = {"data": 2, "fsdp": 2, "model": 2}


@functools.cache
def _rules_of_all_axes():
    """Those that the README shows, and one for the frozen kernel."""
    text = (Path(__file__).parent.parent / "research/README.md").read_text()
    (program,) = re.findall(r"```python\n(SHARDING_RULES.*?)```", text, re.DOTALL)
    exec(program, names := {})
    return {"0/up/kernel": (("data", "fsdp"), "model"), **names["SHARDING_RULES"]}


@pytest.mark.slow
def test_rules_of_all_axes_train_and_predict_as_on_one_device():
    found = _train(_training(_rules_of_all_axes(), **ALL_AXES))
    _agrees(found)
    state = found[0].state
    assert _shards(state.all_params, block=0) == {"up": (4, 16), "bias": (16,), "down": (16, 8)}
    assert _shards(state.params)["up"] == (16, 16)
    many, one = (
        run.predictor()(lambda model, batch, _: model(batch["image"], train=False), DATASET.test)
        for run in (found[0], _one_device()[0])
    )
    np.testing.assert_allclose(many, one, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_parameters_stored_in_shards_along_data_work_with_per_device_gradients(monkeypatch):
    monkeypatch.setattr(megatron.Network, "per_device_gradients", True, raising=False)
    found = _train(_training({"kernel": ("data", None)}, data=2))
    assert found[0]._steps.num_replicas == 2
    _agrees(found)
    assert _shards(found[0].state.params) == {"up": (8, 32), "bias": (32,), "down": (16, 16)}


@pytest.mark.parametrize(
    ("rules", "axes", "words"),
    [
        (
            {"blocks/0/upp": (None, "model")},
            {},
            "sharding_rules=blocks/0/upp matches no parameter: the nearest is blocks/0/up/",
        ),
        ([("up/kernel", (None, "model"))], {}, "sharding_rules: give a dictionary"),
        ({"up/(": (None, "model")}, {}, r"sharding_rules=up/\(: this is not a regular expression"),
        ({"up/kernel": (None, "tensor")}, {}, "'up/kernel' has .* the mesh has no axis 'tensor'; use data, fsdp, seq"),
        ({"up/kernel": "model"}, {}, "'up/kernel' has 'model': give a tuple"),
        ({"up/kernel": ("model", "model")}, {}, "a mesh axis can split only one axis"),
        ({"up/": (None, "model")}, {}, "blocks/0/up/bias is 32, and the rule 'up/' has 2 entries"),
        (
            {"^head/kernel": (None, "model")},
            {"model": 2},
            "head/kernel is 16x3, and --config.mesh.model=2 cannot split",
        ),
        (
            {"^head/bias": (("fsdp", "model"),)},
            {"fsdp": 2, "model": 4},
            "fsdp=2 --config.mesh.model=4 cannot split its 3",
        ),
    ],
)
def test_a_bad_rule_is_named(rules, axes, words):
    with pytest.raises(UserError, match=words):
        _training(rules, **axes)


def test_a_bad_rule_ends_the_command_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    experiment = dataclasses.replace(megatron.EXPERIMENT, sharding_rules=lambda config: {config.optimizer.name: ()})
    with pytest.raises(SystemExit) as exit_:
        app.main(experiment, ["--workdir=w"])
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("error: sharding_rules=adam matches no parameter")
    assert not (tmp_path / "w/config.json").exists()


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh_with_the_results_of_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Loop, "draw", lambda _: None)  # takes longer than training
    meshes = {"num_epochs": 1, "model": 4}, {"rules": _rules_of_all_axes(), "num_epochs": 2, **ALL_AXES}
    for options in meshes:
        run = _training(log_every_steps=1, **options)
        loop.train_and_evaluate("megatron", run.config, run.task, DATASET, run.mesh, tmp_path)
    found = [line["loss"] for line in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "loss" in line]
    assert len(found) == 12
    np.testing.assert_allclose(found, _losses(_training({}, num_epochs=2)), rtol=1e-4)


def test_a_plan_shards_by_the_rules_and_a_search_skips_meshes_that_they_do_not_fit(capsys):
    experiment = dataclasses.replace(megatron.EXPERIMENT, sharding_rules={"head/kernel": (None, "model")})
    config, topology = megatron.get_config(), topologies.parse("h100-4")
    both = [
        plan.Candidate(topology, dataclasses.replace(config, mesh=MeshConfig(data=4 // size, model=size)))
        for size in (2, 4)
    ]
    planner = Planner(experiment, config, [(one.topology, one.config) for one in both])
    assert plan._shardable(planner, both) == both[:1]  # of 10 classes
    assert "skipped 1 of 2 plans" in capsys.readouterr().out
    resolved = dataclasses.replace(planner.workload.config, mesh=both[0].config.mesh)
    lowered = lowering.lower(planner.workload, resolved, sharding.make_mesh(resolved, jax.devices()[:4]))
    block = 16 * 16 + 16 + 32 * 8 + 8  # by the default: the last axis over `model`
    assert sharding.bytes_per_device(lowered[1].params) == 4 * (1024 * 8 + 8 + 16 * 5 + 5 + 2 * block)
    with pytest.raises(UserError, match="model=4 cannot split its 10 evenly"):
        plan._shardable(planner, both[1:])
