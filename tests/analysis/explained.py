"""Small modules whose proofs are compared with golden text: every size differs from every other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedQueries(nn.Module):
    """Attention in which two query heads share a key-value head."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(10, 3 * 2 * 4, bias=False)
        self.k = nn.Linear(10, 3 * 4, bias=False)
        self.v = nn.Linear(10, 3 * 4, bias=False)
        self.o = nn.Linear(3 * 2 * 4, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (3, 4)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (3, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(-2))


class Rotated(nn.Module):
    """Halves that are turned against each other leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        return self.down(torch.cat([a - b, a + b], dim=-1))


class Blocks(nn.Module):
    """Residual blocks between an embedding and a head, each with a layer norm."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(21, 10)
        self.layers = nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(10, 19)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(10)
        self.up = nn.Linear(10, 16)
        self.down = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Summed(nn.Module):
    """A sigmoid makes one half of what is removed, and it is summed; one row of a table is picked."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 16)
        self.table = nn.Parameter(torch.randn(9, 12))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(x)).sum(-1, keepdim=True)
        return gate * self.table[5]


class Unknown(nn.Module):
    """An operator without a rule between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 16)
        self.down = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.linalg.matrix_power(self.up(x).unsqueeze(-1) * self.up(x).unsqueeze(-2), 3).sum(-1))


class Experts(nn.Module):
    """A router chooses two of five experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(10, 5, bias=False)
        self.up = nn.Parameter(torch.randn(5, 16, 10))
        self.down = nn.Parameter(torch.randn(5, 10, 16))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.softmax(self.router(x), dim=-1).topk(2, dim=-1)
        up, down = self.up[chosen], self.down[chosen]
        hidden = F.relu(torch.einsum("bkfh,bh->bkf", up, x))
        return torch.einsum("bkhf,bkf,bk->bh", down, hidden, weights)
