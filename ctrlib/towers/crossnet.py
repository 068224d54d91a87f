"""Cross networks: DCN, R. Wang et al., "Deep & Cross Network for Ad Click Predictions", ADKDD 2017,
https://arxiv.org/abs/1708.05123, and DCN V2, R. Wang et al., WWW 2021, https://arxiv.org/abs/2008.13535."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError
from ctrlib.joined import by_onednn, in_autocast, product
from ctrlib.layers import init_linear


class CrossNet(nn.Module):
    """x_{l+1} = x_0 x_l^T w_l + b_l + x_l on the flattened fields x_0  (DCN, eq. 3): each layer adds one degree.

    Computed without the recursion over vectors. Every x_l is a multiple of x_0 plus a constant, x_l = c_l x_0 + s_l
    with s_l = b_0 + ... + b_{l-1}, so one number per row is all that a layer changes:
    c_{l+1} = c_l (1 + x_0^T w_l) + s_l^T w_l. All x_0^T w_l are one product, and the output is written once, however
    many layers there are; it is the same polynomial.

    The paper's DCN is `Parallel(CrossNet(s), MLP(s))`. TorchRec's `VectorCrossNet` is this network.

    Shape: (B, F, D) or (B, H) -> (B, F * D) or (B, H).

    Raises:
        ValueError: there is no layer.

    >>> cross = CrossNet((2, 1), num_layers=1)
    >>> with torch.no_grad():
    ...     _ = cross.weight.fill_(1.0), cross.bias.copy_(torch.tensor([[0.5, 0.0]]))
    >>> cross(torch.tensor([[[2.0], [3.0]]])).tolist()  # [2*5 + 0.5 + 2, 3*5 + 3]
    [[12.5, 18.0]]
    """

    def __init__(self, in_shape: tuple[int, ...], *, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1:
            raise ArgumentError(f"CrossNet needs at least one layer, got num_layers={num_layers}")
        width = math.prod(in_shape)
        self.in_shape = tuple(in_shape)
        self.out_shape = (width,)
        self.num_layers = num_layers
        # The Xavier scale of Linear(width, 1), per layer, as in FuxiCTR.
        self.weight = nn.Parameter(torch.randn(num_layers, width) * math.sqrt(2 / (width + 1)))
        self.bias = nn.Parameter(torch.zeros(num_layers, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) or (B, H) -> (B, F * D) or (B, H)."""
        x_0 = x.flatten(1)
        sums = self.bias.cumsum(0)  # row l is s_{l+1}
        slopes = self.weight @ x_0.T + 1  # (num_layers, B)
        shifts = (self.weight * (sums - self.bias)).sum(1)
        scale = slopes[0]  # c_1, as c_0 = 1 and s_0 = 0
        for layer in range(1, self.num_layers):
            scale = torch.addcmul(shifts[layer], scale, slopes[layer])
        return torch.addcmul(sums[-1], scale.unsqueeze(1), x_0)


class CrossNetV2(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l on the flattened fields x_0  (eq. 1), full-rank W_l.

    The paper's parallel DCN-V2 is `Parallel(CrossNetV2(s), MLP(s))`; the stacked one
    `Stack(cross, MLP(cross.out_shape))`.

    Shape: (B, F, D) or (B, H) -> (B, F * D) or (B, H).

    >>> cross = CrossNetV2((2, 1), num_layers=1)
    >>> with torch.no_grad():
    ...     _ = cross.layers[0].weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> cross(torch.tensor([[[2.0], [3.0]]])).tolist()  # [2*3 + 2, 3*2 + 3]
    [[8.0, 9.0]]
    """

    def __init__(self, in_shape: tuple[int, ...], *, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1:
            raise ArgumentError(f"CrossNetV2 needs at least one layer, got num_layers={num_layers}")
        width = math.prod(in_shape)
        self.in_shape = tuple(in_shape)
        self.out_shape = (width,)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        init_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) or (B, H) -> (B, F * D) or (B, H)."""
        x_0 = x_l = x.flatten(1)
        weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
        if by_onednn(x_0, *self.layers) and all(bias is not None for bias in biases):
            crossed: Tensor = _Crosses.apply(x_0, *in_autocast(*weights, *biases))  # type: ignore[no-untyped-call]
            return crossed
        for layer in self.layers:
            x_l = torch.addcmul(x_l, x_0, layer(x_l))
        return x_l


class _Crosses(torch.autograd.Function):
    """All layers of `CrossNetV2` as x_l = x_0 * (1 + s_l) with s_{l+1} = s_l + W_l x_l + b_l, and their gradients.

    That of x_l, g_l, gives g_l * x_0 to s_l beside what it has from s_{l+1}, and g_l * (1 + s_l) to x_0. Autograd goes
    three times as often through memory, which costs more than the products. Under autocast s, which is what a layer
    adds, is bfloat16 as W_l x_l is, and the last x_l is as exact as x_0.
    """

    @staticmethod
    def forward(ctx: Any, x_0: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        narrow = x_0.to(weights[0].dtype)
        xs, sums = [narrow], [product(narrow, weights[0], biases[0])]
        for weight, bias in zip(weights[1:], biases[1:]):
            xs.append(torch.addcmul(narrow, narrow, sums[-1]))
            sums.append(product(xs[-1], weight, bias).add_(sums[-1]))
        ctx.save_for_backward(*weights, *xs, *sums)
        return torch.addcmul(x_0, x_0, sums[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        num_layers = len(saved) // 3
        weights, xs, sums = (saved[n * num_layers :][:num_layers] for n in range(3))
        of_x = grad.to(xs[0].dtype)
        of_x_0, of_sum = torch.addcmul(of_x, of_x, sums[-1]), of_x * xs[0]
        of_weights, of_biases = [], []
        for layer in reversed(range(num_layers)):
            of_weights.append(of_sum.t() @ xs[layer])
            of_biases.append(of_sum.sum(0))
            of_x = product(of_sum, weights[layer].t())
            of_x_0.add_(of_x)
            if layer:
                of_x_0.addcmul_(of_x, sums[layer - 1])
                of_sum.addcmul_(of_x, xs[0])
        return of_x_0.to(grad.dtype), *of_weights[::-1], *of_biases[::-1]


class CrossNetMix(nn.Module):
    """x_{l+1} = sum_i G_i(x_l) E_i(x_l) + x_l,  E_i(x_l) = x_0 * (U_l^i g(C_l^i g(V_l^i^T x_l)) + b_l)  (DCN V2, eqs. 3
    and 4): a mixture of cross layers of low rank.

    The gates G sum to 1, so the experts' sum goes inside the product, x_0 * (U_l [G_1 h_1, ..., G_E h_E] + b_l): all
    experts are one product with V_l, one batched with C_l, and one with U_l.

    `activation`: g, any nonlinearity in the paper, tanh in FuxiCTR, by default ReLU in TorchRec. None leaves out g and
    C: eq. 3, and with one expert eq. 2, x_0 * (U_l V_l^T x_l + b_l) + x_l.

    As in both codes, G is a softmax of bias-free linear scores, one gate for all layers, and the experts of a layer
    share its bias; as in TorchRec, one expert has no gate. The initial weights are Xavier-normal for each matrix; both
    codes apply Xavier to the stack of all experts, which takes the last axis for a receptive field and makes the
    weights several times smaller.

    Shape: (B, F, D) or (B, H) -> (B, F * D) or (B, H).

    Raises:
        ValueError: there is no layer, no expert, or the rank is below 1.

    >>> cross = CrossNetMix((2, 1), num_layers=1, num_experts=1, rank=1, activation=None)
    >>> with torch.no_grad():
    ...     _ = cross.u[0].copy_(torch.tensor([[[0.0, 2.0]]])), cross.v[0].copy_(torch.tensor([[[1.0, 1.0]]]))
    >>> cross(torch.tensor([[[2.0], [3.0]]])).tolist()  # [2*0*5 + 2, 3*2*5 + 3]
    [[2.0, 33.0]]
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        num_layers: int = 3,
        num_experts: int = 4,
        rank: int = 32,
        activation: Callable[[Tensor], Tensor] | None = torch.tanh,
    ) -> None:
        super().__init__()
        if num_layers < 1 or num_experts < 1 or rank < 1:
            raise ArgumentError(
                f"CrossNetMix needs at least one layer, one expert and rank 1, got num_layers={num_layers}, "
                f"num_experts={num_experts}, rank={rank}"
            )
        width = math.prod(in_shape)
        self.in_shape = tuple(in_shape)
        self.out_shape = (width,)
        self.num_experts, self.rank, self.activation = num_experts, rank, activation

        def matrices(rows: int, columns: int) -> Tensor:
            return torch.randn(num_experts, rows, columns) * math.sqrt(2 / (rows + columns))

        layers = range(num_layers)
        self.v = nn.ParameterList(matrices(rank, width) for _ in layers)  # V^T
        self.c = nn.ParameterList(matrices(rank, rank) for _ in layers if activation is not None)
        self.u = nn.ParameterList(matrices(rank, width) for _ in layers)  # U^T
        self.bias = nn.ParameterList(torch.zeros(width) for _ in layers)
        self.gate = nn.Linear(width, num_experts, bias=False) if num_experts > 1 else None
        init_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) or (B, H) -> (B, F * D) or (B, H)."""
        x_0 = x_l = x.flatten(1)
        for layer, (v, u, bias) in enumerate(zip(self.v, self.u, self.bias)):
            # Experts and ranks before rows: then each product reads and writes whole matrices, and nothing is permuted.
            hidden = (v.flatten(0, 1) @ x_l.T).view(self.num_experts, self.rank, -1)
            if self.activation is not None:
                hidden = self.activation(torch.bmm(self.c[layer], self.activation(hidden)))
            if self.gate is not None:
                hidden = hidden * (self.gate.weight @ x_l.T).softmax(0).unsqueeze(1)
            x_l = torch.addcmul(x_l, x_0, torch.addmm(bias, hidden.flatten(0, 1).T, u.flatten(0, 1)))
        return x_l
