"""A network as one function of tensors, for scoring: the same operations in the same order, without its modules.

A call of a module takes several microseconds beside the operation that it leads to. For one row, the fifteen modules of
a cross network beside an MLP take longer than all their matrix products. So the operations are recorded once, as
torch.fx does, and run from the record. The record reads parameters and buffers where the modules have them, so it is
never out of date.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.fx import Graph, Proxy
from torch.fx.proxy import GraphAppendingTracer

OWN = ("ctrlib", "torch")  # whose modules compute the same from the same tensors: nothing else of a call is recorded


def flat(network: nn.Module) -> Callable[[Any], Any] | None:
    """What computes `network(x)` to the bit, as it is now: in evaluation, and without autocast.

    Its modules must not be in use elsewhere meanwhile. (`torch.fx.symbolic_trace` would ask that of all modules of the
    process, whose class it changes while it traces.)

    Returns:
        None where there is no such function, and the network is to be called: it is in training, has hooks, holds
        modules of others, or decides by the values of tensors or by the number of rows.

    >>> import torch
    >>> network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True)).eval()
    >>> x = torch.randn(5, 3)
    >>> torch.equal(flat(network)(x), network(x))
    True
    """
    parts = list(network.modules())
    if any(part.training or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return None
    if any(type(part).__module__.partition(".")[0] not in OWN for part in parts):
        return None
    graph, tensors = Graph(), SimpleNamespace()
    recorder = GraphAppendingTracer(graph)
    x = Proxy(graph.placeholder("x"), recorder)
    # What stands in for attributes meanwhile. An attribute of the instance goes before what a module keeps elsewhere.
    stand_ins: list[tuple[nn.Module, str]] = []
    try:
        for part in parts:
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                key = f"tensor_{len(stand_ins)}"
                setattr(tensors, key, tensor)
                part.__dict__[name] = Proxy(graph.create_node("get_attr", key), recorder)
                stand_ins.append((part, name))
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):  # whose number of axes the layers before it decide
                part.__dict__["_check_input_dim"] = lambda x: None
                stand_ins.append((part, "_check_input_dim"))
        graph.output(recorder.create_arg(network(x)))
    except Exception:  # whatever a module does that cannot be recorded: it runs as it is
        return None
    finally:
        for part, name in stand_ins:
            part.__dict__.pop(name, None)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return functools.partial(names["forward"], tensors)
