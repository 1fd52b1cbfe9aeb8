"""`python -m benchmarks.peers.torch_photographs DIR EPOCHS`: torchvision's ResNet-18 on a folder of photographs.

The recipe is the default of `experiments.image_classifier`, read from its config and written with torchvision's
transforms and `torch.optim`, as their users do. What differs: images are normalized by ImageNet's mean and standard
deviation, not by those of this set, and the average of the parameters has its decay from the first step on. DIR has the
folders `train` and `test`. Prints JSON: the test accuracy, and the seconds of training and evaluation.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from experiments import image_classifier

CONFIG = image_classifier.get_config()
_NORMALIZE = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def loaders(folder: Path) -> tuple[DataLoader, DataLoader]:
    """Returns the batches for training, randomly cropped and jittered, and those for testing."""
    data, augment, cores = CONFIG.dataset, CONFIG.augment, len(os.sched_getaffinity(0))
    train = transforms.Compose(
        [
            transforms.RandomResizedCrop(data.train_image_size, scale=(data.crop_min_area, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(augment.brightness, augment.contrast, augment.saturation),
            *_NORMALIZE,
        ]
    )
    resized = transforms.Resize(round(data.image_size / data.center_crop))
    test = transforms.Compose([resized, transforms.CenterCrop(data.image_size), *_NORMALIZE])
    options = {"num_workers": cores, "persistent_workers": True}
    return (
        DataLoader(
            datasets.ImageFolder(folder / "train", train), CONFIG.batch_size, shuffle=True, drop_last=True, **options
        ),
        DataLoader(datasets.ImageFolder(folder / "test", test), 100, **options),
    )


def optimizer(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Returns Nesterov momentum, with the decay of kernels only, and its schedule."""
    numbers = CONFIG.optimizer
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": numbers.weight_decay}, {"params": others}]
    rule = torch.optim.SGD(groups, numbers.learning_rate, momentum=0.9, nesterov=True)
    warmup = round(numbers.warmup * steps)

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (steps - warmup)

    return rule, torch.optim.lr_scheduler.LambdaLR(rule, factor)


@torch.no_grad()
def accuracy(network: nn.Module, batches: DataLoader) -> float:
    """Returns the accuracy of the mean of an image's and its mirror image's logits."""
    network.eval()
    correct = total = 0
    for images, labels in batches:
        images = images.to(memory_format=torch.channels_last)
        logits = network(images) + network(images.flip(-1))
        correct += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    return correct / total


def main(folder: str, epochs: str) -> None:
    torch.manual_seed(0)
    train, test = loaders(Path(folder))
    network = models.resnet18(num_classes=len(train.dataset.classes), zero_init_residual=True)
    network = network.to(memory_format=torch.channels_last)
    average = swa_utils.AveragedModel(
        network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(CONFIG.optimizer.ema_decay), use_buffers=True
    )
    rule, schedule = optimizer(network, int(epochs) * len(train))
    loss_of = nn.CrossEntropyLoss(label_smoothing=CONFIG.label_smoothing)
    start = time.monotonic()
    for epoch in range(int(epochs)):
        network.train()
        for images, labels in train:
            loss = loss_of(network(images.to(memory_format=torch.channels_last)), labels)
            rule.zero_grad()
            loss.backward()
            rule.step()
            schedule.step()
            average.update_parameters(network)
        found = accuracy(average, test)
        print(f"epoch {epoch + 1}/{epochs}: test accuracy {found:.4f}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    parameters = sum(p.numel() for p in network.parameters())
    print(json.dumps({"test_accuracy": found, "seconds": seconds, "parameters": parameters}))


if __name__ == "__main__":
    main(*sys.argv[1:])
