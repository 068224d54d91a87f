"""Feature generation of FGCNN: B. Liu et al., "Feature Generation by Convolutional Neural Network for Click-Through
Rate Prediction", WWW 2019, https://arxiv.org/abs/1904.04447."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import init_linear


class FGCNN(nn.Module):
    """[E; R^1; ..; R^n]: the raw fields E and the new ones that a convolution over the fields makes, with S^0 = E',

        C^i = tanh(conv(S^{i-1})),  S^i = max-pool(C^i),  R^i = tanh(W^i flatten(S^i) + b^i).

    A kernel sees `kernel_height` neighbouring fields at one position of the embedding, pooling takes the largest of
    `pooling_size` fields, and R^i has `num_new` fields for each of S^i. The output is fields again, so the paper's
    network, with IPNN as its classifier, is `Stack(fgcnn, IPNN(fgcnn.out_shape), MLP(...))`. The order of the fields
    matters here: a convolution mixes neighbours.

    In the paper E' has embeddings of its own, a second set of tables for the same features. Give the tower both sets of
    fields, those of E first; `num_raw` says how many fields E has, and the others are E'. By default E' = E, which
    FuxiCTR calls share_embedding: half the embedding memory.

    `round_up`: S^i has ceil(H / p) fields, the last from fewer than p where p does not divide H (FuxiCTR); otherwise
    that rest is dropped, floor(H / p) (DeepCTR). Only real values compete for the maximum. For an odd height and p = 2
    FuxiCTR pools (0), (1, 2), .. where this pools (0, 1), ..., (H - 1); for p > 2 its padding gives other heights than
    its linear layers expect. Pooling comes before tanh, which is increasing: the same, for a p-th of the work.
    `batch_norm` stands between convolution and tanh, by default as in FuxiCTR. Convolutions start as torch's do, linear
    layers Xavier-normal, as there.

    Shape: (B, F, D) -> (B, M, D), M = num_raw + num_new * (H_1 + .. + H_n).

    Raises:
        ValueError: the kernel's height is even, a size is not positive, pooling leaves no field, or `num_raw` does not
            leave a field for E and for E'.

    >>> FGCNN((13, 4)).out_shape  # 13 + 3 * (7 + 4 + 2 + 1)
    (55, 4)
    >>> FGCNN((26, 4), num_raw=13).out_shape
    (55, 4)
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        num_raw: int | None = None,
        num_channels: Sequence[int] = (14, 16, 18, 20),
        kernel_height: int = 7,
        pooling_size: int = 2,
        num_new: int = 3,
        batch_norm: bool = True,
        round_up: bool = True,
    ) -> None:
        super().__init__()
        num_fields, dim = in_shape
        if not num_channels or min(*num_channels, kernel_height, pooling_size, num_new) < 1:
            raise ArgumentError(
                f"num_channels (one or more), kernel_height, pooling_size and num_new must be positive, got "
                f"{tuple(num_channels)}, {kernel_height}, {pooling_size} and {num_new}"
            )
        if kernel_height % 2 == 0:
            raise ArgumentError(
                f"kernel_height must be odd, so that as many fields come out as go in, got {kernel_height}: take "
                f"{kernel_height - 1} or {kernel_height + 1}"
            )
        if num_raw is not None and not 0 < num_raw < num_fields:
            raise ArgumentError(
                f"num_raw must be from 1 to {num_fields - 1}, so that fields are left for the convolution, got "
                f"{num_raw}: append the second tables' fields to the input, or leave num_raw out to share embeddings"
            )
        self.num_raw, self.pooling_size, self.round_up = num_raw, pooling_size, round_up
        self.convolutions, self.recombinations = nn.ModuleList(), nn.ModuleList()
        height, num_generated = num_fields - (num_raw or 0), 0
        for layer, (before, channels) in enumerate(zip((1, *num_channels), num_channels, strict=False), start=1):
            pooled = -(-height // pooling_size) if round_up else height // pooling_size
            if not pooled:
                raise ArgumentError(
                    f"pooling_size={pooling_size} leaves none of the {height} fields before layer {layer}: give "
                    f"num_channels at most {layer - 1} layers, a smaller pooling_size, or round_up=True"
                )
            height = pooled
            convolution: list[nn.Module] = [
                nn.Conv2d(before, channels, (kernel_height, 1), padding=(kernel_height // 2, 0))
            ]
            if batch_norm:
                convolution.append(nn.BatchNorm2d(channels))
            self.convolutions.append(nn.Sequential(*convolution))
            self.recombinations.append(nn.Linear(channels * height * dim, height * num_new * dim))
            num_generated += height * num_new
        init_linear(self)
        self.in_shape = tuple(in_shape)
        self.out_shape = ((num_raw or num_fields) + num_generated, dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, M, D)."""
        raw = x_BFD if self.num_raw is None else x_BFD[:, : self.num_raw]
        state = (x_BFD if self.num_raw is None else x_BFD[:, self.num_raw :]).unsqueeze(1)  # (B, channels, H, D)
        fields = [raw]
        for convolution, recombination in zip(self.convolutions, self.recombinations, strict=True):
            pooled = F.max_pool2d(convolution(state), (self.pooling_size, 1), ceil_mode=self.round_up)
            state = pooled.tanh()
            fields.append(recombination(state.flatten(1)).tanh().unflatten(1, (-1, self.in_shape[1])))
        return torch.cat(fields, dim=1)
