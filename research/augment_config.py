"""The augmentation's part of the configuration (`research.data.images`)."""

import dataclasses

from research.config_fields import option


@dataclasses.dataclass
class AugmentConfig:
    """Augmentation of training images, on the device, inside the step."""

    # In the order in which they are applied (`research.data.augmentation`).

    crop: int = option(0, "random shift by up to this many pixels, with reflect padding; 0: none", minimum=0)
    flip: str = option(
        "none", "horizontal flip: random, or alternating by epoch", choices=("none", "random", "alternating")
    )
    randaugment: int = option(
        0, "random operations on each image: RandAugment's N (Cubuk et al. 2020); 0: none", minimum=0
    )
    randaugment_magnitude: float = option(
        0.0, "strength of these operations, up to 10: RandAugment's M", minimum=0, maximum=10, step_input=True
    )
    brightness: float = option(
        0.0, "color jitter: brightness is multiplied by a factor from 1 - this to 1 + this", minimum=0, step_input=True
    )
    contrast: float = option(
        0.0, "color jitter: contrast is multiplied by a factor from 1 - this to 1 + this", minimum=0, step_input=True
    )
    saturation: float = option(
        0.0, "color jitter: saturation is multiplied by a factor from 1 - this to 1 + this", minimum=0, step_input=True
    )
    cutout: int = option(
        0,
        "side in pixels of a square around a random pixel that is set to the mean, clipped at the borders; of an even "
        "square the extra row is above, the extra column left; 0: none",
        minimum=0,
    )
    erasing: float = option(
        0.0,
        "probability that a random rectangle of an image is set to the mean: random erasing (Zhong et al. 2020)",
        minimum=0,
        maximum=1,
        step_input=True,
    )
    mixup: float = option(
        0.0,
        "MixUp's alpha (Zhang et al. 2018): each image and its label are mixed with those of another image of the "
        "batch; 0: none",
        minimum=0,
        step_input=True,
    )
    cutmix: float = option(
        0.0,
        "CutMix's alpha (Yun et al. 2019): a rectangle of each image is that of another image of the batch, and the "
        "label is mixed; with mixup, each image gets one of the two at random; 0: none",
        minimum=0,
        step_input=True,
    )
