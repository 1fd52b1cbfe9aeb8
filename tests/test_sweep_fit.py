"""`launch.sweep --fit`: sizes are what a hand count says, and the best trial of each size is what is fitted."""

import linear
import numpy as np
import pytest

optuna = pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

from launch.sweeps import fit, search_space, worker  # noqa: E402
from research import plots  # noqa: E402
from research.errors import UserError  # noqa: E402


@pytest.fixture
def sweep():
    config = linear.get_config()
    config.dataset.validation_fraction = 0.1
    space = search_space.parse([], config)
    return worker.Sweep(linear.EXPERIMENT, config, space, "validation_loss", 1, 1, 1, [])


def test_sizes_are_counted(sweep):
    assert fit.size_of("examples", sweep, sweep.trial_config({"dataset.train_fraction": 0.5})) == round(
        0.5 * (1437 - 144)
    )
    classes = 10
    images = linear.EXPERIMENT.prepare(sweep.config, worker.load(sweep.experiment, sweep.config.dataset)).train["image"]
    inputs = images[0].size
    for width in (4, 8):
        weights = (inputs + 1) * width + (width + 1) * classes
        assert fit.size_of("parameters", sweep, sweep.trial_config({"model.width": width})) == weights


def test_flops_are_those_of_the_products_and_little_else(sweep):
    images = worker.load(sweep.experiment, sweep.config.dataset).train["image"]
    width, steps = 64, len(images) // sweep.config.batch_size
    forward = 2 * sweep.config.batch_size * width * (images[0].size + 10)
    backward = 2 * forward - 2 * sweep.config.batch_size * width * images[0].size  # no gradient of the images
    found = fit.size_of("flops", sweep, sweep.trial_config({"model.width": width}))
    assert 1 < found / ((forward + backward) * steps) < 1.1


def _trial(value, fields=None, **params):
    distributions = {
        name: optuna.distributions.CategoricalDistribution([param])
        for name, param in params.items()  # only to be shown
    }
    attributes = {worker.SEED_VALUES: [value, value + 0.5]} | ({worker.FIELDS: fields} if fields else {})
    return optuna.trial.create_trial(value=value, params=params, distributions=distributions, user_attrs=attributes)


def test_the_best_trial_of_each_size_counts_with_all_its_seeds(sweep):
    ranked = [_trial(value, **{"dataset.train_fraction": part}) for value, part in ((1, 1.0), (2, 0.5), (3, 1.0))]
    points = fit.measurements("examples", sweep, ranked)
    assert points == [(646, 2.0), (646, 2.5), (1293, 1.0), (1293, 1.5)]
    of_file = _trial(1, {"dataset.train_fraction": 0.5}, halves=1)
    assert fit.measurements("examples", sweep, [of_file]) == [(646, 1.0), (646, 1.5)]


def test_a_law_is_found_again_and_tested_on_the_largest():
    sizes = [100, 200, 400, 800, 1600]
    found = fit.fitted("examples", "error", [(size, 0.1 + 2 * size**-0.5) for size in sizes])
    assert (found["floor"], found["factor"], found["exponent"]) == pytest.approx((0.1, 2, 0.5), rel=1e-3)
    assert found["largest"]["expected"] == pytest.approx(found["largest"]["measured"], rel=1e-3)
    assert [row["size"] for row in found["beyond"]] == [3200, 6400, 16000]
    assert "fit: error = 0.1 + 2 * examples^-0.500\n" in fit.lines(found)
    axes = plots.scaling_law(found).axes[0]
    assert axes.get_legend_handles_labels()[1].count("measured") == 1
    line = axes.lines[0].get_xydata()
    np.testing.assert_allclose(line[:, 1], 0.1 + 2 * line[:, 0] ** -0.5, rtol=1e-3)


def test_an_enormous_interval_leaves_the_law_legible():
    found = fit.fitted("examples", "error", [(size, 0.1 + 2 * size**-0.5) for size in (100, 200, 400, 800)])
    found["beyond"][-1]["high"] = 1e120
    assert max(map(len, fit.lines(found).splitlines())) < 120
    assert plots.scaling_law(found).axes[0].get_ylim()[1] < 1


def test_what_cannot_be_fitted_is_named():
    def check(by, seeds, **fields):
        config = linear.get_config()
        texts = [f"{name.replace('_', '.', 1)}={values}" for name, values in fields.items()]
        fit.check(by, search_space.parse(texts, config).distributions, seeds)

    with pytest.raises(UserError, match=r"--fit=examples needs 3 sizes.*search has 1: give --search='dataset\.train"):
        check("examples", 9, model_width="[2,4,6,8]")
    for seeds, widths, count in ((1, "[2,4,6]", 3), (2, "[2,4]", 2), (3, "int(2,5,step=3)", 2)):
        with pytest.raises(UserError, match=f"the search has {count}: give --search='model.width"):
            check("parameters", seeds, model_width=widths)
    check("parameters", 2, model_width="[2,4,6]")
    check("flops", 1, model_width="int(2,8,step=2)")
    check("examples", 1, dataset_train_fraction="float(0.1,1)")
    with pytest.raises(UserError, match="search more sizes"):
        fit.fitted("parameters", "error", [(1, 3.0), (2, 2.0)])
