"""The part of the configuration that says which weights a run starts from (`research.training.initialization`)."""

import dataclasses

from research.config_fields import option


@dataclasses.dataclass
class InitConfig:
    """The weights that a run starts from; a resumed run does not read them again."""

    path: str = option(
        "",
        "start from these weights: FILE.safetensors with names of torchvision or timm; the workdir of a run (its best "
        "checkpoint, else its newest); or the folder of an artifact",
    )
    reset: str = option(
        "",
        "with init.path, regular expression: arrays whose path, as in logits/kernel, contains a match start as usual",
    )
