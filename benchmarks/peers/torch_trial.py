"""A sweep's trial in PyTorch: build, train on in-memory batches, evaluate."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers.torch_peer import CNN


def validation_accuracy(network: str, arrays: dict[str, np.ndarray], rate: float, epochs: int, batch: int) -> float:
    """Trains a network by Adam and returns its validation accuracy."""
    torch.manual_seed(0)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    images, labels = tensors["train_image"].permute(0, 3, 1, 2), tensors["train_label"].long()
    if network == "cnn":
        model = CNN(channels=1).to(memory_format=torch.channels_last)
    else:
        layers = [nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        model = nn.Sequential(nn.Flatten(), *layers)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        logits = model(tensors["validation_image"].permute(0, 3, 1, 2))
        return (logits.argmax(-1) == tensors["validation_label"]).double().mean().item()
