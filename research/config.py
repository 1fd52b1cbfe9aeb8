"""The configuration of an experiment: typed dataclasses, and the checks that run before anything expensive.

Every field is one command-line flag, `--config.<path>=<value>`. Its declaration (`research.config_fields.option`) holds
the help text, the bounds and the other properties, which `--help`, the parser, the checks, resuming and sweeps read.
"""

import dataclasses
import functools

from research.augment_config import AugmentConfig
from research.config_fields import assign, check_fields, is_on, option, walk
from research.dataset_config import DatasetConfig
from research.errors import UserError
from research.init_config import InitConfig
from research.model_config import CNNConfig, ImageNetworkConfig, NetworkConfig, RecurrentConfig, RNNConfig, VAEConfig
from research.optimizer_config import OPTIMIZERS, SCHEDULES, OptimizerConfig

# Besides what is defined here: a user finds every part of the configuration in this module.
__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "AugmentConfig",
    "CNNConfig",
    "DatasetConfig",
    "ImageNetworkConfig",
    "InitConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "RNNConfig",
    "RecurrentConfig",
    "VAEConfig",
    "assign",
    "check_fields",
    "is_on",
    "option",
    "walk",
]


# Fields that say where a run is, not what it computes.
_place = functools.partial(
    option,
    may_change="resume",
    not_searchable="it says where the trials of a sweep train, not what they compute",
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
        1,
        "devices along `model`, which split the output features of each layer, or what the experiment's sharding rules "
        "say; -1: the rest",
        minimum=-1,
    )
    reduce_dtype: str = _place(
        "float32",
        "dtype of the gradients in the all-reduce, if `data` is the only axis",
        choices=("float32", "bfloat16"),
        may_change="evaluation",
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
    num_steps: int = option(
        0,
        "length of training in steps, in place of num_epochs; it may end within an epoch; 0: num_epochs decides",
        minimum=0,
        may_change="resume",
        not_searchable="sweeps vary the length of training by num_epochs",
    )
    batch_size: int = option(64, "examples per step, over all devices", minimum=1, may_change="evaluation")
    microbatch_size: int = option(
        0,
        "examples per forward and backward pass, over all devices, with gradient accumulation; 0: the whole batch",
        minimum=0,
        may_change="evaluation",
    )
    remat: str = option(
        "none",
        "recompute activations in the backward pass to save memory: within each block of the network (blocks), or "
        "within each module of a block as well (all)",
        choices=("none", "blocks", "all"),
        may_change="resume",
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
    checkpoint_every_minutes: float = _record(
        0.0, "minutes between checkpoints within an epoch; 0: no checkpoints by time", minimum=0
    )
    eval_every_steps: int = _record(
        0,
        "steps between evaluations within an epoch, each of which saves a checkpoint if it is the best so far; 0: only "
        "at the end of each epoch",
        minimum=0,
    )
    keep_checkpoints: int = _record(
        2, "newest checkpoints to keep, in addition to the best one by validation loss", minimum=1
    )
    early_stopping_epochs: int = option(
        0,
        "epochs without a lower validation loss after which training stops; 0: it does not stop early",
        minimum=0,
        may_change="resume",
        not_searchable="a sweep ends trials early by --pruner",
        record_only=True,
    )
    max_skipped_steps: int = _recovery(
        0, "how many steps in a row may be skipped because the loss or the gradient is not finite", minimum=0
    )
    max_rewinds: int = _recovery(
        0, "how many times to rewind to the newest checkpoint before giving up", minimum=0, record_only=True
    )
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    @property
    def length(self) -> tuple[str, int]:
        """The field that decides the length of training, and its value: ("num_steps", 100) or ("num_epochs", 10)."""
        return ("num_steps", self.num_steps) if self.num_steps else ("num_epochs", self.num_epochs)

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
    model = getattr(config, "model", None)
    if config.examples_at_once % (group := getattr(model, "norm_group", 0) or 1):
        raise UserError(
            f"--config.model.norm_group={group} does not divide the {config.examples_at_once} examples of a batch or "
            "microbatch"
        )
    if isinstance(model, NetworkConfig):
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
