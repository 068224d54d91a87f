"""EulerNet: Z. Tian et al., "EulerNet: Adaptive Feature Interaction Learning via Euler's Formula for CTR Prediction",
SIGIR 2023, https://arxiv.org/abs/2304.10711."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import Dropout, LayerNorm

_EPS = 1e-8  # keeps the logarithm of a zero modulus finite; both codes have it


class EulerNet(nn.Module):
    """Fields as complex numbers, multiplied with learned real exponents, plus a linear layer beside each product.

    A field e_j enters as mu_j cos(e_j) + i mu_j sin(e_j). Written as lambda_j exp(i theta_j), elementwise in D, a layer
    with exponents (order vectors) alpha_k computes

        o_k = prod_j (lambda_j exp(i theta_j))^alpha_kj = exp(sum_j alpha_kj log lambda_j + b_k) exp(i psi_k),
        psi_k = sum_j alpha_kj theta_j + b'_k,

    and adds ReLU(W r + c) to its real and ReLU(W p + c) to its imaginary part, r and p being those of all inputs. The
    output is real + imaginary part: the codes send both through one linear layer and add the logits, so that LinearHead
    gives the same logit, with the code's doubled bias as one.

    As both codes: phases lie in (-pi, pi], and alpha starts as the identity where a layer keeps the number of vectors,
    else as nearly one-hot vectors. W starts Xavier-uniform as in FuxiCTR and in the authors' runs of it; their own code
    has N(0, 0.01^2). Without `layer_norm` both codes hold the norms' parameters all the same, unused.

    Args:
        num_orders: order vectors alpha_k of each layer, `shape` in FuxiCTR.
        layer_norm: normalise each output vector, real and imaginary parts separately.
        explicit_dropout: of log lambda_j and theta_j, `net_ex_dropout` in FuxiCTR.
        implicit_dropout: of r and p before W, `net_im_dropout` in FuxiCTR.

    Shape: (B, F, D) -> (B, num_orders[-1] * D).

    Raises:
        ValueError: num_orders is empty or has a number below 1.

    >>> tower = EulerNet((10, 10), num_orders=(52,), layer_norm=True)
    >>> tower.out_shape, sum(p.numel() for p in tower.parameters())
    ((520,), 54130)
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        num_orders: Sequence[int] = (52,),
        layer_norm: bool = False,
        explicit_dropout: float = 0.0,
        implicit_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not num_orders or any(number < 1 for number in num_orders):
            raise ArgumentError(f"num_orders must be one or more positive integers, got {tuple(num_orders)}")
        num_inputs, dim = in_shape
        self.in_shape = tuple(in_shape)
        self.out_shape = (num_orders[-1] * dim,)
        self.mu = nn.Parameter(torch.ones(num_inputs, 1))
        self.layers = nn.ModuleList()
        for num_outputs in num_orders:
            self.layers.append(
                EulerLayer(
                    num_inputs,
                    num_outputs,
                    dim,
                    layer_norm=layer_norm,
                    explicit_dropout=explicit_dropout,
                    implicit_dropout=implicit_dropout,
                )
            )
            num_inputs = num_outputs

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, num_orders[-1] * D)."""
        real, imag = self.mu * x_BFD.cos(), self.mu * x_BFD.sin()
        # The modulus of the fields is |mu_j| in every example, so that the first layer computes its products once.
        log_modulus = _log_modulus(self.mu.square()).expand(1, *self.in_shape)
        for position, layer in enumerate(self.layers):
            if position:
                log_modulus = _log_modulus(torch.addcmul(real.square(), imag, imag))
            real, imag = layer(real, imag, log_modulus)
        return (real + imag).flatten(1)


def _log_modulus(squared: Tensor) -> Tensor:
    return 0.5 * (squared + _EPS).log()


class EulerLayer(nn.Module):
    """One layer of `EulerNet`: K complex vectors of width D -> N of them.

    Shape: real and imaginary parts (B, K, D) and log moduli (B, K, D) or (1, K, D) -> real and imaginary (B, N, D).

    >>> layer = EulerLayer(2, 3, 4)
    >>> real, imag = layer(torch.ones(5, 2, 4), torch.zeros(5, 2, 4), torch.zeros(1, 2, 4))
    >>> real.shape, imag.shape
    (torch.Size([5, 3, 4]), torch.Size([5, 3, 4]))
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        dim: int,
        *,
        layer_norm: bool = False,
        explicit_dropout: float = 0.0,
        implicit_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape = (num_outputs, dim)
        exponents = torch.eye(num_inputs)
        if num_inputs != num_outputs:
            exponents = torch.softmax(torch.randn(num_outputs, num_inputs) / 0.01, dim=1)
        self.exponents = nn.Parameter(exponents)
        self.modulus_bias = nn.Parameter(0.01 * torch.randn(num_outputs, dim))
        self.phase_bias = nn.Parameter(0.01 * torch.randn(num_outputs, dim))
        self.implicit = nn.Linear(num_inputs * dim, num_outputs * dim)
        nn.init.xavier_uniform_(self.implicit.weight)
        self.real_norm = LayerNorm(dim) if layer_norm else nn.Identity()
        self.imag_norm = LayerNorm(dim) if layer_norm else nn.Identity()
        self.explicit_dropout = Dropout(explicit_dropout)
        self.implicit_dropout = Dropout(implicit_dropout)

    def forward(self, real: Tensor, imag: Tensor, log_modulus: Tensor) -> tuple[Tensor, Tensor]:
        """K complex vectors -> N complex vectors, all of width D."""
        phase = torch.atan2(imag, real)
        if self.training and self.explicit_dropout.p:
            log_modulus = log_modulus.expand_as(phase)  # each example loses others
        modulus = self._combine(self.explicit_dropout(log_modulus), self.modulus_bias).exp()
        phase = self._combine(self.explicit_dropout(phase), self.phase_bias)
        real = torch.addcmul(self._hidden(real), modulus, phase.cos())
        imag = torch.addcmul(self._hidden(imag), modulus, phase.sin())
        return self.real_norm(real), self.imag_norm(imag)

    def _combine(self, x: Tensor, bias: Tensor) -> Tensor:
        """sum_j alpha_kj x_j + b_k."""
        return torch.baddbmm(bias, self.exponents.expand(x.shape[0], -1, -1), x)

    def _hidden(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.implicit(self.implicit_dropout(x.flatten(1)))
        return torch.unflatten(hidden.relu(), 1, self.shape)
