"""The fields that choose a data set and its splits."""

import dataclasses

from research.config_fields import option


@dataclasses.dataclass
class DatasetConfig:
    """The data set, and how much of it is used."""

    name: str = option(
        "cifar10|digits",
        "data set: folder, text, hf:NAME, digits, pydoc or a TFDS name; name:1.2.3: this version (default: the "
        "newest); a|b: the first that is available",
    )
    data_dir: str = option(
        "",
        "image folder, file or folder of text, or folder of prepared TFDS sets and archives; empty: TFDS_DATA_DIR, "
        "else TFDS's default",
        may_change="resume",
    )
    tokenizer: str = option(
        "",
        "tokenizer.json that texts are split into tokens with (`python -m research.data.tokenizer` trains one); empty: "
        "bytes",
        may_change="resume",
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
        "arrays and texts up to this size (GiB) are kept on the devices; larger ones, and sets with an image_size, are "
        "streamed",
        minimum=0,
        may_change="resume",
    )
    image_size: int = option(
        0,
        "side of the square that images are cropped and resized to when they are read, for sets of any size and shape; "
        "0: use the images as they are",
        minimum=0,
    )
    train_image_size: int = option(
        0, "side of training images, where it differs from image_size; 0: image_size", minimum=0
    )
    train_crop: str = option(
        "random_resized",
        "crop of training images to image_size: a box of random area and shape, or the shorter side as a whole",
        choices=("random_resized", "resize"),
    )
    crop_min_area: float = option(
        0.08, "least area of a random_resized crop, as a fraction of the image's", above=0, maximum=1
    )
    center_crop: float = option(
        0.875,
        "side of the center square that evaluation resizes to image_size, as a fraction of the shorter side",
        above=0,
        maximum=1,
        may_change="evaluation",
    )
    max_damaged: int = option(
        0,
        "how many damaged examples of a split each process may skip; in training the next one replaces it",
        minimum=0,
        may_change="resume",
    )
