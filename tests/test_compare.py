"""Comparing runs, and plotting the curves of one."""

import json
import shutil

import pytest
from drawn import run
from PIL import Image

from research import compare, plots
from research.errors import UserError
from research.training import loop


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, [run(folder / name, rate=rate, plots=True)[1] for name, rate in (("slow", 0.001), ("fast", 0.1))]


@pytest.fixture
def two_runs(trained, tmp_path, monkeypatch):
    """A copy that the test may damage."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return trained[1]


@pytest.mark.slow
def test_differing_fields_and_metrics_are_shown(two_runs, tmp_path, capsys):
    compare.run(["slow", "fast", "--plot=both.png"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["slow", "fast"]
    assert ["config.optimizer.learning_rate", "0.001", "0.1"] in rows
    assert ["test_accuracy", *(f"{summary['test_accuracy']:.4g}" for summary in two_runs)] in rows
    assert [row[0] for row in rows if row[0].startswith("config.")] == ["config.optimizer.learning_rate"]
    with Image.open("both.png") as plot:
        colors = {color for _, color in plot.convert("RGB").getcolors(2**24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors  # a curve of each run


def test_a_run_draws_its_curves_and_one_that_is_not_finished_compares(two_runs, tmp_path, capsys):
    with Image.open("fast/curves.png") as plot:
        assert plot.width > 2 * plot.height  # loss and accuracy, side by side
    (tmp_path / "fast/summary.json").unlink()
    with (tmp_path / "fast/metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    compare.run(["slow", "fast"])
    assert ["test_accuracy", f"{two_runs[0]['test_accuracy']:.4g}", "-"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]
    assert (tmp_path / "compare.png").exists()


def test_a_run_without_metrics_has_no_plot(two_runs, tmp_path, capsys):
    (tmp_path / "slow/metrics.jsonl").write_text("")
    compare.run(["slow", "--plot=none.png"])
    assert "no plot: no run has recorded metrics yet" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


def test_a_run_without_a_finished_epoch_has_no_plot(two_runs, tmp_path, capsys):
    (tmp_path / "slow/metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2.0}\n')
    compare.run(["slow", "--plot=none.png"])
    assert "no plot: no run has recorded metrics yet" in capsys.readouterr().out


def test_damaged_metrics_are_an_error(two_runs, tmp_path):
    (tmp_path / "slow/metrics.jsonl").write_text("garbage\n")
    with pytest.raises(UserError, match=r"slow/metrics\.jsonl cannot be read"):
        compare.run(["slow"])


def test_a_plot_that_fails_stops_nothing(tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(loop.plots, "curves", full)
    _, summary = run(tmp_path, plots=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert "WARNING: curves.png was not drawn: No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give the workdirs"),
        (["nowhere"], "nowhere holds no run"),
        (["slow", "--plots=x"], "plots"),
        (["slow", "--plot=nowhere/x.png"], "--plot=nowhere/x.png cannot be written"),
        (["slow", "--plot=x.nothing"], "--plot=x.nothing cannot be written"),
    ],
)
def test_bad_input_is_named(argv, message, two_runs):
    with pytest.raises(UserError, match=message):
        compare.run(argv)


def test_only_what_was_measured_is_drawn(tmp_path):
    plots.curves({"a": [{"step": 1, "epoch": 1, "train_loss": 1.0}]}).savefig(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as plot:
        assert plot.width < 2 * plot.height
