"""The network of `research.models.hierarchical_vae` for binary images in PyTorch, as its users write it.

A call returns the negative ELBO.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import works


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        middle = works.HIERARCHY_WIDTH // 2
        self.reduce, self.conv = nn.Conv2d(inputs, middle, 1), nn.Conv2d(middle, middle, 3, padding=1)
        self.expand = nn.Conv2d(middle, outputs, 1)
        self.is_residual = inputs == outputs

    def forward(self, x):
        y = self.expand(F.silu(self.conv(F.silu(self.reduce(F.silu(x))))))
        return x + y if self.is_residual else y


class Group(nn.Module):
    def __init__(self, is_first):
        super().__init__()
        width, latents = works.HIERARCHY_WIDTH, works.HIERARCHY_LATENTS
        self.prior = None if is_first else Block(width, width)
        self.prior_head = None if is_first else nn.Conv2d(width, 2 * latents, 1)
        self.posterior = Block(2 * width, 2 * latents)
        self.project, self.block = nn.Conv2d(latents, width, 1), Block(width, width)

    def forward(self, h, features):
        shift, scale = 0.0, 1.0
        if self.prior is not None:
            h = self.prior(h)
            shift, log_scale = self.prior_head(F.silu(h)).chunk(2, 1)
            scale = torch.exp(5 * torch.tanh(log_scale / 5))
        mean, logvar = self.posterior(torch.cat([h, features], 1)).chunk(2, 1)
        latents = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
        return self.block(h + self.project(shift + scale * latents)), kl


class HierarchicalVAE(nn.Module):
    def __init__(self):
        super().__init__()
        width, self.patch = works.HIERARCHY_WIDTH, works.HIERARCHY_PATCH
        self.stem = nn.Conv2d(1, width, self.patch, self.patch)
        self.bottom_up = nn.ModuleList(
            nn.ModuleList(Block(width, width) for _ in range(count)) for count in works.HIERARCHY
        )
        self.groups = nn.ModuleList(
            nn.ModuleList(Group(number == index == 0) for index in range(count))
            for number, count in enumerate(works.HIERARCHY)
        )
        self.out = nn.Conv2d(width, self.patch**2, 1, bias=False)
        self.start = nn.Parameter(torch.zeros(1, width, works.HIERARCHY_START, works.HIERARCHY_START))
        self.bias = nn.Parameter(torch.zeros(28 * 28))

    def forward(self, grays):
        bits = torch.bernoulli(grays)
        x, features = self.stem(2 * bits - 1), []
        for stage, blocks in enumerate(reversed(self.bottom_up)):
            if stage:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            for block in reversed(blocks):
                x = block(x)
            features.append(x)
        h, total_kl = self.start.expand(len(bits), -1, -1, -1), 0.0
        for groups, x in zip(self.groups, reversed(features)):
            if h.shape != x.shape:
                h = F.interpolate(h, scale_factor=2)[:, :, : x.shape[2], : x.shape[3]]
            for group in groups:
                h, kl = group(h, x)
                total_kl = total_kl + kl
        logits = F.pixel_shuffle(self.out(F.silu(h)), self.patch).flatten(1) + self.bias
        reconstruction = F.binary_cross_entropy_with_logits(logits, bits.flatten(1), reduction="sum")
        return (reconstruction + total_kl) / len(bits)
