"""What a search decides, as data: which parts of a model give way to which smaller ones, with their weights."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ctrlib.errors import ArgumentError
from ctrlib.making import new_file
from ctrlib.manifest import refuse_pickle
from ctrlib.model import Model
from ctrlib.structure import describe, restructure


@dataclass(frozen=True)
class Plan:
    """Parts to replace, with what takes their places.

    `method`: what found it. `replaced`: path of a part -> {"kind": ..., **arguments} as in `ctrlib.structure`, which
    goes into the config of a saved model. `weights`: their tensors, by the names that they have in the model.
    `summary`: figures to print.
    """

    method: str
    replaced: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]
    summary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, method: str, smaller: Model, summary: dict[str, Any] | None = None) -> Plan:
        """What made a model smaller, from the model itself: all of its parts that are not the published model's."""
        replaced = describe(smaller)
        weights = {
            name: tensor
            for name, tensor in smaller.state_dict().items()
            if any(name.startswith(f"{path}.") for path in replaced)
        }
        return cls(method, replaced, weights, summary or {})

    def save(self, path: str | Path) -> None:
        """Write the plan into one safetensors file."""
        text = {"method": self.method, "replaced": json.dumps(self.replaced), "summary": json.dumps(self.summary)}
        text["sha256"] = _sha256(text, self.weights)
        content = save({name: tensor.contiguous() for name, tensor in self.weights.items()}, metadata=text)
        with new_file(path) as making:  # `save_file` has a file of its own beside it, which a kill would leave
            making.write_bytes(content)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            ValueError: it is not a plan.
        """
        try:
            with safe_open(str(path), "pt") as file:
                text = file.metadata() or {}
            weights, sha256 = load_file(str(path)), text.pop("sha256", None)
            if sha256 is not None and sha256 != _sha256(text, weights):
                raise ArgumentError("damaged: its sha256 differs")
            return cls(text["method"], json.loads(text["replaced"]), weights, json.loads(text["summary"]))
        except (SafetensorError, KeyError, ValueError) as error:
            refuse_pickle(Path(path))
            raise ArgumentError(f"{path} is not a plan ({error!r}): expected a file that Plan.save wrote") from error


def _sha256(text: dict[str, str], weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([text["method"], text["replaced"], text["summary"]]).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def materialise(model: Model, plan: Plan) -> Model:
    """A copy of the model, physically smaller: parts replaced as the plan says, all else as it was.

    Raises:
        ValueError: the plan is not of this model.
    """
    # A deep copy, but for the parts that go: those may be large.
    parts = dict(model.named_modules())
    if missing := sorted(set(plan.replaced) - set(parts)):
        raise ArgumentError(f"the plan ({plan.method}) is not of this model, which has no {missing}")
    memo: dict[int, Any] = {id(parts[path]): None for path in plan.replaced}
    smaller = copy.deepcopy(model, memo)
    restructure(smaller, plan.replaced)
    expected = smaller.state_dict()
    unfit = sorted(
        name for name, tensor in plan.weights.items() if name not in expected or expected[name].shape != tensor.shape
    )
    unfit += sorted(n for n in expected if any(n.startswith(f"{p}.") for p in plan.replaced) and n not in plan.weights)
    if unfit:
        raise ArgumentError(f"the plan ({plan.method}) is not of this model: {unfit[:5]} do not fit")
    smaller.load_state_dict(plan.weights, strict=False)
    return smaller.train(model.training)
