"""A VAE on the digits to plan, and how many parameters it has."""

DIGITS = ["--config.dataset.name=digits", "--config.model.depth=1", "--config.model.latents=8"]
VAE = [
    "experiments.mnist_vae",
    *DIGITS,
    "--config.optimizer.name=momentum",
    "--config.optimizer.ema_decay=0",
    "--config.binarize=fixed",
]
PIXELS, LATENTS = 32 * 32, 8


def kernels(width):
    """Elements of the VAE's kernels: encoder, mean and variance, decoder, pixels."""
    return [PIXELS * width, width * LATENTS, width * LATENTS, LATENTS * width, width * PIXELS]


def num_params(width):
    return sum(kernels(width)) + 2 * width + 2 * LATENTS + PIXELS
