"""Numbers as fields, (B, N) -> (B, N, D): one vector per feature, bins, piecewise-linear, periodic, or soft bins.

Sources: Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning", NeurIPS 2022,
https://arxiv.org/abs/2203.05556 (`PiecewiseLinear`, `Periodic`); Guo et al., "An Embedding Learning Framework for
Numerical Features in CTR Prediction", KDD 2021, https://arxiv.org/abs/2012.08986 (`AutoDis`).

Inputs are finite, as the loader checks. Bins come from `ctrlib.data.quantiles.quantile_edges`; they are constants of
the architecture, kept as buffers and so part of the state_dict. Features with fewer bins than others are padded:
their surplus weights are 0, are multiplied by 0, and get a gradient of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError

__all__ = ["AutoDis", "Bucketised", "Periodic", "PiecewiseLinear", "ValueTimesVector", "start_small"]


class ValueTimesVector(nn.Module):
    """x_f v_f: one vector per feature, stretched by the value, as in AutoInt (eq. 4), DeepFM and FuxiCTR.

    All a tower sees of a number is a point on one line. v_f starts Xavier-normal, as a bias-free `Linear(1, D)` in
    FuxiCTR does.

    Shape: (B, N) -> (B, N, D).

    Raises:
        ValueError: a size is below 1.

    >>> encoder = ValueTimesVector(1, embedding_dim=2)
    >>> encoder.vectors.data = torch.tensor([[1.0, -2.0]])
    >>> encoder(torch.tensor([[3.0]])).tolist()
    [[[3.0, -6.0]]]
    """

    def __init__(self, num_features: int, *, embedding_dim: int = 16) -> None:
        super().__init__()
        _check_sizes(num_features=num_features, embedding_dim=embedding_dim)
        self.in_shape = (num_features,)
        self.out_shape = (num_features, embedding_dim)
        self.vectors = nn.Parameter(torch.empty(num_features, embedding_dim))
        nn.init.normal_(self.vectors, std=(2 / (1 + embedding_dim)) ** 0.5)

    def forward(self, x_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N, D)."""
        return x_BN.unsqueeze(2) * self.vectors


class Bucketised(nn.Module):
    """V_f[t], b_t <= x_f < b_{t+1}: one vector per bin, as if the bin's number were the id of a categorical feature.

    Edges b_0 < ... < b_T make T + 1 rows: T bins, and one for x_f = b_T and above. Without it the largest value would
    share a row with the bin below, and a number that is 0 or 1 could not be told apart. What is below b_0 gets row 0.
    Rows start as N(0, init_std^2), like those of a table.

    The look-up is done by a matrix product with steps, V_f[0] + sum_t 1[x_f >= b_t] (V_f[t] - V_f[t - 1]): on a CPU,
    a gather and above all its gradient cost several times more (until there are hundreds of bins).

    Shape: (B, N) -> (B, N, D).

    Raises:
        ValueError: `edges` are not one or more lists of two or more increasing finite float32 numbers, or
            `embedding_dim` is below 1.

    >>> encoder = Bucketised([[0.0, 10.0, 20.0]], embedding_dim=1)
    >>> encoder.weight.data = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> [encoder(torch.tensor([[x]])).item() for x in (-5.0, 9.9, 10.0, 19.9, 20.0, 99.0)]
    [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    """

    def __init__(self, edges: Sequence[Sequence[float]], *, embedding_dim: int = 16, init_std: float = 1e-4) -> None:
        super().__init__()
        rows = _checked(edges)
        _check_sizes(embedding_dim=embedding_dim)
        self.in_shape = (len(rows),)
        self.out_shape = (len(rows), embedding_dim)
        # No number reaches a threshold of infinity.
        self.thresholds = nn.Buffer(_padded([row[1:] for row in rows], math.inf))
        self.weight = nn.Parameter(torch.zeros(len(rows), max(map(len, rows)), embedding_dim))
        with torch.no_grad():
            for weight, row in zip(self.weight, rows):
                weight[: len(row)].normal_(std=init_std)

    def forward(self, x_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N, D)."""
        steps_NBT = (x_BN.t().unsqueeze(2) - self.thresholds).ge_(0)  # 0 or 1, as floats
        return _linear(steps_NBT, self.weight.diff(dim=1), self.weight[:, :1])


class PiecewiseLinear(nn.Module):
    """Linear_f(PLE(x_f)), PLE(x) = [e_1, ..., e_T], e_t = (x - b_{t-1}) / (b_t - b_{t-1})  (eq. 1), clamped:

    to 0 below b_{t-1} unless t = 1, and to 1 above b_t unless t = T. So the first and the last bin go on linearly
    outside of the edges, in the paper and in the authors' package alike: the field stays a continuous, piecewise-linear
    function of the number. Every feature has a linear layer of its own, which starts as `nn.Linear(T_f, D)` does. With
    edges at quantiles this is the paper's Q-L, with `relu` its Q-LR.

    Shape: (B, N) -> (B, N, D).

    Raises:
        ValueError: as in `Bucketised`.

    >>> encoder = PiecewiseLinear([[0.0, 1.0, 3.0]], embedding_dim=2)
    >>> for x in (2.0, -1.0, 5.0):
    ...     print(encoder.encode(torch.tensor([[x]]))[0, 0].tolist())
    [1.0, 0.5]
    [-1.0, 0.0]
    [1.0, 2.0]
    """

    def __init__(self, edges: Sequence[Sequence[float]], *, embedding_dim: int = 16, relu: bool = False) -> None:
        super().__init__()
        rows = _checked(edges)
        _check_sizes(embedding_dim=embedding_dim)
        self.in_shape = (len(rows),)
        self.out_shape = (len(rows), embedding_dim)
        self.relu = relu
        num_bins = [len(row) - 1 for row in rows]
        self.starts = nn.Buffer(_padded([row[:-1] for row in rows], 0))
        self.widths = nn.Buffer(_padded([row.diff() for row in rows], 1))
        # Where a bin's e_t is cut off; padding is held at 0.
        self.lowest = nn.Buffer(torch.zeros_like(self.starts))
        self.highest = nn.Buffer(_padded([torch.ones(count) for count in num_bins], 0))
        self.weight = nn.Parameter(torch.zeros(len(rows), max(num_bins), embedding_dim))
        self.bias = nn.Parameter(torch.empty(len(rows), 1, embedding_dim))
        with torch.no_grad():
            for feature, count in enumerate(num_bins):
                self.lowest[feature, 0, 0] = -math.inf
                self.highest[feature, 0, count - 1] = math.inf
                self.weight[feature, :count].uniform_(-(count**-0.5), count**-0.5)
                self.bias[feature].uniform_(-(count**-0.5), count**-0.5)

    def encode(self, x_BN: Tensor) -> Tensor:
        """PLE itself, (B, N) -> (N, B, T), T that of the feature with the most bins, padded with 0."""
        offsets_NBT = x_BN.t().unsqueeze(2) - self.starts
        return offsets_NBT.div_(self.widths).clamp_(self.lowest, self.highest)

    def forward(self, x_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N, D)."""
        fields = _linear(self.encode(x_BN), self.weight, self.bias)
        return fields.relu_() if self.relu else fields


class Periodic(nn.Module):
    """ReLU(Linear_f(Periodic(x_f))), Periodic(x) = concat[sin(v), cos(v)], v = [2 pi c_1 x, ..., 2 pi c_k x].

    (Section 3.3.) The frequencies c start as N(0, sigma^2) for every feature and are trained. `sigma` decides what can
    be learnt at all: 1 / sigma is about the shortest period, in units of the (transformed) number. The authors tune it
    between 0.01 and 100, find less than 0.2 best for half of their tasks, and warn of too large values. The defaults
    are those of their package, which cuts the start of c off at 3 sigma, unlike the paper and this.

    `relu=False` is the paper's PL, the default its PLR; `lite`, with one linear layer for all features, is PLR(lite)
    of TabR (Gorishniy et al., ICLR 2024, https://arxiv.org/abs/2307.14338). Linear layers start as `nn.Linear(2 k, D)`.

    Shape: (B, N) -> (B, N, D).

    Raises:
        ValueError: a size is below 1, or `sigma` is not positive.

    >>> Periodic(3, embedding_dim=4, num_frequencies=5, sigma=1.0)(torch.zeros(2, 3)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        num_features: int,
        *,
        embedding_dim: int = 16,
        num_frequencies: int = 48,
        sigma: float = 0.01,
        lite: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(num_features=num_features, embedding_dim=embedding_dim, num_frequencies=num_frequencies)
        if not 0 < sigma < math.inf:
            raise ArgumentError(f"sigma, the spread of the frequencies, must be positive, got {sigma}")
        self.in_shape = (num_features,)
        self.out_shape = (num_features, embedding_dim)
        self.relu = relu
        num_linear = 1 if lite else num_features
        bound = (2 * num_frequencies) ** -0.5
        self.frequencies = nn.Parameter(torch.empty(num_features, num_frequencies).normal_(std=sigma))
        self.weight = nn.Parameter(torch.empty(num_linear, 2 * num_frequencies, embedding_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_linear, 1, embedding_dim).uniform_(-bound, bound))

    def forward(self, x_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N, D)."""
        # An outer product as a matrix product: its gradient is one as well, in place of two passes over the angles.
        angles_NBK = torch.bmm(x_BN.t().unsqueeze(2), (2 * math.pi * self.frequencies).unsqueeze(1))
        sin_NBK, cos_NBK = _SinCos.apply(angles_NBK)  # type: ignore[no-untyped-call]
        # Two products that add up, in place of one product with a concatenation that would have to be made first.
        weight_sin, weight_cos = self.weight.expand(self.in_shape[0], -1, -1).chunk(2, dim=1)
        fields = _linear(cos_NBK, weight_cos, torch.baddbmm(self.bias, sin_NBK, weight_sin))
        return fields.relu_() if self.relu else fields


class _SinCos(torch.autograd.Function):
    """sin v and cos v, each of which is the other's gradient: autograd would compute both a second time."""

    @staticmethod
    def forward(ctx: Any, angles: Tensor) -> tuple[Tensor, Tensor]:
        sin, cos = angles.sin(), angles.cos()
        ctx.save_for_backward(sin, cos)
        return sin, cos

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sin: Tensor, grad_cos: Tensor) -> Tensor:
        sin, cos = ctx.saved_tensors
        grad: Tensor = (grad_sin * cos).addcmul_(grad_cos, sin, value=-1)
        return grad


class AutoDis(nn.Module):
    """softmax(s_f / tau)^T ME_f, s_f = W_f h + alpha h, h = LeakyReLU(w_f x_f): a number picks from H meta-embeddings.

    (The paper's weighted-average aggregation.) alpha is the factor of the skip-connection, tau the temperature: the
    lower, the closer to a choice of one. There is no bias, neither in the paper nor in the authors' MindSpore code, so
    s_f grows in proportion to |x_f|: where tau is low, only the sign of the number is left. The authors' code uses
    H = 20 and tau = 1e-5, and is the special case s_f = w_f x_f, without W_f and LeakyReLU. Here all weights start
    Xavier-normal, so that s_f is of the size of x_f, and tau = 1 is the default.

    Shape: (B, N) -> (B, N, D).

    Raises:
        ValueError: a size is below 1, or `temperature` is not positive.

    >>> AutoDis(3, embedding_dim=4, num_meta_embeddings=5)(torch.zeros(2, 3)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        num_features: int,
        *,
        embedding_dim: int = 16,
        num_meta_embeddings: int = 20,
        alpha: float = 0.1,
        temperature: float = 1.0,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__()
        _check_sizes(num_features=num_features, embedding_dim=embedding_dim, num_meta_embeddings=num_meta_embeddings)
        if not 0 < temperature < math.inf:
            raise ArgumentError(f"temperature must be positive, got {temperature}: 1 is soft, 1e-5 a choice of one")
        self.in_shape = (num_features,)
        self.out_shape = (num_features, embedding_dim)
        self.alpha, self.temperature, self.negative_slope = alpha, temperature, negative_slope
        num = num_meta_embeddings
        self.first = nn.Parameter(torch.empty(num_features, 1, num).normal_(std=(2 / (1 + num)) ** 0.5))
        self.second = nn.Parameter(torch.empty(num_features, num, num).normal_(std=num**-0.5))
        self.meta_embeddings = nn.Parameter(
            torch.empty(num_features, num, embedding_dim).normal_(std=(2 / (num + embedding_dim)) ** 0.5)
        )

    def forward(self, x_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N, D)."""
        # LeakyReLU(w x) = x+ LeakyReLU(w) + x- LeakyReLU(-w) with x = x+ - x-, and all up to the softmax is linear in
        # it. So W is applied to two vectors per feature, not to one per number.
        h_N2H = F.leaky_relu(torch.cat([self.first, -self.first], dim=1), self.negative_slope)
        scores_N2H = torch.baddbmm(h_N2H, h_N2H, self.second.transpose(1, 2), beta=self.alpha) / self.temperature
        parts_NB2 = torch.stack([x_BN.t(), -x_BN.t()], dim=2).relu_()
        choice_NBH = torch.bmm(parts_NB2, scores_N2H).softmax(dim=2)
        return torch.bmm(choice_NBH, self.meta_embeddings).transpose(0, 1).contiguous()


# The weights in proportion to which the fields are. Rows of `Bucketised` start small as they are.
_LAST = {
    ValueTimesVector: ("vectors",),
    PiecewiseLinear: ("weight", "bias"),
    Periodic: ("weight", "bias"),
    AutoDis: ("meta_embeddings",),
}


def start_small(part: nn.Module) -> None:
    """Let the fields of N > 1 numbers in it start at 0.3 / sqrt(N) of their size.

    For a tower that adds the inner products of all pairs of fields up to the logit: those of 13 numbers, standard
    normal, make it start with a standard deviation of 4 as `ValueTimesVector`, of 11 if they are logarithms of counts,
    and with a mean of 34 as `Periodic`, and an epoch is spent on bringing that down. Now it is below 0.3 for any N.

    >>> encoder = ValueTimesVector(9, embedding_dim=16)
    >>> before = encoder.vectors.detach().clone()
    >>> start_small(encoder)
    >>> torch.allclose(encoder.vectors, 0.1 * before)
    True
    """
    for module in part.modules():
        names = _LAST.get(type(module), ())
        num_features = getattr(module, "in_shape", (1,))[0]
        if names and num_features > 1:
            with torch.no_grad():
                for name in names:
                    module.get_parameter(name).mul_(0.3 / num_features**0.5)


def _linear(x_NBT: Tensor, weight_NTD: Tensor, bias: Tensor) -> Tensor:
    """One linear layer per feature, all in one batched product: -> (B, N, D)."""
    return torch.baddbmm(bias, x_NBT, weight_NTD).transpose(0, 1).contiguous()


def _padded(rows: list[Tensor], value: float) -> Tensor:
    """One row per feature, ready to be compared with (N, B, 1): (N, 1, T)."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).unsqueeze(1)


def _checked(edges: Sequence[Sequence[float]]) -> list[Tensor]:
    """The edges as float32, in which numbers are compared with them."""
    # On the CPU, since a model may be built on the meta device, for its shapes alone.
    rows = [torch.as_tensor(row, dtype=torch.float32, device="cpu") for row in edges]
    if not rows:
        raise ArgumentError("edges must hold one list per numeric feature, got none: see quantile_edges")
    for position, row in enumerate(rows):
        if row.ndim != 1 or len(row) < 2 or not row.isfinite().all() or not (row.diff() > 0).all():
            raise ArgumentError(
                f"edges of numeric feature {position} must be two or more finite numbers that increase as float32, "
                f"got {edges[position]!r}: see quantile_edges"
            )
    return [torch.as_tensor(row, dtype=torch.float32) for row in edges]


def _check_sizes(**sizes: int) -> None:
    wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1]
    if wrong:
        raise ArgumentError(f"an encoder of numbers needs sizes of 1 or more, got {', '.join(wrong)}")
