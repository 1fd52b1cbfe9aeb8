"""The works for all peers: network sizes, initial weights, and the examples in their order. NumPy only.

Weights are lists of arrays in the order of the forward pass, with a residual block's shortcut last: convolutions
[height, width, in, out], dense layers [in, out], each followed by its bias if the layer has one. The examples are not
shuffled, so that every peer makes the same updates and the losses can be compared.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

Arrays = list[np.ndarray]

RESNET_GROUPS = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels, stride of the first of the group's two blocks
VAE_LATENTS = 50
HIERARCHY_START, HIERARCHY = 4, (1, 3)  # the lowest resolution, and the groups of latents at 4x4 and 7x7
HIERARCHY_WIDTH, HIERARCHY_LATENTS, HIERARCHY_PATCH = 64, 8, 4
TRANSFORMER_LAYERS = 2
PROMPT = 8  # characters of an example that sampling continues
LEARNING_RATE, EPSILON = 0.001, 1e-8  # of Adam
SEQUENCE = 128


@dataclasses.dataclass(frozen=True)
class Work:
    """A network and what is done with it: training, evaluation, sampling or a whole command.

    Attributes:
      network: "cnn" (the tutorial CNN), "resnet" (ResNet-18 for CIFAR), "vae" (dense), "hierarchical_vae", "lstm" or
        "transformer" (language models).
      batch_size: examples per step.
      steps: updates per epoch.
      dtype: of the computation.
      width: LSTM units; features between a Transformer's blocks, a multiple of 64.
      tolerance: maximum relative difference of the first epoch's mean losses.
      does: "train"; "evaluate": an epoch is a pass over the examples; "sample": in an epoch, the first characters of
        each example are continued by SEQUENCE characters, each the most likely; or "command": the peers train, and this
        project runs its whole command on the whole data set, with workdir, checkpoints, evaluation, its own order and
        initialization, and a warm compilation cache.
    """

    network: str
    batch_size: int
    steps: int
    dtype: str = "float32"
    width: int = 0
    tolerance: float = 0.01
    does: str = "train"

    @property
    def name(self) -> str:
        """The name in the table."""
        if self.does != "train":
            return {"command": "startup", "evaluate": "evaluation", "sample": "sampling"}[self.does]
        return f"{self.network} {self.width}" if self.width else self.network

    @property
    def unit(self) -> str:
        """The unit of the speed: images or tokens."""
        return "tokens" if self.reads_text else "images"

    @property
    def units_per_example(self) -> int:
        return SEQUENCE if self.reads_text else 1

    @property
    def reads_text(self) -> bool:
        return self.network in ("lstm", "transformer")

    @property
    def reads_digits(self) -> bool:
        return self.network in ("vae", "hierarchical_vae")


WORKS = {
    "cnn": (
        Work("cnn", 32, 200),
        Work("cnn", 128, 50),
        Work("cnn", 512, 12),
    ),
    "cnn_bfloat16": (
        # Rounding differs between libraries, visibly so with 8 bits of mantissa.
        Work("cnn", 128, 50, "bfloat16", tolerance=0.03),
        Work("cnn", 512, 12, "bfloat16", tolerance=0.03),
    ),
    "lstm": (Work("lstm", 64, 12, width=256), Work("lstm", 64, 6, width=512)),
    "transformer": (Work("transformer", 32, 12, width=256),),
    # Each library draws bits and latents by its own generator.
    "vae": (Work("vae", 128, 300, tolerance=0.03),),
    "hierarchical_vae": (Work("hierarchical_vae", 64, 20, tolerance=0.03),),
    "resnet": (Work("resnet", 128, 2, tolerance=0.02),),
    "evaluation": (Work("cnn", 512, 50, does="evaluate"),),
    "sampling": (Work("lstm", 64, 1, width=256, does="sample"),),
    "startup": (Work("cnn", 32, 1562, tolerance=0.05, does="command"),),
}


def make(work: Work, images: dict[str, np.ndarray], text: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the inputs of a peer by name: the weights "w0", "w1", ..., and the examples.

    Args:
      work: the network and its batches.
      images: "cifar10" uint8 [n, 32, 32, 3], its "label" int32 [n], and "mnist" uint8 [n, 28, 28, 1].
      text: uint8 [n], token numbers.

    Returns:
      The weights, and either "image" and "label", with "mean" and "std" of the channels, or "tokens", uint8 [examples,
      SEQUENCE + 1].
    """
    count = work.batch_size * work.steps
    rng = np.random.default_rng(0)
    weights = _MAKERS[work.network](work, rng, text)
    arrays = {f"w{i}": w.astype(np.float32) for i, w in enumerate(weights)}
    if work.reads_text:
        starts = np.arange(count)[:, None] * SEQUENCE % (len(text) - SEQUENCE - 1)
        return {**arrays, "tokens": text[starts + np.arange(SEQUENCE + 1)]}
    if work.reads_digits:
        return {**arrays, "image": images["mnist"][:count]}
    pixels = images["cifar10"][:count]
    statistics = {name: getattr(pixels / 255.0, name)((0, 1, 2)) for name in ("mean", "std")}
    return {**arrays, "image": pixels, "label": images["label"][:count], **statistics}


def weights(arrays: dict[str, np.ndarray]) -> Arrays:
    """Returns the weights of `make`, in order."""
    return [arrays[f"w{i}"] for i in itertools.takewhile(lambda i: f"w{i}" in arrays, itertools.count())]


def normalized(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the images with mean 0 and standard deviation 1 in each channel, float32 [n, h, w, c]."""
    return ((arrays["image"] / np.float32(255) - arrays["mean"]) / arrays["std"]).astype(np.float32)


def _kernel(rng: np.random.Generator, *shape: int) -> np.ndarray:
    limit = math.sqrt(6 / (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]))  # Glorot & Bengio 2010
    return rng.uniform(-limit, limit, shape)


def _layers(rng: np.random.Generator, *shapes: tuple[int, ...]) -> Arrays:
    return [array for shape in shapes for array in (_kernel(rng, *shape), np.zeros(shape[-1]))]


def _cnn(_: Work, rng: np.random.Generator, __: Any) -> Arrays:
    return _layers(rng, (3, 3, 3, 32), (3, 3, 32, 64), (3, 3, 64, 64), (1024, 64), (64, 10))


def _resnet(_: Work, rng: np.random.Generator, __: Any) -> Arrays:
    kernels = [(3, 3, 3, 64)]
    inputs = 64
    for channels, stride in RESNET_GROUPS:
        kernels += [(3, 3, inputs, channels), (3, 3, channels, channels)]
        kernels += [(1, 1, inputs, channels)] if stride > 1 else []
        kernels += [(3, 3, channels, channels)] * 2
        inputs = channels
    return [*(_kernel(rng, *shape) for shape in kernels), *_layers(rng, (512, 10))]


def _vae(_: Work, rng: np.random.Generator, __: Any) -> Arrays:
    latents = VAE_LATENTS
    return _layers(rng, (784, 200), (200, 200), (200, 2 * latents), (latents, 200), (200, 200), (200, 784))


def _hierarchical_vae(_: Work, rng: np.random.Generator, __: Any) -> Arrays:
    """The kernels and biases of each group are those of prior, prior's head, posterior, projection and block."""
    width, latents, middle = HIERARCHY_WIDTH, HIERARCHY_LATENTS, HIERARCHY_WIDTH // 2

    def block(inputs: int, outputs: int) -> list[tuple[int, ...]]:
        return [(1, 1, inputs, middle), (3, 3, middle, middle), (1, 1, middle, outputs)]

    group = [*block(2 * width, 2 * latents), (1, 1, latents, width), *block(width, width)]
    later = [*block(width, width), (1, 1, width, 2 * latents), *group]
    count = sum(HIERARCHY)
    shapes = [(HIERARCHY_PATCH, HIERARCHY_PATCH, 1, width), *block(width, width) * count, *group, *later * (count - 1)]
    return [*_layers(rng, *shapes), _kernel(rng, 1, 1, width, HIERARCHY_PATCH**2), np.zeros(28 * 28)]


def _lstm(work: Work, rng: np.random.Generator, text: np.ndarray) -> Arrays:
    width, vocabulary = work.width, int(text.max()) + 1
    recurrent = np.concatenate([np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(4)], 1)
    bias = np.repeat([0.0, 1.0, 0.0, 0.0], width)  # forget gate initially open
    output = _layers(rng, (width, vocabulary))
    return [rng.standard_normal((vocabulary, width)), _kernel(rng, width, 4 * width), recurrent, bias, *output]


def _transformer(work: Work, rng: np.random.Generator, text: np.ndarray) -> Arrays:
    """A block's kernels: query, key, value, outputs, gate, expand, contract; normalizations keep their own."""
    width, vocabulary, hidden = work.width, int(text.max()) + 1, 8 * math.ceil(work.width / 3)
    block = [*[(width, width)] * 4, (width, hidden), (width, hidden), (hidden, width)]
    kernels = [_kernel(rng, *shape) for shape in [*block * TRANSFORMER_LAYERS, (width, vocabulary)]]
    return [rng.standard_normal((vocabulary, width)), *kernels]


_MAKERS = {
    "cnn": _cnn,
    "resnet": _resnet,
    "vae": _vae,
    "hierarchical_vae": _hierarchical_vae,
    "lstm": _lstm,
    "transformer": _transformer,
}
