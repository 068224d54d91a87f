"""AutoInt: W. Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks",
CIKM 2019, https://arxiv.org/abs/1810.11921."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import Dropout, LayerNorm, init_linear

# Heads of few fields are computed together, as blocks of one matrix of at most so many rows (see InteractingLayer).
_MAX_ROWS = 48


class AutoInt(nn.Module):
    """Multi-head self-attention over the fields: `num_layers` interacting layers (eq. 5 to 8), flattened,

        a_mk = softmax_k(<W_Q e_m, W_K e_k>),  e~_m = sum_k a_mk W_V e_k  for every head,
        e'_m = ReLU(e~_m^(1) + ... concatenated ... + e~_m^(H) + W_Res e_m).

    The defaults are the paper's layer; the common codes have two others:

    * The authors' TensorFlow code: `scale=True, bias=True, activation=True, norm_after_relu=True`.
    * FuxiCTR and BARS: `identity=True`, and in some configurations `scale=True` and `norm_before_relu=True`. Their
      `attention_dim` is the width of all heads together, `num_heads * head_dim` here.

    AutoInt+ is `Parallel(AutoInt(s), MLP(s))`.

    Args:
        num_layers: interacting layers; each is num_heads * head_dim wide.
        num_heads: H in the paper, attention patterns per layer.
        head_dim: d' in the paper, the width of one head.
        scale: divide the scores by sqrt(head_dim); the paper does not.
        bias: the projections W_Q, W_K, W_V and W_Res have a bias.
        activation: the projections go through a ReLU.
        residual: add W_Res e_m.
        identity: where a layer is as wide as its input, the residual is e_m itself.
        norm_before_relu: layer normalisation before the last ReLU.
        norm_after_relu: layer normalisation after the last ReLU (epsilon is torch's 1e-5, TensorFlow's code has 1e-8).
        dropout: of the attention weights a_mk, in both codes. The authors' code drops embeddings too.

    Shape: (B, F, D) -> (B, F * num_heads * head_dim).

    Raises:
        ValueError: a size is below 1, or two options contradict each other.

    >>> tower = AutoInt((39, 16))  # the paper's settings for Criteo
    >>> tower.out_shape, sum(p.numel() for p in tower.parameters())
    ((2496,), 36864)
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        num_layers: int = 3,
        num_heads: int = 2,
        head_dim: int = 32,
        scale: bool = False,
        bias: bool = False,
        activation: bool = False,
        residual: bool = True,
        identity: bool = False,
        norm_before_relu: bool = False,
        norm_after_relu: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ArgumentError(f"AutoInt needs at least one interacting layer, got num_layers={num_layers}")
        num_fields, width = in_shape
        layers = []
        for _ in range(num_layers):
            layer = InteractingLayer(
                (num_fields, width),
                num_heads=num_heads,
                head_dim=head_dim,
                scale=scale,
                bias=bias,
                activation=activation,
                residual=residual,
                identity=identity,
                norm_before_relu=norm_before_relu,
                norm_after_relu=norm_after_relu,
                dropout=dropout,
            )
            layers.append(layer)
            width = num_heads * head_dim
        self.layers = nn.Sequential(*layers)
        self.in_shape = tuple(in_shape)
        self.out_shape = (num_fields * width,)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, F * num_heads * head_dim)."""
        out: Tensor = self.layers(x_BFD).flatten(1)
        return out


class InteractingLayer(nn.Module):
    """One layer of `AutoInt`, with its arguments.

    A CPU is slow with many tiny matrices and with softmax over short rows. So as many heads as fit into a small matrix
    are computed together, as its diagonal blocks; the mask makes the weights between heads exact zeros. That needs no
    transposed copies either, and with 10 fields and 4 heads of 32 a layer takes a fifth less time.

    Shape: (B, F, D) -> (B, F, num_heads * head_dim).

    >>> InteractingLayer((3, 8), num_heads=2, head_dim=5)(torch.zeros(4, 3, 8)).shape
    torch.Size([4, 3, 10])
    """

    mask: Tensor

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        num_heads: int = 2,
        head_dim: int = 32,
        scale: bool = False,
        bias: bool = False,
        activation: bool = False,
        residual: bool = True,
        identity: bool = False,
        norm_before_relu: bool = False,
        norm_after_relu: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_fields, width = in_shape
        if num_heads < 1 or head_dim < 1:
            raise ArgumentError(
                f"AutoInt needs num_heads and head_dim of 1 or more, got num_heads={num_heads} and head_dim={head_dim}"
            )
        if identity and not residual:
            raise ArgumentError(
                "identity=True says which residual to add, but residual=False adds none: drop one of them"
            )
        if norm_before_relu and norm_after_relu:
            raise ArgumentError("norm_before_relu and norm_after_relu are two published layers: choose one of them")
        self.in_shape = tuple(in_shape)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = head_dim**-0.5 if scale else 1.0
        self.activation, self.residual = activation, residual
        out_width = num_heads * head_dim
        self.query = nn.Linear(width, out_width, bias=bias)
        self.key = nn.Linear(width, out_width, bias=bias)
        self.value = nn.Linear(width, out_width, bias=bias)
        self.res = (
            nn.Linear(width, out_width, bias=bias) if residual and not (identity and width == out_width) else None
        )
        init_linear(self)
        self.norm_before = LayerNorm(out_width) if norm_before_relu else None
        self.norm_after = LayerNorm(out_width) if norm_after_relu else None
        self.dropout = Dropout(dropout)
        self.heads_at_once = max(
            n for n in range(1, num_heads + 1) if num_heads % n == 0 and (n == 1 or n * num_fields <= _MAX_ROWS)
        )
        head = torch.arange(num_fields * self.heads_at_once) % self.heads_at_once
        mask = torch.zeros(len(head), len(head)).masked_fill(head[:, None] != head, float("-inf"))
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, F, num_heads * head_dim)."""
        query, key, value = (self._split_heads(self._project(w, x_BFD)) for w in (self.query, self.key, self.value))
        scores = torch.baddbmm(self.mask, query, key.transpose(1, 2), alpha=self.scale)
        out = self._join_heads(torch.bmm(self.dropout(scores.softmax(2)), value))
        if self.residual:
            out = out + (x_BFD if self.res is None else self._project(self.res, x_BFD))
        if self.norm_before is not None:
            out = self.norm_before(out)
        out = out.relu()
        return out if self.norm_after is None else self.norm_after(out)

    def _project(self, linear: nn.Linear, x_BFD: Tensor) -> Tensor:
        projected: Tensor = linear(x_BFD)
        return projected.relu() if self.activation else projected

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, F, num_heads * C) -> (B * groups of heads, F * heads of a group, C); a view where one group has all."""
        num_fields, group = self.in_shape[0], self.heads_at_once
        x = x.view(-1, num_fields, self.num_heads // group, group * self.head_dim)
        return x.transpose(1, 2).reshape(-1, num_fields * group, self.head_dim)

    def _join_heads(self, x: Tensor) -> Tensor:
        num_fields, group = self.in_shape[0], self.heads_at_once
        x = x.view(-1, self.num_heads // group, num_fields, group * self.head_dim)
        return x.transpose(1, 2).reshape(-1, num_fields, self.num_heads * self.head_dim)
