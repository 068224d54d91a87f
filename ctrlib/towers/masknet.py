"""MaskNet: Z. Wang et al., "MaskNet: Introducing Feature-Wise Multiplication to CTR Ranking Models by Instance-Guided
Mask", DLP-KDD 2021, https://arxiv.org/abs/2102.07619."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import Dropout, LayerNorm, init_linear, through


class MaskBlock(nn.Module):
    """ReLU(LN(W (V_mask * V_hidden))) with the instance-guided mask V_mask = W_d2 ReLU(W_d1 V_emb + b_d1) + b_d2.

    The aggregation layer W_d1 has `reduction_ratio` times as many neurons as the mask has (r = t / z in the paper).
    Layer normalisation comes before the activation, W has no bias, and dropout comes last, as in FuxiCTR.

    Shape: V_emb (B, num_mask_inputs), V_hidden (B, num_inputs) -> (B, num_outputs).

    Raises:
        ValueError: the aggregation layer would have no neuron.

    >>> MaskBlock(6, 4, 3)(torch.zeros(2, 6), torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        num_mask_inputs: int,
        num_inputs: int,
        num_outputs: int,
        *,
        reduction_ratio: float = 2.0,
        layer_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_aggregated = int(num_inputs * reduction_ratio)
        if num_aggregated < 1:
            raise ArgumentError(
                f"reduction_ratio times the width of the masked layer must be 1 or more, got {reduction_ratio} times "
                f"{num_inputs}: use a larger ratio (the paper's aggregation layer is wider than the mask)"
            )
        self.mask = nn.Sequential(
            nn.Linear(num_mask_inputs, num_aggregated), nn.ReLU(), nn.Linear(num_aggregated, num_inputs)
        )
        layers: list[nn.Module] = [nn.Linear(num_inputs, num_outputs, bias=False)]
        if layer_norm:
            layers.append(LayerNorm(num_outputs))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(Dropout(dropout))
        self.hidden = nn.Sequential(*layers)
        init_linear(self)

    def forward(self, v_emb: Tensor, v_hidden: Tensor) -> Tensor:
        """V_emb (B, num_mask_inputs), V_hidden (B, num_inputs) -> (B, num_outputs)."""
        return through(self.hidden, through(self.mask, v_emb) * v_hidden)


class FieldNorm(nn.Module):
    """LN_EMB(V) = [LN(e_1), ..., LN(e_F)]: layer normalisation of each field, with its own gain and bias.

    Shape: (B, F, D) -> (B, F, D).

    >>> FieldNorm((1, 2))(torch.tensor([[[1.0, 3.0]]])).round(decimals=3).tolist()
    [[[-1.0, 1.0]]]
    """

    def __init__(self, in_shape: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(in_shape))
        self.bias = nn.Parameter(torch.zeros(in_shape))

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, F, D)."""
        return torch.addcmul(self.bias, F.layer_norm(x_BFD, self.weight.shape[1:]), self.weight)


class SerialMaskNet(nn.Module):
    """Mask blocks one on top of the other, h_l = MaskBlock_l(V_emb, h_{l-1}) with h_0 = LN_EMB(V_emb); all masks are
    guided by the embeddings as they are.

    `embedding_norm` and `layer_norm` turn the two normalisations off: the paper has both; BARS' best MovieLens and
    Frappe runs have none on the embeddings.

    Shape: (B, F, D) -> (B, hidden[-1]).

    Raises:
        ValueError: there is no block, or a width is below 1.

    >>> tower = SerialMaskNet((3, 4), hidden=(8, 5))
    >>> tower.out_shape, tower(torch.zeros(2, 3, 4)).shape
    ((5,), torch.Size([2, 5]))
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        hidden: Sequence[int] = (400, 400, 400),
        reduction_ratio: float = 2.0,
        embedding_norm: bool = True,
        layer_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not hidden or any(width < 1 for width in hidden):
            raise ArgumentError(f"hidden widths must be one or more positive integers, got {tuple(hidden)}")
        num_inputs = math.prod(in_shape)
        self.in_shape = tuple(in_shape)
        self.out_shape = (hidden[-1],)
        self.norm = FieldNorm(in_shape) if embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            MaskBlock(
                num_inputs, before, width, reduction_ratio=reduction_ratio, layer_norm=layer_norm, dropout=dropout
            )
            for before, width in zip((num_inputs, *hidden), hidden)
        )

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, hidden[-1])."""
        v_emb = x_BFD.flatten(1)
        h: Tensor = self.norm(x_BFD).flatten(1)
        for block in self.blocks:
            h = block(v_emb, h)
        return h


class ParallelMaskNet(nn.Module):
    """[MaskBlock_1(V_emb, h), ..., MaskBlock_U(V_emb, h)] with h = LN_EMB(V_emb): mask blocks side by side.

    The paper puts feed-forward layers on top: `Stack(blocks, MLP(blocks.out_shape))`. The flags are those of
    `SerialMaskNet`.

    Shape: (B, F, D) -> (B, num_blocks * block_dim).

    Raises:
        ValueError: there is no block, or `block_dim` is below 1.

    >>> ParallelMaskNet((3, 4), num_blocks=3, block_dim=5).out_shape
    (15,)
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        num_blocks: int = 3,
        block_dim: int = 64,
        reduction_ratio: float = 2.0,
        embedding_norm: bool = True,
        layer_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_blocks < 1 or block_dim < 1:
            raise ArgumentError(
                f"ParallelMaskNet needs at least one block of width 1, got num_blocks={num_blocks}, "
                f"block_dim={block_dim}"
            )
        width = math.prod(in_shape)
        self.in_shape = tuple(in_shape)
        self.out_shape = (num_blocks * block_dim,)
        self.norm = FieldNorm(in_shape) if embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            MaskBlock(width, width, block_dim, reduction_ratio=reduction_ratio, layer_norm=layer_norm, dropout=dropout)
            for _ in range(num_blocks)
        )

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, num_blocks * block_dim)."""
        v_emb, h = x_BFD.flatten(1), self.norm(x_BFD).flatten(1)
        return torch.cat([block(v_emb, h) for block in self.blocks], dim=1)
