"""Variational autoencoders of color images, in bits per dimension of the 8-bit values.

python -m experiments.image_vae                   a hierarchy of groups of latents
python -m experiments.image_vae --config=flat     a convolutional network with one layer of latents
python -m experiments.image_vae --mode=sample --workdir=DIR --temperature=0.8    draws images from a trained network

Both have the same likelihood, a discretized mixture of logistics. The result of a run is test_bits_per_dim, that of the
ELBO on the test set; test_nll_bits_per_dim is the estimate by importance samples, which is lower. On CIFAR-10 (a JPEG
re-encoding) the hierarchy reaches 3.46 in 21 minutes of one x86 CPU core with AVX-512 (--config.num_steps=18500), the
flat network 4.20 in 25 (--config.num_steps=14000); one run each, see experiments/README.md.

Any image data set works: --config.dataset.name=cifar10, mnist, digits, or folder with --config.dataset.image_size=32.
"""

from experiments import mnist_vae
from experiments.mnist_vae import MnistVAEConfig, SampleOptions
from research import app
from research.config import DatasetConfig, OptimizerConfig, VAEConfig


def get_config() -> MnistVAEConfig:
    """A hierarchy. Steps whose gradient is not finite are skipped.

    Gradients are clipped so low that nearly all of them are: Adam sees their directions, and no step is much larger
    than the others.
    """
    return MnistVAEConfig(
        num_epochs=5,
        batch_size=8,
        max_skipped_steps=10,
        final_samples=10,
        dataset=DatasetConfig(name="cifar10|digits"),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=0.004, schedule="cosine", warmup=0.05, ema_decay=0.999, clip_norm=200.0
        ),
        model=VAEConfig(
            name="hierarchical",
            latents=8,
            width=64,
            depth=1,
            activation="silu",
            likelihood="logistic",
            groups="1,2,2,0",
        ),
    )


def flat() -> MnistVAEConfig:
    """One layer of latents, with the convolutional encoder and decoder of experiments/mnist_vae.py.

    At a learning rate of 0.006 some steps had a loss that was not finite.
    """
    config = get_config()
    config.batch_size, config.optimizer.learning_rate = 16, 0.002
    config.model = VAEConfig(name="conv", latents=128, width=16, depth=3, activation="silu", likelihood="logistic")
    return config


EXPERIMENT = app.Experiment(
    "image_vae",
    str(__doc__),
    {"default": get_config, "flat": flat},
    mnist_vae.make_task,
    complete=mnist_vae.complete,
    sample=mnist_vae.sample,
    sample_options=SampleOptions,
)

if __name__ == "__main__":
    app.main(EXPERIMENT)
