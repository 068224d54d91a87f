"""Checks that the reference tests of several towers share: tracing, export, and bfloat16 autocast."""

from __future__ import annotations

import torch
from torch import nn


def check_traced_and_exported(tower: nn.Module) -> None:
    """A trace by torch.fx and an export with a dynamic batch give what the tower gives, at another batch size."""
    tower.eval()
    traced = torch.fx.symbolic_trace(tower)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(tower, (torch.randn(5, *tower.in_shape),), dynamic_shapes=batch).module()
    x = torch.randn(11, *tower.in_shape)
    torch.testing.assert_close(traced(x), tower(x))
    torch.testing.assert_close(exported(x), tower(x))


def check_autocast(tower: nn.Module, *, backward_inside: bool) -> None:
    """Under bfloat16 autocast, outputs and all gradients are those of float32 within 2 %."""
    x = torch.randn(16, *tower.in_shape, requires_grad=True)
    expected = tower(x)
    direction = torch.randn_like(expected)
    inputs = [x, *tower.parameters()]
    gradients = torch.autograd.grad(expected, inputs, direction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tower(x).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_inside):
        rounded = torch.autograd.grad(got, inputs, direction)
    for a, b in zip((got, *rounded), (expected, *gradients), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
