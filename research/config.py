"""The configuration of an experiment: typed dataclasses, and the checks that run before anything expensive.

Every field is one command-line flag, `--config.<path>=<value>`. Its declaration (`research.config_fields.option`) holds
the help text, the bounds and the other properties, which `--help`, the parser, the checks, resuming and sweeps read.
"""

import dataclasses
import functools

from research.config_fields import assign, check_fields, is_on, option, walk
from research.dataset_config import DatasetConfig
from research.errors import UserError

__all__ = ["DatasetConfig", "assign", "check_fields", "is_on", "option", "walk"]  # besides what is defined here

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lion", "muon", "lars", "lamb")
SCHEDULES = ("constant", "cosine", "linear", "one_cycle", "step", "tripling")
DTYPES = ("float32", "bfloat16")


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


@dataclasses.dataclass
class NetworkConfig:
    """The fields of every network that has a width."""

    parametrization: str = option(
        "standard",
        "how initialization and learning rates scale with the width (mup: research/parametrization.py)",
        choices=("standard", "mup"),
    )
    base_width: int = option(0, "mup: the width for which the learning rate was tuned", minimum=0)


@dataclasses.dataclass
class CNNConfig(NetworkConfig):
    """A convolutional network (`research.models.cnn`)."""

    name: str = option(
        "simple", "architecture", choices=("simple", "resnet", "wide_resnet", "airbench"), decides_others=True
    )
    width: int = option(
        0, "channels of the first convolution (wide_resnet: widening factor); 0: the published value", minimum=0
    )
    depth: int = option(
        0,
        "number of layers (airbench: convolutions per group), if the architecture has a choice; 0: the published value",
        minimum=0,
    )
    pool: str = option("max", "pooling of the simple network", choices=("max", "average"))
    dropout: float = option(
        0.0, "dropout rate before the classifier (wide_resnet: within blocks)", minimum=0, below=1, step_input=True
    )
    norm: str = option("", "normalization; empty: the published one", choices=("", "none", "batch", "layer", "group"))
    dtype: str = option("float32", "compute dtype; parameters stay float32", choices=DTYPES)


@dataclasses.dataclass
class ResNetConfig(NetworkConfig):
    """A residual network for images of ImageNet's size (`research.models.resnet`)."""

    depth: int = option(18, "number of layers: 18 or 34")
    width: int = option(64, "channels of the first group; each further group has twice as many", minimum=1)
    dropout: float = option(0.0, "dropout rate before the classifier", minimum=0, below=1, step_input=True)
    norm: str = option("batch", "normalization", choices=("none", "batch", "layer", "group"))
    dtype: str = option("float32", "compute dtype; parameters stay float32", choices=DTYPES)


@dataclasses.dataclass
class RNNConfig(NetworkConfig):
    """A recurrent network (`research.models.rnn`)."""

    name: str = option("lstm", "cell", choices=("simple", "gru", "lstm", "mingru", "lru"), decides_others=True)
    width: int = option(256, "features between layers, and recurrent units per layer", minimum=1)
    layers: int = option(2, "recurrent layers", minimum=1)
    dropout: float = option(0.0, "dropout rate of each layer's output", minimum=0, below=1, step_input=True)
    tied: bool = option(False, "share the kernel of the output layer with the embedding")
    dtype: str = option(
        "float32", "dtype of matrix products; parameters and recurrent state stay float32", choices=DTYPES
    )


@dataclasses.dataclass
class VAEConfig(NetworkConfig):
    """A variational autoencoder (`research.models.vae`)."""

    name: str = option("dense", "architecture of encoder and decoder", choices=("dense", "conv"), decides_others=True)
    latents: int = option(50, "dimensions of the latent space", minimum=1)
    width: int = option(200, "units per hidden layer; conv: channels at full resolution", minimum=1)
    depth: int = option(
        2, "hidden layers of the encoder and of the decoder; conv: how often the resolution is halved", minimum=1
    )
    activation: str = option("tanh", "activation function", choices=("tanh", "relu", "silu", "gelu"))
    likelihood: str = option(
        "bernoulli",
        "distribution of a pixel given the latents; gaussian: with learned mean and variance",
        choices=("bernoulli", "gaussian"),
        decides_others=True,
    )
    dtype: str = option("float32", "compute dtype; parameters and likelihoods stay float32", choices=DTYPES)


@dataclasses.dataclass
class OptimizerConfig:
    """The training algorithm (`research.optimizers`)."""

    name: str = option("nesterov", "update rule", choices=OPTIMIZERS, decides_others=True)
    learning_rate: float | None = option(
        None, "peak learning rate; default: the update rule's customary one", minimum=0, step_input=True
    )
    batch_scaling: str = option(
        "none",
        "how the learning rate scales with batch_size / base_batch_size",
        choices=("none", "linear", "sqrt"),
    )
    base_batch_size: int = option(
        256, "with batch_scaling: the batch size for which learning_rate was tuned", minimum=1
    )
    momentum: float | None = option(
        None,
        "momentum (beta1 of Adam and Lion); default: the update rule's customary one",
        minimum=0,
        below=1,
        step_input=True,
    )
    weight_decay: float | None = option(
        None,
        "weight decay of kernels, not of biases and norms; 0: none; default: the update rule's customary one",
        minimum=0,
        step_input=True,
    )
    fixed_norm: bool = option(
        False,
        "keep the norm of convolution kernels at 1 per output, for networks that normalize after each convolution",
    )
    schedule: str = option("constant", "learning-rate schedule", choices=SCHEDULES)
    warmup: float = option(
        0.0, "fraction of training for linear learning-rate warm-up", minimum=0, below=1, signature=False
    )
    end_factor: float = option(
        0.0,
        "final learning rate of a decaying schedule, as a fraction of the peak",
        minimum=0,
        maximum=1,
        step_input=True,
    )
    clip_norm: float = option(0.0, "gradient clipping by global norm; 0: none", minimum=0, step_input=True)
    ema_decay: float = option(
        0.0,
        "decay of an exponential moving average of the parameters, which evaluation then uses; 0: none",
        minimum=0,
        below=1,
        step_input=True,
    )


# Fields that say where a run is, not what it computes.
_place = functools.partial(
    option,
    may_change="resume",
    not_searchable="each trial of a sweep has one device, and the trials are spread over all devices",
)


@dataclasses.dataclass
class MeshConfig:
    """The mesh of devices: the sizes of its axes multiply to the number of devices."""

    data: int = _place(-1, "devices along `data`, which split the batch; -1: all that the other axes leave", minimum=-1)
    fsdp: int = _place(
        1,
        "devices along `fsdp`, which split the batch, the parameters and the optimizer state; -1: the rest",
        minimum=-1,
    )
    sequence: int = _place(
        1, "devices along `sequence`, which split the time axis of a parallel recurrence; -1: the rest", minimum=-1
    )
    model: int = _place(
        1, "devices along `model`, which split the output features of each layer; -1: the rest", minimum=-1
    )
    reduce_dtype: str = _place(
        "float32",
        "dtype of the gradients in the all-reduce, if `data` is the only axis",
        choices=("float32", "bfloat16"),
        may_change="never",
    )


@dataclasses.dataclass
class DistributedConfig:
    """Settings by which the processes of a multi-host run find each other (`research.process.distributed`)."""

    start: str = _place(
        "auto",
        "join other processes: if the environment names them (auto), always (Cloud TPU), or never",
        choices=("auto", "always", "never"),
    )
    timeout: int = _place(300, "seconds to wait for a missing or silent process", minimum=1)


_record = functools.partial(option, may_change="resume", record_only=True)
_recovery = functools.partial(
    option, may_change="resume", not_searchable="a sweep ends a trial at its first loss that is not finite"
)


@dataclasses.dataclass
class Config:
    """The fields of every experiment; an experiment's own config adds to them."""

    seed: int = option(
        0, "seed of initialization, data order, augmentation and dropout", minimum=0, maximum=2**32 - 1, signature=False
    )
    num_epochs: int = option(10, "passes over the training set", minimum=1, may_change="resume")
    batch_size: int = option(64, "examples per step, over all devices", minimum=1, may_change="evaluation")
    microbatch_size: int = option(
        0,
        "examples per forward and backward pass, over all devices, with gradient accumulation; 0: the whole batch",
        minimum=0,
        may_change="evaluation",
    )
    steps_per_dispatch: int = option(
        0,
        "train steps per call of the compiled program; 0: about half a second's worth, at most 512 (streamed data: 8)",
        minimum=0,
        may_change="resume",
    )
    log_every_steps: int = option(
        50, "steps between training lines in metrics.jsonl", minimum=1, may_change="evaluation", record_only=True
    )
    plot_every_epochs: int = _record(0, "epochs between plots; 0: only at the end of training", minimum=0)
    checkpoint_every_steps: int = _record(
        0, "steps between checkpoints within an epoch; 0: only at the end of each epoch", minimum=0
    )
    keep_checkpoints: int = _record(
        2, "newest checkpoints to keep, in addition to the best one by validation loss", minimum=1
    )
    max_skipped_steps: int = _recovery(
        0, "how many steps in a row may be skipped because the loss or the gradient is not finite", minimum=0
    )
    max_rewinds: int = _recovery(
        0, "how many times to rewind to the newest checkpoint before giving up", minimum=0, record_only=True
    )
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    @property
    def examples_at_once(self) -> int:
        """Examples per forward pass over all devices: the microbatch size, or the batch size."""
        return self.microbatch_size or self.batch_size


def check(config: Config) -> None:
    """Raises `UserError` for the first field that is out of bounds, and for fields that contradict each other."""
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
        raise UserError(f"--config.optimizer.name={rule}: mup has no rule for it; use another optimizer")
    if getattr(model, "tied", False):
        raise UserError("--config.model.tied: mup scales the two kernels differently; leave it False")
