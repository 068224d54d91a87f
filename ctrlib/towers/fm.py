"""Factorization machine: S. Rendle, "Factorization Machines", ICDM 2010, https://doi.org/10.1109/ICDM.2010.127."""

from __future__ import annotations

from torch import Tensor, nn


class FM(nn.Module):
    """sum_{i<j} <e_i, e_j> = 1/2 sum_d [ (sum_i e_id)^2 - sum_i e_id^2 ]  (eq. 5 and lemma 3.1), second order only.

    The first-order term is `ctrlib.Wide` and the bias is the head's. DeepFM (Guo et al., IJCAI 2017,
    https://arxiv.org/abs/1703.04247) is `Parallel(FM(s), MLP(s))` with `LinearHead(..., unweighted=1)` and `Wide`.

    Shape: (B, F, D) -> (B, 1).

    Raises:
        ValueError: there are fewer than two fields.

    >>> import torch
    >>> FM((3, 2))(torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]])).tolist()  # 2 + 0 + 3
    [[5.0]]
    """

    def __init__(self, in_shape: tuple[int, int]) -> None:
        super().__init__()
        if in_shape[0] < 2:
            raise ValueError(f"FM needs at least 2 fields to form a pair, got {in_shape[0]}: use MLP, or add a feature")
        self.in_shape = tuple(in_shape)
        self.out_shape = (1,)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, 1)."""
        square_of_sum = x_BFD.sum(1).square()
        sum_of_squares = x_BFD.square().sum(1)
        return 0.5 * (square_of_sum - sum_of_squares).sum(1, keepdim=True)
