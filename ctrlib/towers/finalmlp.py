"""FinalMLP: K. Mao et al., "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction", AAAI 2023,
https://arxiv.org/abs/2304.00902."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import Hidden, init_linear, through


class FinalMLP(nn.Module):
    """[o_1, o_2, sum_k o_1k^T W_k o_2k] with o_s = MLP_s(2 sigma(Gate_s(c_s)) * e): two gated streams and their fusion.

    `LinearHead(tower.out_shape, unweighted=1)` makes it the logit b + w_1^T o_1 + w_2^T o_2 + sum_k o_1k^T W_k o_2k.
    The paper has a bias for each head k, FuxiCTR one for each stream: they add up to b. All labels share the fusion.

    Field positions are the caller's. The streams read the first `num_fields` fields (all by default); gate s is driven
    by the fields at `contexts[s]`, which the paper looks up in tables of their own: append them behind the ordinary
    fields. An empty context is a learnable vector, the same for all rows; `contexts=None` leaves the gates out.

    That vector starts as N(0, 0.01^2). FuxiCTR starts it at zero (`zero_context`): with zero biases and ReLU'(0) = 0 no
    gradient reaches any weight of its gate but the last bias: one scale for each input is all that it can learn.
    The paper's DualMLP, without gates and fusion, is `Parallel(MLP(s), MLP(s))`.

    Shape: (B, F, D) -> (B, hidden_1[-1] + hidden_2[-1] + 1), the fusion last.

    Raises:
        ValueError: `num_heads` does not divide a stream's output, a context is not a field, or a field is never read.

    >>> tower = FinalMLP((4, 8), num_fields=3, contexts=((3,), ()), hidden_1=(6,), hidden_2=(4,), num_heads=2)
    >>> tower.out_shape, tower.fusion.weight.shape
    ((11,), torch.Size([2, 3, 2]))
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        hidden_1: Sequence[int] = (400, 400, 400),
        hidden_2: Sequence[int] = (400, 400, 400),
        batch_norm_1: bool = False,
        batch_norm_2: bool = False,
        dropout_1: float = 0.0,
        dropout_2: float = 0.0,
        num_heads: int = 1,
        contexts: tuple[Sequence[int], Sequence[int]] | None = ((), ()),
        gate_hidden: Sequence[int] = (800,),
        num_fields: int | None = None,
        zero_context: bool = False,
    ) -> None:
        super().__init__()
        total, field_dim = in_shape
        self.num_fields = total if num_fields is None else num_fields
        _check_positions(total, self.num_fields, contexts)
        width = self.num_fields * field_dim
        self.in_shape = tuple(in_shape)
        self.gates = None
        if contexts is not None:
            self.gates = nn.ModuleList(
                _Gate(field_dim, width, context=context, hidden=gate_hidden, zero_context=zero_context)
                for context in contexts
            )
        self.stream_1 = Hidden(width, hidden_1, batch_norm=batch_norm_1, dropout=dropout_1)
        self.stream_2 = Hidden(width, hidden_2, batch_norm=batch_norm_2, dropout=dropout_2)
        self.fusion = BilinearFusion((hidden_1[-1], hidden_2[-1]), num_heads=num_heads)
        self.out_shape = (hidden_1[-1] + hidden_2[-1] + 1,)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, hidden_1[-1] + hidden_2[-1] + 1)."""
        return torch.cat(self.forward_parts(x_BFD), dim=1)

    def forward_parts(self, x_BFD: Tensor) -> list[Tensor]:
        """What `forward` concatenates, for a head that can do without (`LinearHead.of_parts`)."""
        # Only when needed: the gradient of a slice fills a tensor of the fields' size.
        fields = x_BFD if self.num_fields == self.in_shape[0] else x_BFD[:, : self.num_fields]
        if self.gates is None:
            h_1 = h_2 = fields.flatten(1)
        else:
            doubled = (2 * fields).flatten(1)  # once for both streams, where doubling the gates would be twice
            h_1, h_2 = (doubled * gate(x_BFD) for gate in self.gates)
        o_1, o_2 = self.stream_1(h_1), self.stream_2(h_2)
        return [o_1, o_2, self.fusion(o_1, o_2)]


class BilinearFusion(nn.Module):
    """sum_k o_1k^T W_k o_2k over K = `num_heads` chunks of both inputs: a block-diagonal bilinear form, K = 1 the full.

    W_k in R^{(n_1 / K) x (n_2 / K)} starts at FuxiCTR's scale, Xavier-normal of the flattened weights.

    Shape: (B, n_1), (B, n_2) -> (B, 1).

    Raises:
        ValueError: `num_heads` does not divide both widths.

    >>> fusion = BilinearFusion((4, 2), num_heads=2)
    >>> with torch.no_grad():
    ...     _ = fusion.weight.copy_(torch.tensor([[[0.1], [0.2]], [[0.3], [0.4]]]))
    >>> round(fusion(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, -1.0]])).item(), 6)  # .5 * 1 + 2.5 * -1
    -2.0
    """

    def __init__(self, widths: tuple[int, int], *, num_heads: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or any(width % num_heads for width in widths):
            raise ArgumentError(
                f"num_heads must divide the output of both streams, got num_heads={num_heads} and widths {widths}: "
                "change num_heads or the last hidden width"
            )
        self.shape = (num_heads, widths[0] // num_heads, widths[1] // num_heads)
        self.weight = nn.Parameter(torch.empty(self.shape))
        nn.init.normal_(self.weight, std=(2 / (self.weight.numel() + 1)) ** 0.5)

    def forward(self, o_1: Tensor, o_2: Tensor) -> Tensor:
        """(B, n_1), (B, n_2) -> (B, 1)."""
        num_heads, n_1, n_2 = self.shape
        o_1_KBn = o_1.view(-1, num_heads, n_1).transpose(0, 1)
        o_2_KBn = o_2.view(-1, num_heads, n_2).transpose(0, 1)
        return (torch.bmm(o_1_KBn, self.weight) * o_2_KBn).sum((0, 2)).unsqueeze(1)


class _Gate(nn.Module):
    """sigma(W_2 ReLU(W_1 c + b_1) + b_2): (B, F, D) -> (B, num_outputs), or (1, num_outputs) for an empty context."""

    positions: Tensor

    def __init__(
        self, field_dim: int, num_outputs: int, *, context: Sequence[int], hidden: Sequence[int], zero_context: bool
    ) -> None:
        super().__init__()
        num_inputs = field_dim * max(1, len(context))
        self.layers = nn.Sequential(Hidden(num_inputs, hidden), nn.Linear(hidden[-1], num_outputs), nn.Sigmoid())
        self.vector = None if context else nn.Parameter(torch.zeros(1, field_dim))
        if self.vector is not None and not zero_context:
            nn.init.normal_(self.vector, std=0.01)
        self.register_buffer("positions", torch.tensor(context, dtype=torch.int64), persistent=False)
        init_linear(self)

    def forward(self, x_BFD: Tensor) -> Tensor:
        c = x_BFD.index_select(1, self.positions).flatten(1) if self.vector is None else self.vector
        return through(self.layers, c)


def _check_positions(total: int, num_fields: int, contexts: tuple[Sequence[int], Sequence[int]] | None) -> None:
    if not 1 <= num_fields <= total:
        raise ArgumentError(f"num_fields must be between 1 and the {total} fields of in_shape, got {num_fields}")
    if contexts is not None and len(contexts) != 2:
        raise ArgumentError(
            f"contexts must be two lists of field positions, one for each stream, or None for no gates, got {contexts}"
        )
    read = {position for context in contexts or () for position in context}
    if outside := sorted(position for position in read if not 0 <= position < total):
        raise ArgumentError(f"contexts must be positions of the {total} fields, 0 to {total - 1}, got {outside}")
    if unread := sorted(set(range(num_fields, total)) - read):
        raise ArgumentError(
            f"fields {unread} are read by no stream and no gate: name them in contexts, or set num_fields={total}"
        )
