"""The Transformer of `research.models.transformer` in PyTorch, as its users write it: fused attention and RMSNorm."""

import math

import torch
from torch import nn
from torch.nn import functional as F

_HEAD_SIZE = 64


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = 8 * math.ceil(width / 3)
        self.norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.outputs = nn.Linear(width, width, bias=False)
        self.gate, self.expand = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)

    def forward(self, x, cos, sin):
        y = self.norm(x)
        query, key, value = (
            layer(y).unflatten(-1, (-1, _HEAD_SIZE)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outputs(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.contract(F.silu(self.gate(y)) * self.expand(y))


class Transformer(nn.Module):
    def __init__(self, vocabulary, width, layers, length):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocabulary, width), nn.RMSNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.logits = nn.Linear(width, vocabulary, bias=False)
        angles = torch.outer(torch.arange(length), 10_000 ** -(torch.arange(0, _HEAD_SIZE, 2) / _HEAD_SIZE))
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.logits(self.norm(x))


def _rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
