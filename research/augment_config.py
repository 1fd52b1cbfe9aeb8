"""The augmentation's part of the configuration (`research.data.images`)."""

import dataclasses

from research.config_fields import option


@dataclasses.dataclass
class AugmentConfig:
    """Augmentation of training images, on the device, inside the step."""

    crop: int = option(0, "random shift by up to this many pixels, with reflect padding; 0: none", minimum=0)
    flip: str = option(
        "none", "horizontal flip: random, or alternating by epoch", choices=("none", "random", "alternating")
    )
    cutout: int = option(
        0,
        "side in pixels of a square around a random pixel that is set to the mean, clipped at the borders; of an even "
        "square the extra row is above, the extra column left; 0: none",
        minimum=0,
    )
