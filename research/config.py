"""The configuration of an experiment: typed dataclasses, and the checks that run before anything expensive.

Every field is one command-line flag, `--config.<path>=<value>` (see `research.app`). A field is declared by
`option`, which holds its meaning and its bounds, so that `--help`, the parser and the checks read the same lines.
"""

import dataclasses
from typing import Any

from research.errors import UserError
from research.fields import assign, check_fields, option, walk

__all__ = ["assign", "check_fields", "option", "walk"]  # besides what is defined here

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lion", "muon", "lars", "lamb")
SCHEDULES = ("constant", "cosine", "linear", "one_cycle", "step", "tripling")
DTYPES = ("float32", "bfloat16")

_ONE_DEVICE = "a trial has one device, and the trials are spread over all devices"
_NO_RECOVERY = "in a sweep a trial whose loss is not finite has failed"


@dataclasses.dataclass
class DatasetConfig:
    """Which data, from where."""

    name: str = option("cifar10|digits", "data set (a TFDS name, digits or pydoc); of a|b the first that can be had")
    data_dir: str = option(
        "", "folder of prepared TFDS sets and archives; empty: TFDS_DATA_DIR, else TFDS's default", may_change="resume"
    )
    validation_fraction: float = option(0.0, "part of the training set held out for validation", minimum=0, below=1)
    train_fraction: float = option(1.0, "part of what is then left that is trained on", above=0, maximum=1)
    max_device_gib: float = option(
        2.0, "data sets up to this size (GiB) live on the device, larger ones stream", minimum=0, may_change="resume"
    )


@dataclasses.dataclass
class AugmentConfig:
    """Random changes to training images, made on the device inside the step."""

    crop: int = option(0, "random shift by up to this many pixels, with reflect padding", minimum=0)
    flip: str = option(
        "none", "horizontal flip: random, or alternating by epoch", choices=("none", "random", "alternating")
    )
    cutout: int = option(
        0,
        "side of the square set to the mean, in pixels, around a random pixel and clipped at the borders; an even one "
        "has its extra row above and column left",
        minimum=0,
    )


@dataclasses.dataclass
class NetworkConfig:
    """What every network has that can be made wider."""

    parametrization: str = option(
        "standard",
        "how initial kernels and learning rates depend on the width (mup: research.parametrization)",
        choices=("standard", "mup"),
    )
    base_width: int = option(0, "of mup: the width that the learning rate is for", minimum=0)


@dataclasses.dataclass
class CNNConfig(NetworkConfig):
    """A convolutional network (`research.models.cnn`)."""

    name: str = option(
        "simple", "architecture", choices=("simple", "resnet", "wide_resnet", "airbench"), decides_others=True
    )
    width: int = option(
        0, "channels of the first convolution (wide_resnet: widening factor); 0: the published", minimum=0
    )
    depth: int = option(
        0, "layers (airbench: convolutions a group), where there is a choice of them; 0: the published", minimum=0
    )
    pool: str = option("max", "pooling of the simple network", choices=("max", "average"))
    dropout: float = option(
        0.0, "dropout rate before the classifier (wide_resnet: within blocks)", minimum=0, below=1, step_input=True
    )
    norm: str = option("", "normalisation; empty: the published", choices=("", "none", "batch", "layer", "group"))
    dtype: str = option("float32", "compute dtype; parameters stay float32", choices=DTYPES)


@dataclasses.dataclass
class RNNConfig(NetworkConfig):
    """A recurrent network (`research.models.rnn`)."""

    name: str = option("lstm", "cell", choices=("simple", "gru", "lstm", "mingru", "lru"), decides_others=True)
    width: int = option(256, "features between layers, and recurrent units of each", minimum=1)
    layers: int = option(2, "recurrent layers", minimum=1)
    dropout: float = option(0.0, "dropout rate of what a layer adds or passes on", minimum=0, below=1, step_input=True)
    tied: bool = option(False, "the output's kernel is the embedding's")
    dtype: str = option("float32", "dtype of matrix products; parameters and memory stay float32", choices=DTYPES)


@dataclasses.dataclass
class VAEConfig(NetworkConfig):
    """A variational autoencoder (`research.models.vae`)."""

    name: str = option("dense", "architecture of encoder and decoder", choices=("dense", "conv"), decides_others=True)
    latents: int = option(50, "dimensions of the latent space", minimum=1)
    width: int = option(200, "units of a hidden layer; conv: channels at full resolution", minimum=1)
    depth: int = option(2, "hidden layers of encoder and of decoder; conv: halvings of the resolution", minimum=1)
    activation: str = option("tanh", "non-linearity", choices=("tanh", "relu", "silu", "gelu"))
    likelihood: str = option(
        "bernoulli",
        "of a pixel given the latents; gaussian: mean and variance are learned",
        choices=("bernoulli", "gaussian"),
        decides_others=True,
    )
    dtype: str = option("float32", "compute dtype; parameters and likelihoods stay float32", choices=DTYPES)


@dataclasses.dataclass
class OptimizerConfig:
    """The training algorithm (`research.optimizers`)."""

    name: str = option("nesterov", "update rule", choices=OPTIMIZERS, decides_others=True)
    learning_rate: float | None = option(
        None, "peak learning rate; default: the rule's customary one", minimum=0, step_input=True
    )
    batch_scaling: str = option(
        "none",
        "how the learning rate grows with the batch size over base_batch_size",
        choices=("none", "linear", "sqrt"),
    )
    base_batch_size: int = option(256, "the batch size that learning_rate is for, with batch_scaling", minimum=1)
    momentum: float | None = option(
        None, "momentum (beta1 of Adam and Lion); default: the rule's own", minimum=0, below=1, step_input=True
    )
    weight_decay: float | None = option(
        None,
        "weight decay of kernels, not of biases and norms; 0: none; default: the rule's customary one",
        minimum=0,
        step_input=True,
    )
    fixed_norm: bool = option(
        False, "hold convolutions' kernels at a norm of 1 an output, for networks that normalise after them"
    )
    schedule: str = option("constant", "learning rate over time", choices=SCHEDULES)
    warmup: float = option(
        0.0, "part of training over which the learning rate rises linearly", minimum=0, below=1, signature=False
    )
    end_factor: float = option(
        0.0, "last learning rate of a decaying schedule, as a part of the peak", minimum=0, maximum=1, step_input=True
    )
    clip_norm: float = option(0.0, "largest global norm of the gradient; 0: no clipping", minimum=0, step_input=True)
    ema_decay: float = option(
        0.0, "decay of the parameters' moving average used by evaluation; 0: none", minimum=0, below=1, step_input=True
    )


@dataclasses.dataclass
class MeshConfig:
    """How the devices are arranged: their number is the product of the axes."""

    data: int = option(
        -1,
        "devices that share the batch; -1: all that the other axes leave",
        minimum=-1,
        may_change="resume",
        not_searchable=_ONE_DEVICE,
    )
    fsdp: int = option(
        1,
        "devices that share the batch and shard parameters and optimiser state; -1: the rest",
        minimum=-1,
        may_change="resume",
        not_searchable=_ONE_DEVICE,
    )
    sequence: int = option(
        1,
        "devices that share the time axis of a parallel recurrence; -1: the rest",
        minimum=-1,
        may_change="resume",
        not_searchable=_ONE_DEVICE,
    )
    model: int = option(
        1,
        "devices that share a layer's output features; -1: the rest",
        minimum=-1,
        may_change="resume",
        not_searchable=_ONE_DEVICE,
    )
    reduce_dtype: str = option(
        "float32",
        "in which gradients travel where `data` is the only axis",
        choices=("float32", "bfloat16"),
        not_searchable=_ONE_DEVICE,
    )


@dataclasses.dataclass
class DistributedConfig:
    """How the processes of one run find each other (`research.process.distributed`)."""

    start: str = option(
        "auto",
        "join other processes: where the environment names them (auto), always (as on Cloud TPU), or never",
        choices=("auto", "always", "never"),
        may_change="resume",
        not_searchable=_ONE_DEVICE,
    )
    timeout: int = option(
        300,
        "seconds to wait for a process that is missing or silent",
        minimum=1,
        may_change="resume",
        not_searchable=_ONE_DEVICE,
    )


@dataclasses.dataclass
class Config:
    """What every experiment has; an experiment's own config extends it."""

    seed: int = option(
        0, "seed of initialisation, data order, augmentation and dropout", minimum=0, maximum=2**32 - 1, signature=False
    )
    num_epochs: int = option(10, "passes over the training set", minimum=1, may_change="resume")
    batch_size: int = option(64, "examples a step, over all devices", minimum=1, may_change="evaluation")
    microbatch_size: int = option(
        0,
        "examples at once, over all devices; gradients are accumulated; 0: the batch",
        minimum=0,
        may_change="evaluation",
    )
    steps_per_dispatch: int = option(
        0,
        "train steps per call of the program; 0: half a second's worth, at most 512 (8 of streamed data)",
        minimum=0,
        may_change="resume",
    )
    log_every_steps: int = option(
        50, "steps between the training lines of metrics.jsonl", minimum=1, may_change="evaluation", record_only=True
    )
    pictures_every_epochs: int = option(
        0,
        "epochs between pictures of what has been learned; 0: at the end only",
        minimum=0,
        may_change="resume",
        record_only=True,
    )
    checkpoint_every_steps: int = option(
        0,
        "steps between checkpoints within an epoch; 0: at its end only",
        minimum=0,
        may_change="resume",
        record_only=True,
    )
    keep_checkpoints: int = option(
        2,
        "newest checkpoints kept, beside the best by validation loss where there is a validation split",
        minimum=1,
        may_change="resume",
        record_only=True,
    )
    max_skipped_steps: int = option(
        0,
        "steps in a row left out where loss or gradient is not finite",
        minimum=0,
        may_change="resume",
        not_searchable=_NO_RECOVERY,
    )
    max_rewinds: int = option(
        0,
        "times that one more of those only leads back to the newest checkpoint",
        minimum=0,
        may_change="resume",
        not_searchable=_NO_RECOVERY,
        record_only=True,
    )
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    @property
    def examples_at_once(self) -> int:
        """How many examples the network sees at a time, over all devices: a microbatch, or the batch."""
        return self.microbatch_size or self.batch_size


def is_on(value: Any) -> bool:
    """Whether a number that means "off" at 0 is another: always, where it is an input of the step and so traced."""
    return not isinstance(value, (int, float)) or value != 0


def check(config: Config) -> None:
    """Raises `UserError` for the first field out of its bounds, and for fields that contradict each other."""
    check_fields(config, "--config.")
    if config.batch_size % config.examples_at_once:
        raise UserError(
            f"--config.batch_size={config.batch_size} is not a multiple of "
            f"--config.microbatch_size={config.microbatch_size}"
        )
    if isinstance(model := getattr(config, "model", None), NetworkConfig):
        _check_parametrization(model, config.optimizer.name)


def _check_parametrization(model: NetworkConfig, rule: str) -> None:
    if model.parametrization == "standard":
        if model.base_width:
            raise UserError(f"--config.model.base_width={model.base_width} needs --config.model.parametrization=mup")
        return
    if not model.base_width:
        raise UserError("mup needs --config.model.base_width, the width that the learning rate was tuned for")
    if rule in ("lars", "lamb"):
        raise UserError(f"--config.optimizer.name={rule}: mup has no rule for it; use another optimiser")
    if getattr(model, "tied", False):
        raise UserError("--config.model.tied: mup scales the two kernels differently; leave it False")
