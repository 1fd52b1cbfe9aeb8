"""The works in PyTorch, as its users write them: channels last, fused Adam, in-memory batches.

`+compile` uses `torch.compile`. On a GPU the examples are resident, cuDNN searches for its fastest convolutions,
float32 matrix products use TF32, as in JAX, and `+compile` replays CUDA graphs.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import works
from benchmarks.peers.clock import Clock
from benchmarks.peers.torch_hierarchical_vae import HierarchicalVAE
from benchmarks.peers.torch_transformer import Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


class CNN(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(channels, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)
        self.hidden, self.logits = nn.Linear(1024, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        # Flattened as rows, columns, channels: a view, since memory is channels last.
        return self.logits(F.relu(self.hidden(x.permute(0, 2, 3, 1).flatten(1))))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut_norm = nn.BatchNorm2d(outputs) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut_norm(self.shortcut(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        blocks, inputs = [], 64
        for channels, stride in works.RESNET_GROUPS:
            blocks += [Block(inputs, channels, stride), Block(channels, channels, 1)]
            inputs = channels
        self.blocks, self.logits = nn.Sequential(*blocks), nn.Linear(512, 10)

    def forward(self, x):
        return self.logits(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class LSTM(nn.Module):
    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm, self.logits = nn.LSTM(width, width, batch_first=True), nn.Linear(width, vocabulary)

    def forward(self, tokens):
        return self.logits(self.lstm(self.embedding(tokens))[0])


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        latents = works.VAE_LATENTS
        self.encoder = nn.Sequential(
            nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 2 * latents)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latents, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 784)
        )

    def forward(self, grays):
        bits = torch.bernoulli(grays)
        mean, logvar = self.encoder(bits).chunk(2, -1)
        logits = self.decoder(mean + torch.exp(logvar / 2) * torch.randn_like(mean))
        reconstruction = F.binary_cross_entropy_with_logits(logits, bits, reduction="sum")
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
        return (reconstruction + kl) / len(bits)


def _load(network: nn.Module, weights: works.Arrays) -> None:
    """Sets the initial weights; batch norms keep their own, and the LSTM's second bias is frozen at 0."""
    with torch.no_grad():
        if isinstance(network, LSTM):
            lstm, rest = network.lstm, [network.logits.weight, network.logits.bias]
            parameters = [network.embedding.weight, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, *rest]
            lstm.bias_hh_l0.zero_().requires_grad_(False)  # one bias, as in the peers
        else:
            layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        if isinstance(network, Transformer):
            parameters = [network.embedding.weight, *parameters]
        if isinstance(network, HierarchicalVAE):
            parameters = [*parameters, network.bias]
        if isinstance(network, LSTM | Transformer):
            weights = [weights[0].T, *weights[1:]]  # an embedding is not transposed
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(torch.from_numpy(weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T))


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, mode="reduce-overhead" if DEVICE == "cuda" else None)


def _program(work: works.Work, arrays: dict[str, np.ndarray]) -> tuple[nn.Module, list[torch.Tensor], Callable]:
    """Returns the network with its weights, the examples, and the loss function of a batch."""
    torch.manual_seed(0)
    network, examples, loss_of = _on_host(work, arrays)
    _load(network, works.weights(arrays))
    return network.to(DEVICE), [x.to(DEVICE) for x in examples], loss_of


def _on_host(work: works.Work, arrays: dict[str, np.ndarray]) -> tuple[nn.Module, list[torch.Tensor], Callable]:
    if work.network == "hierarchical_vae":
        grays = torch.from_numpy(arrays["image"].transpose(0, 3, 1, 2) / np.float32(255))
        network: nn.Module = HierarchicalVAE().to(memory_format=torch.channels_last)
        return network, [grays], lambda network, grays: network(grays)
    if work.network == "vae":
        grays = torch.from_numpy(arrays["image"].reshape(len(arrays["image"]), -1) / np.float32(255))
        return VAE(), [grays], lambda network, grays: network(grays)
    if work.reads_text:
        tokens, vocabulary = torch.from_numpy(arrays["tokens"].astype(np.int64)), len(arrays["w0"])
        network = LSTM(vocabulary, work.width)
        if work.network == "transformer":
            network = Transformer(vocabulary, work.width, works.TRANSFORMER_LAYERS, works.SEQUENCE)
        return (
            network,
            [tokens],
            lambda network, tokens: F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()),
        )
    pixels = torch.from_numpy(works.normalized(arrays)).permute(0, 3, 1, 2)  # already channels last in memory
    labels = torch.from_numpy(arrays["label"].astype(np.int64))
    network = (CNN() if work.network == "cnn" else ResNet()).to(memory_format=torch.channels_last)
    return network, [pixels, labels], lambda network, x, labels: F.cross_entropy(network(x).float(), labels)


def evaluate(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Evaluates the examples repeatedly and records each pass."""
    network, examples, loss_of = _program(work, arrays)
    called = _compiled(network.eval()) if variant == "compile" else network.eval()

    @torch.inference_mode()
    def once():
        losses = []
        for batch in zip(*(x.split(work.batch_size) for x in examples)):
            losses.append(loss_of(called, *batch).clone())
            clock.step()
        return torch.stack(losses).mean().item()

    clock.passes(epochs, once)


def sample(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Continues each example's first characters by the most likely ones, repeatedly, and records each pass."""
    network, (examples,), _ = _program(work, arrays)
    assert isinstance(network, LSTM)

    def step(tokens, state):
        outputs, state = network.lstm(network.embedding(tokens), state)
        return network.logits(outputs[:, -1]).argmax(-1), state

    called = _compiled(step) if variant == "compile" else step

    @torch.inference_mode()
    def once():
        token, state = step(examples[:, : works.PROMPT], None)
        tokens = [token]
        while len(tokens) < works.SEQUENCE:
            token, state = called(token[:, None], state)
            tokens.append(token.clone())
        return torch.stack(tokens).double().mean().item()

    clock.passes(epochs, once)


def train(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Trains and records the epochs."""
    network, examples, loss_of = _program(work, arrays)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, works.LEARNING_RATE, eps=works.EPSILON, fused=True)
    called = _compiled(network) if variant == "compile" else network
    for _ in range(epochs):
        losses, start = [], time.monotonic()
        for first in range(0, len(examples[0]), work.batch_size):
            batch = [x[first : first + work.batch_size] for x in examples]
            with torch.autocast(DEVICE, torch.bfloat16, enabled=work.dtype == "bfloat16"):
                loss = loss_of(called, *batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())  # a CUDA graph reuses the memory of its result
            clock.step()
        clock.epoch(torch.stack(losses).mean().item(), time.monotonic() - start)
