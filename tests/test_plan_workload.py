"""What `launch.plan` knows without compiling: the sizes of known data sets, prices, and what the hosts must decode."""

import numpy as np
import pytest

from experiments import cifar_cnn, image_classifier
from launch.plans import known_datasets, lowering, report
from launch.plans.prices import parse_prices
from research.config import MeshConfig
from research.errors import UserError


def _workload(experiment, tmp_path, **dataset):
    config = experiment.default_config
    for name, value in {**dataset, "data_dir": str(tmp_path)}.items():
        setattr(config.dataset, name, value)
    return lowering.load(experiment, config, MeshConfig(data=1))


def test_imagenet_is_planned_without_its_files(tmp_path, capsys):
    sizes = {"image_size": 64, "train_image_size": 32, "center_crop": 0.875}
    workload = _workload(
        image_classifier.EXPERIMENT, tmp_path / "gone", name="imagenet2012", test_split="validation", **sizes
    )
    assert workload.num_examples == 1_281_167
    assert len(workload.dataset.test["image"]) == 50_000
    assert workload.dataset.train["image"].shape[1:] == (32, 32, 3)
    assert len(workload.dataset.label_names) == 1000
    assert workload.decodes_images
    assert "imagenet2012 is not prepared here: planned by its published size, 1,281,167 train" in capsys.readouterr()[0]


def test_a_set_of_one_shape_takes_its_place_on_the_devices(tmp_path):
    workload = _workload(cifar_cnn.EXPERIMENT, tmp_path)  # cifar10|digits
    assert workload.dataset.name == "cifar10"
    assert workload.resident
    assert not workload.decodes_images
    assert workload.evaluation_bytes == 10_000 * (32 * 32 * 3 + 4)


def test_images_of_several_sizes_need_one(tmp_path):
    with pytest.raises(UserError, match=r"its images differ in size; give --config\.dataset"):
        _workload(cifar_cnn.EXPERIMENT, tmp_path, name="food101")


def test_a_prepared_set_is_read(tmp_path):
    experiment = known_datasets.add_missing(cifar_cnn.EXPERIMENT, cifar_cnn.get_config().dataset)
    prepared = known_datasets._is_prepared("cifar10", "")
    assert (experiment.datasets == {}) == prepared


def test_each_kind_of_chip_has_its_price():
    assert parse_prices("1.5", ["v5e", "h100"]) == {"h100": 1.5, "v5e": 1.5}
    assert parse_prices("h100=3,v5e=1.2,v4=9", ["v5e", "h100"]) == {"h100": 3.0, "v5e": 1.2}
    assert parse_prices("", ["v5e"]) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h100=3", "has no price of v5e"),
        ("x=3,v5e=1", "x is not one of v4, v5e"),
        ("v5e=free", "give a number, or one for each chip"),
        ("-1", "give a number"),
        ("nan", "give a number"),
    ],
)
def test_a_wrong_price_is_named(text, words):
    with pytest.raises(UserError, match=words):
        parse_prices(text, ["h100", "v5e"])


def test_the_host_decodes_what_its_chip_consumes_or_not():
    row = {"topology": "v5e:4x4", "chip": "v5e", "num_chips": 16, "examples_per_second": 16 * 2_000.0}
    for rate, words in ((400, "about 11,200: enough"), (40, "about 1,120: too few, the chips would wait: 1.8 times")):
        assert words in report.input_line(row | report.host(row, rate))


def test_the_whole_training_costs_its_hours_on_all_chips():
    row = {"chip": "v5e", "num_chips": 16, "epoch_seconds": 90.0, "training_seconds": 900.0}
    costs = report.cost(row, {"v5e": 1.2})
    assert np.allclose([costs["epoch_cost"], costs["training_cost"]], [16 * 1.2 / 40, 16 * 1.2 / 4])
