"""The fields that choose a data set and its splits."""

import dataclasses

from research.config_fields import option


@dataclasses.dataclass
class DatasetConfig:
    """The data set, and how much of it is used."""

    name: str = option(
        "cifar10|digits",
        "data set: digits, pydoc or a TFDS name; name:1.2.3: this version (default: the newest); a|b: the first that "
        "is available",
    )
    data_dir: str = option(
        "", "folder of prepared TFDS sets and archives; empty: TFDS_DATA_DIR, else TFDS's default", may_change="resume"
    )
    train_split: str = option("train", "split of the data set to train on")
    validation_split: str = option("", "split of the data set to validate on; empty: validation, if the set has it")
    test_split: str = option(
        "", "split of the data set to test on; empty: test, else validation (unused if test_fraction > 0)"
    )
    test_fraction: float = option(0.0, "fraction of the training set held out for testing", minimum=0, below=1)
    validation_fraction: float = option(
        0.0, "fraction of the rest of the training set held out for validation", minimum=0, below=1
    )
    train_fraction: float = option(1.0, "fraction of the rest that is used for training", above=0, maximum=1)
    max_device_gib: float = option(
        2.0,
        "data sets up to this size (GiB) are kept on the devices, larger ones are streamed",
        minimum=0,
        may_change="resume",
    )
