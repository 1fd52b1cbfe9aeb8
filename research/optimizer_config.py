"""The training algorithm's part of the configuration (`research.optimizers`)."""

import dataclasses

from research.config_fields import option

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lion", "muon", "lars", "lamb")
SCHEDULES = ("constant", "cosine", "linear", "one_cycle", "step", "tripling")


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
    beta2: float | None = option(
        None,
        "decay of the mean of squared gradients (Adam, LAMB, RMSProp; Muon: of biases and norms), and Lion's beta2; "
        "default: the update rule's customary one",
        minimum=0,
        below=1,
        step_input=True,
        constant_default=True,
    )
    epsilon: float | None = option(
        None,
        "added to the denominator of the update; default: the update rule's customary one",
        minimum=0,
        step_input=True,
        constant_default=True,
    )
    initial_accumulator: float | None = option(
        None, "what AdaGrad's sum of squared gradients starts from; default: 0, as in PyTorch", minimum=0
    )
    weight_decay: float | None = option(
        None,
        "weight decay of kernels, not of biases and norms; 0: none; default: the update rule's customary one",
        minimum=0,
        step_input=True,
    )
    freeze: str = option(
        "", "regular expression: parameters whose path, as in blocks/0/conv1/kernel, contains a match are not trained"
    )
    learning_rate_scale: str = option(
        "",
        "REGEX:FACTOR,...: parameters whose path contains a match have FACTOR times the learning rate (first match)",
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
    milestones: str = option(
        "0.5,0.75",
        "schedule=step: when the learning rate is multiplied by decay_factor, in increasing fractions of training",
    )
    decay_factor: float = option(
        0.1,
        "schedule=step: what the learning rate is multiplied by at each of the milestones",
        above=0,
        maximum=1,
        step_input=True,
        constant_default=True,
    )
    clip_norm: float = option(0.0, "gradient clipping by global norm; 0: none", minimum=0, step_input=True)
    ema_decay: float = option(
        0.0,
        "decay of an exponential moving average of the parameters, which evaluation then uses; 0: none",
        minimum=0,
        below=1,
        step_input=True,
    )
