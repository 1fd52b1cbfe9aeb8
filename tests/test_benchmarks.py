"""The benchmarks compare equal work, and fail if it differs."""

import dataclasses
import json
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import algorithms, depth, growth, language, output, several_seeds, speedrun, structures, trials, width
from benchmarks import command as command_lib
from benchmarks.peers import flax_peer, meshwork_peer, table, works
from benchmarks.peers.clock import Clock
from experiments import char_rnn, cifar_cnn, image_vae, mnist_vae
from research import flags
from research.config import DatasetConfig, OptimizerConfig, VAEConfig
from research.errors import UserError
from research.models import hierarchical_vae


def _given(network, **changes):
    rng = np.random.default_rng(0)
    work = dataclasses.replace(works.WORKS[network][0], **changes)
    images = {
        "cifar10": rng.integers(0, 256, (64, 32, 32, 3)).astype(np.uint8),
        "label": rng.integers(0, 10, 64).astype(np.int32),
        "mnist": np.zeros((64, 28, 28, 1), np.uint8),
    }
    return work, works.make(work, images, rng.integers(0, 16, 2000).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "changes"),
    [("cnn", {"batch_size": 16, "steps": 4}), ("lstm", {"batch_size": 8, "steps": 3, "width": 8})],
)
def test_this_project_and_flax_make_the_same_updates(network, changes):
    work, arrays = _given(network, **changes)
    clocks = [Clock(time.time()), Clock(time.time())]
    for peer, clock in zip((meshwork_peer, flax_peer), clocks):
        peer.train(work, arrays, "", 3, clock)
        assert clock.first_step_seconds > 0
        assert len(clock.seconds) == 3
    np.testing.assert_allclose(clocks[0].losses, clocks[1].losses, rtol=2e-4)
    assert clocks[0].losses[2] < clocks[0].losses[0]


def test_each_parameter_of_the_hierarchical_vae_gets_a_weight_of_its_shape():
    work, arrays = _given("hierarchical_vae")
    model = mnist_vae.hierarchical().model
    network = nnx.eval_shape(lambda: hierarchical_vae.create(model, mean=np.zeros((28, 28, 1)), rngs=nnx.Rngs(0)))
    filled = meshwork_peer._parameters(network, work.network)
    for parameter, weight in zip(filled, works.weights(arrays), strict=True):
        assert weight.shape in (parameter.shape, (1, 1, *parameter.shape))
    assert len(jax.tree.leaves(nnx.state(network))) == len(filled) + 1  # the first state is 0 in both
    assert network.start.shape == (works.HIERARCHY_START, works.HIERARCHY_START, works.HIERARCHY_WIDTH)


def _reports(loss, *seconds):
    report = {"first_step_seconds": 1.0, "peak_memory_bytes": 2**20, "device": "NVIDIA H200", "step_flops": 4.947e12}
    return [{**report, "losses": [loss, loss], "seconds": [9.0, s]} for s in seconds]


def test_ratios_are_within_a_round_and_exclude_the_first_epoch():
    work = works.Work("cnn", 10, 10)
    row = table.row(work, "torch", _reports(2.0, 1.0, 2.0, 1.0), _reports(2.01, 2.0, 2.0, 3.0))
    assert (row["ratio"], row["ratio_min"], row["ratio_max"], row["rounds"]) == (2.0, 1.0, 3.0, 3)
    assert (row["examples_per_second"], row["peer_examples_per_second"]) == (100.0, 50.0)
    assert row["flops_utilisation"] == 0.1  # ten steps a second, of 494.7 teraflops in TF32
    assert table.utilization("cpu", "float32", 1e9) is None


def test_a_speedruns_row_has_the_standard_error_of_its_accuracy():
    runs = [{"test_accuracy": a, "seconds": s} for a, s in ((0.90, 1.0), (0.92, 3.0), (0.94, 2.0))]
    row = speedrun.row("ours", runs)
    assert row["accuracy_standard_error"] == pytest.approx(0.02 / 3**0.5)
    assert speedrun.line(row) == "| ours | 3 | 0.9200 ± 0.0115 | 2.000 (1.000 to 3.000) |"


def test_another_work_is_refused():
    with pytest.raises(SystemExit, match="not the same work"):
        table.row(works.Work("cnn", 10, 10), "torch", _reports(2.0, 1.0), _reports(2.1, 1.0))


def test_new_rows_of_the_peers_replace_old_ones(tmp_path):
    work, path = works.Work("cnn", 10, 10), tmp_path / "peers.json"
    old, new = (table.row(work, "torch", _reports(2.0, s), _reports(2.0, 1.0)) for s in (1.0, 0.5))
    path.write_text(json.dumps([old, {**old, "peer": "keras"}]))
    assert table.merged(path, [new]) == [new, {**old, "peer": "keras"}]


@pytest.mark.slow
def test_growth_counts_every_iteration_of_a_loop(monkeypatch):
    monkeypatch.setattr(growth, "_SECONDS", 0.01)
    case = next(case for case in growth.cases() if case.grows.startswith("sequence"))
    row = growth.measure(case)
    tokens, units = 32 * case.size, 128
    # Forward and twice backward: the recurrent product and the 64 logits; the rest is elementwise.
    assert row["gflop"] == pytest.approx(6 * tokens * units * (4 * units + 64) / 1e9, rel=0.15)


def test_the_table_has_a_row_a_work_and_a_column_a_peer():
    work, other = works.Work("cnn", 10, 10), works.Work("lstm", 8, 10, width=4)
    rows = [table.row(work, peer, _reports(2.0, 1.0), _reports(2.0, 2.0)) for peer in ("torch", "flax")]
    rows.append(table.row(other, "flax", _reports(2.0, 1.0), _reports(2.0, 4.0)))
    lines = table.markdown(rows).splitlines()
    assert lines[2] == "| cnn | 10 | float32 | 100 images/s, 10% of peak | 2.00 (2.00, 2.00) | 2.00 (2.00, 2.00) |"
    assert lines[3].endswith("| - | 4.00 (4.00, 4.00) |")
    assert lines[7] == "| cnn | 10 | float32 | 1.0 s, 1 | 1.0 s, 1 | 1.0 s, 1 |"


@pytest.mark.slow
def test_the_loss_of_each_rate_and_width_is_recorded():
    case = width.cases()["vae"]
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, num_epochs=1), widths=(8,))
    case = dataclasses.replace(case, rates=(1e-4, 1e-2, 1e30))
    small, best, diverged = width.losses(case, "mup", 8)
    assert diverged is None
    assert best < small < 32 * 32 * 0.7  # a uniform guess costs log 2 nats per pixel
    row = {"network": "vae", "parametrization": "mup", "width": 8, "rates": (0.25, 0.5), "losses": [3.0, 2.0]}
    assert width.line(row) == "vae   mup       width    8: best rate 2^-1, loss 2.0000"
    lines = width.plot([row, row | {"parametrization": "standard", "width": 16}]).axes
    assert [axes.get_title() for axes in lines] == ["vae, mup", "vae, standard"]
    assert lines[1].lines[0].get_xydata().tolist() == [[0.25, 3.0], [0.5, 2.0]]


@pytest.mark.slow
def test_a_rule_is_tuned_on_the_validation_split_and_reported_on_the_test_split():
    study = algorithms.studies()["vae"]
    config = dataclasses.replace(study.config, num_epochs=1, model=VAEConfig(width=8, depth=1, latents=2))
    study = dataclasses.replace(study, config=config, reach=1)
    row = algorithms.measure(study, "adam", 128, 2)
    assert row["rates"] == pytest.approx([1e-3 / 10**0.5, 1e-3, 1e-3 * 10**0.5])
    assert row["learning_rate"] == row["rates"][np.argmin(row["validation"])]
    assert row["mean"] == pytest.approx(np.mean(row["test"]))
    assert row["standard_deviation"] == pytest.approx(np.std(row["test"], ddof=1)) != 0
    fields = [{"optimizer.learning_rate": row["learning_rate"], "seed": 1}]
    config = dataclasses.replace(config, batch_size=128, optimizer=OptimizerConfig(name="adam", schedule="cosine"))
    (validation,) = trials.train(study.experiment, config, fields)
    assert validation["loss"] != row["test"][0]  # the same run on other images
    assert validation["loss"] == pytest.approx(row["test"][0], rel=0.1)
    (axes,) = algorithms.plot([row, row | {"rule": "sgd"}]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["adam", "sgd"]


def test_merging_replaces_only_rows_of_equal_keys(tmp_path):
    first, second, other = [{"network": n, "width": w, "loss": 1.0} for n, w in (("vae", 1), ("vae", 2), ("cnn", 1))]
    keys = "network", "width"
    assert output.merge(tmp_path, "width", [first], keys) == [first]
    assert output.merge(tmp_path, "width", [second, other], keys) == [first, second, other]
    new = {**first, "loss": 0.5}
    assert output.merge(tmp_path, "width", [new], keys) == [new, second, other]
    assert json.loads((tmp_path / "width.json").read_text())["rows"] == [new, second, other]


def test_the_best_run_has_the_highest_accuracy_or_else_the_lowest_loss():
    assert trials.best([{"loss": 2.0}, {"loss": 1.0}, {}]) == 1
    assert trials.best([{}, {"loss": 2.0, "accuracy": 0.9}, {"loss": 1.0, "accuracy": 0.8}]) == 1


def test_diverged_runs_are_left_out():
    assert several_seeds.spread([0.5, None, 0.7]) == {"mean": 0.6, "standard_deviation": pytest.approx(0.02**0.5)}
    assert several_seeds.shown(several_seeds.spread([0.5, None, 0.7])) == "0.6000 ± 0.1414"
    assert (
        several_seeds.shown(several_seeds.spread([None, 0.5]))
        == several_seeds.shown(several_seeds.spread([None]))
        == "diverged"
    )


def test_unavailable_data_is_an_error_before_anything_is_trained(env, monkeypatch, capsys):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(SystemExit) as exit_:
        trials.check_data([trials.DIGITS, DatasetConfig(name="cifar10")])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cifar10 is not prepared in ")


def test_each_structure_is_a_valid_command_and_their_errors_are_fitted():
    for name, sizes in structures.NETWORKS.items():
        for fields in sizes:
            flags.parse(cifar_cnn.EXPERIMENT, structures.flags_of(name, fields, "digits"))
    widths = (10, 100, 1000, 10000)
    rows = [
        {"network": "simple", "parameters": x, "test_accuracy": [0.8 - x**-0.5 * r for r in (0.99, 1.01)]}
        for x in widths
    ]
    found = structures.law([*rows, {"network": "resnet", "parameters": 1, "test_accuracy": [0.0]}])
    assert found["exponent"] == pytest.approx(0.5, abs=0.02)
    assert found["floor"] == pytest.approx(0.2, abs=0.01)
    assert found["widest_expected"] == pytest.approx(found["widest_measured"], rel=0.05)
    assert found["widest_interval"][0] < found["widest_measured"] < found["widest_interval"][1]


def test_losses_of_language_models_are_fitted_and_the_widest_predicted():
    rows = [
        {
            "network": network,
            "width": width,
            "parameters": 10 * width**2,
            "flops": 100 * width**2,
            "seconds": width,
            "test_loss": [1.3 + exponent * width ** (-2 * exponent) * noise for noise in (0.999, 1.001)],
        }
        for network, exponent in (("lstm", 0.25), ("transformer", 0.4))
        for width in (8, 16, 32, 64)
    ]
    for network, exponent in (("lstm", 0.25), ("transformer", 0.4)):
        _, found = language.law(rows, network, "flops")
        assert found["exponent"][0] == pytest.approx(exponent, rel=0.05)
        assert found["floor"][0] == pytest.approx(1.3, abs=0.01)
        assert found["largest_interval"][0] < found["largest_measured"] < found["largest_interval"][1]
    figure = language.plot([*rows, {**rows[0], "network": "gru"}])  # too few widths of the gru
    assert figure.axes[0].get_legend_handles_labels()[1] == ["lstm", "transformer"]


def test_each_language_model_of_the_study_is_a_valid_command():
    for network in language.NETWORKS:
        flags.parse(char_rnn.EXPERIMENT, language.flags_of(language.Settings(), network, 64, 0.004))


@pytest.mark.slow
def test_the_networks_of_the_depth_study_have_4_to_32_groups_and_equally_many_parameters():
    sizes = []
    for groups, units in depth.NETWORKS.items():
        flags.parse(image_vae.EXPERIMENT, depth.flags_of(groups, 10, 0.004))
        model = dataclasses.replace(image_vae.get_config().model, groups=groups, width=units)
        network = nnx.eval_shape(
            lambda model=model: hierarchical_vae.create(model, mean=np.zeros((32, 32, 3)), rngs=nnx.Rngs(0))
        )
        sizes.append(sum(x.size for x in jax.tree.leaves(nnx.state(network))) - network.bias.size)
    assert [sum(map(int, groups.split(","))) for groups in depth.NETWORKS] == [4, 8, 16, 32]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("exit_code", [2, 3])
def test_the_depth_study_goes_on_after_a_run_that_diverged_but_not_after_other_errors(exit_code, monkeypatch):
    def summary(_, args):
        if "--config.optimizer.learning_rate=1.0" in args:
            raise command_lib.CommandError("error: it failed", exit_code)
        return {"num_params": 5, "model_flops_per_step": 2.0, "train_seconds": 1.0, "test_bits_per_dim": 4.0}

    monkeypatch.setattr(trials, "summary", summary)
    if exit_code == 2:
        with pytest.raises(SystemExit, match="it failed"):
            depth.row("1,1,2,0", 10, [0.1, 1.0])
        return
    row = depth.row("1,1,2,0", 10, [0.1, 1.0])
    assert (row["test_bits_per_dim"], row["flops"]) == ([4.0, None], 20.0)
    assert depth.line(row) == "| 4 | 64 | 5 | 0.0 | 4.00 | diverged |"
    with pytest.raises(UserError, match="diverged at every learning rate"):
        depth.row("1,1,2,0", 10, [1.0])


@pytest.mark.slow
def test_the_perceptron_trains_as_a_command(tmp_path):
    args = ["--config.num_epochs=1", "--config.dataset.train_fraction=0.2", f"--workdir={tmp_path / 'run'}"]
    command_lib.run("the perceptron", ["-m", "benchmarks.mlp", *args])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_train_steps"] == 287 // 32


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["roofline", "extra"], "unexpected argument 'extra'"),
        *(
            pytest.param(args, words, marks=pytest.mark.slow)
            for args, words in [
                (["sweep", "--trials=x"], "flag --trials=x"),
                (["peers", "--peer=nosuch"], "use flax, keras"),
                (["seeds", "--dataset=nosuch"], "nosuch"),
                (["depth", "--rates=0.1,x"], "give positive numbers separated by commas"),
                (["input", "--images=.", "--cores=1,x"], "--cores=1,x: give positive numbers separated by commas"),
                (["photographs", "--images=/nosuch"], "--images=/nosuch has no folder train"),
                (["language", "--epochs=3"], "--epochs is for --study"),
                (["language", "--study", "--widths=8,16,32"], "at least 4 for the power law"),
            ]
        ),
    ],
)
def test_bad_input_of_a_benchmark_is_one_line(args, words, env):
    name, *rest = args
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *rest], env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: .*{re.escape(words)}.*\n", done.stderr)
