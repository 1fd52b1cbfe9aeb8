"""The networks' part of the configuration (`research.models`)."""

import dataclasses

from research.config_fields import option

DTYPES = ("float32", "bfloat16")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base")
CELLS = ("simple", "gru", "lstm", "mingru", "lru")


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
    norm_group: int = option(
        0,
        "batch norm: how many examples are normalized by their own statistics in training; 0: the whole (micro)batch",
        minimum=0,
    )
    dtype: str = option("float32", "compute dtype; parameters stay float32", choices=DTYPES)


@dataclasses.dataclass
class ImageNetworkConfig(NetworkConfig):
    """A network for images of ImageNet's size (`research.models.resnet`, `research.models.convnext`)."""

    name: str = option("resnet18", "architecture", choices=(*RESNETS, *CONVNEXTS), decides_others=True)
    width: int = option(
        0, "channels of the first group; each further group has twice as many; 0: the published value", minimum=0
    )
    dropout: float = option(0.0, "dropout rate before the classifier", minimum=0, below=1, step_input=True)
    drop_path: float = option(
        0.0,
        "stochastic depth: probability that an example skips the last block; 0 at the first block, linear in between",
        minimum=0,
        below=1,
        step_input=True,
    )
    norm: str = option("", "normalization; empty: the published one", choices=("", "none", "batch", "layer", "group"))
    norm_group: int = option(
        0,
        "batch norm: how many examples are normalized by their own statistics in training; 0: the whole (micro)batch",
        minimum=0,
    )
    dtype: str = option("float32", "compute dtype; parameters stay float32", choices=DTYPES)


@dataclasses.dataclass
class RecurrentConfig(NetworkConfig):
    """Recurrent layers (`research.models.rnn`)."""

    name: str = option("lstm", "cell", choices=CELLS, decides_others=True)
    width: int = option(256, "features between layers, and recurrent units per layer", minimum=1)
    layers: int = option(2, "recurrent layers", minimum=1)
    dropout: float = option(0.0, "dropout rate of each layer's output", minimum=0, below=1, step_input=True)
    dtype: str = option(
        "float32", "dtype of matrix products; parameters and recurrent state stay float32", choices=DTYPES
    )


@dataclasses.dataclass
class RNNConfig(RecurrentConfig):
    """A network over text: recurrent, or a Transformer (`research.models.transformer`)."""

    name: str = option("lstm", "cell, or transformer", choices=(*CELLS, "transformer"), decides_others=True)
    heads: int = option(0, "transformer: heads of attention; 0: one for every 64 features of the width", minimum=0)
    tied: bool = option(False, "share the kernel of the output layer with the embedding")


@dataclasses.dataclass
class VAEConfig(NetworkConfig):
    """A variational autoencoder (`research.models.vae`, `research.models.hierarchical_vae`)."""

    name: str = option(
        "dense",
        "architecture of encoder and decoder; hierarchical: groups of latents at several resolutions",
        choices=("dense", "conv", "hierarchical"),
        decides_others=True,
    )
    latents: int = option(
        50, "dimensions of the latent space; hierarchical: channels of each group of latents", minimum=1
    )
    groups: str = option(
        "",
        "hierarchical: how many groups of latents each resolution has, from the lowest to the image's, each twice the "
        "one before, at most 1,000 in total; zeros at the end leave out the highest (default: 1,2,3,0)",
    )
    width: int = option(200, "units per hidden layer; conv: channels at full resolution", minimum=1)
    depth: int = option(
        2,
        "hidden layers of the encoder and of the decoder; conv: how often the resolution is halved; hierarchical: "
        "residual blocks after each group",
        minimum=1,
    )
    activation: str = option("tanh", "activation function", choices=("tanh", "relu", "silu", "gelu"))
    likelihood: str = option(
        "bernoulli",
        "distribution of a pixel given the latents; gaussian: a density, with learned mean and variance; logistic: of "
        "the 256 values, a discretized mixture of logistics (their bits per dimension are not comparable)",
        choices=("bernoulli", "gaussian", "logistic"),
        decides_others=True,
    )
    dtype: str = option("float32", "compute dtype; parameters and likelihoods stay float32", choices=DTYPES)
