"""Does a task gain or lose by being trained with others? Each task beside a model of its own, and where it comes from.

    report = {
        "tasks": compare_tasks(predict(model, test), [predict(one, test) for one in singles], tasks=labels),
        "gradients": gradient_cosines(model, valid),
        "gates": gate_usage(model, valid),
    }
    plots.transfer(report, "transfer.png")

A difference counts only if an interval of it, over resampled rows of the same test set, leaves 0 out. Training again
with another seed moves both models, which no interval over rows shows: compare several seeds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.errors import ArgumentError
from ctrlib.losses import binary_cross_entropy
from ctrlib.model import Model
from ctrlib.training.evaluate import Scores

Floats = npt.NDArray[np.float64]
Report = dict[str, Any]


def compare_tasks(
    multi: Scores,
    singles: Sequence[Scores],
    *,
    tasks: Sequence[str],
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Report]:
    """Each task's AUC in a model of all tasks and in one of its own, with a paired bootstrap interval.

    Rows are resampled with replacement, or whole groups (users, say) where the scores have them, and both models are
    scored on the same resamples. `verdict` is "gains" or "loses" where the interval of multi - single leaves 0 out.

    Args:
        multi: of the model of all T tasks.
        singles: of the T models of one task, on the same rows in the same order.
        tasks: names of the labels.
        num_resamples: of the bootstrap.
        confidence: of the interval.
        seed: of the resamples.

    Raises:
        ValueError: the numbers of models and names differ, rows or labels are not the same, or a task has one class
            only.

    >>> labels, good = np.array([[0.0], [1.0]] * 50, np.float32), np.arange(100.0)[:, None] % 2
    >>> noise = np.random.default_rng(0).random((100, 1))
    >>> scored = [Scores(logits, labels, np.ones(100), None) for logits in (good, noise)]
    >>> (task,) = compare_tasks(scored[0], [scored[1]], tasks=["click"])
    >>> task["verdict"], task["multi_auc"]
    ('gains', 1.0)
    """
    if len(singles) != len(tasks) or multi.labels.shape[1] != len(tasks):
        raise ArgumentError(
            f"expected a model of its own for each of {len(tasks)} tasks {tuple(tasks)}, got {len(singles)}, and a "
            f"model of {multi.labels.shape[1]} tasks beside"
        )
    found = []
    for task, (name, single) in enumerate(zip(tasks, singles)):
        labels = multi.labels[:, task]
        if single.logits.shape[1] != 1 or not np.array_equal(single.labels[:, 0], labels, equal_nan=True):
            raise ArgumentError(
                f"{name}: expected a model of this label alone, scored on the same rows; got one of "
                f"{single.logits.shape[1]} labels, or other rows"
            )
        keep = ~np.isnan(labels) & (multi.weights > 0)
        positive = labels[keep] == 1
        if positive.all() or not positive.any():
            raise ArgumentError(f"{name}: the rows hold one class only, so its AUC is undefined: use more rows")
        groups = np.arange(keep.sum()) if multi.groups is None else multi.groups[keep]
        cluster = np.unique(groups, return_inverse=True)[1]
        weights = multi.weights[keep].astype(np.float64)
        models = [_Ranked.of(positive, logits[keep]) for logits in (multi.logits[:, task], single.logits[:, 0])]
        multi_auc, single_auc = (model.auc(weights) for model in models)
        rng = np.random.default_rng([seed, task])
        differences = []
        for _ in range(num_resamples):
            counts = np.bincount(rng.integers(0, cluster.max() + 1, cluster.max() + 1), minlength=cluster.max() + 1)
            resampled = weights * counts[cluster]
            differences.append(models[0].auc(resampled) - models[1].auc(resampled))
        low, high = np.nanquantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
        found.append(
            {
                "task": name,
                "rows": int(keep.sum()),
                "positives": int(positive.sum()),
                "multi_auc": multi_auc,
                "single_auc": single_auc,
                "difference": multi_auc - single_auc,
                "interval": [low, high],
                "verdict": "gains" if low > 0 else "loses" if high < 0 else "no difference shown",
            }
        )
    return found


@dataclass(frozen=True)
class _Ranked:
    """Rows in the order of their scores, so that an AUC under new weights costs no new sort."""

    order: npt.NDArray[np.int64]
    positive: npt.NDArray[np.bool_]  # in that order
    starts: npt.NDArray[np.int64]  # of runs of equal scores

    @classmethod
    def of(cls, positive: npt.NDArray[np.bool_], scores: npt.NDArray[Any]) -> _Ranked:
        order = np.argsort(scores, kind="stable")
        ordered = scores[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        return cls(order, positive[order], starts)

    def auc(self, weights: Floats) -> float:
        """P(positive above negative) + P(tie) / 2; NaN if a class has no weight."""
        weights = weights[self.order]
        positives = np.add.reduceat(weights * self.positive, self.starts)
        negatives = np.add.reduceat(weights * ~self.positive, self.starts)
        pairs = positives.sum() * negatives.sum()
        below = negatives.cumsum() - negatives / 2
        return float(positives @ below / pairs) if pairs else float("nan")


def gradient_cosines(model: Model, batches: Iterable[Batch]) -> Report:
    """How far the gradients of the tasks' losses agree where both reach: on tables ("embedding") and "network".

    For each, over batches: the mean `cosine` of each pair of tasks (T, T), and the share of batches in which it is
    negative, `conflicts`. A pair without common weights has NaN: nothing of one task can hurt the other there.

    Raises:
        ValueError: there is no batch.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_batch, example_schema
    >>> schema = example_schema(2)
    >>> model = models.shared_bottom(Inputs(schema, embedding_dim=4))
    >>> np.array(gradient_cosines(model, [example_batch(schema, 8)])["network"]["cosine"]).shape
    (2, 2)
    """
    network = {id(parameter) for part in model.network() for parameter in part.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = {
        "embedding": [n for n, parameter in enumerate(trained) if id(parameter) not in network],
        "network": [n for n, parameter in enumerate(trained) if id(parameter) in network],
    }
    was_training = model.training
    model.eval()
    cosines: dict[str, list[Floats]] = {part: [] for part in parts}
    for batch in batches:
        logits, labels = model(batch), batch.labels
        gradients = []
        for task in range(labels.shape[1]):
            loss = binary_cross_entropy(logits[:, task : task + 1], labels[:, task : task + 1], batch.weights)
            gradients.append(torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True))
        for part, members in parts.items():
            cosines[part].append(_cosines([[gradient[n] for n in members] for gradient in gradients]))
    model.train(was_training)
    if not cosines["network"]:
        raise ArgumentError("there is nothing to differentiate: the loader gave no batch")
    return {
        part: {
            "cosine": np.mean(values, axis=0).tolist(),
            "conflicts": np.where(np.isnan(values[0]), np.nan, np.mean(np.array(values) < 0, axis=0)).tolist(),
        }
        for part, values in cosines.items()
    }


def _cosines(gradients: Sequence[Sequence[Tensor]]) -> Floats:
    """Of each pair of tasks, over the weights that get a gradient from both."""
    num_tasks = len(gradients)
    cosines = np.full((num_tasks, num_tasks), np.nan)
    for a, b in itertools.product(range(num_tasks), repeat=2):
        both = [(x != 0) & (y != 0) for x, y in zip(gradients[a], gradients[b])]
        x, y = (
            torch.cat([gradient[mask] for gradient, mask in zip(gradients[task], both)] or [torch.empty(0)])
            for task in (a, b)
        )
        if x.numel():
            cosines[a, b] = nn.functional.cosine_similarity(x, y, dim=0).item()
    return cosines


def gate_usage(model: Model, batches: Iterable[Batch]) -> Report:
    """What each task's gates open, part by part of the model that has `gate_weights` (MMoE, PLE, STEM, DTRN, APEM).

    For each: the mean weight (T, E), E experts, fields or patterns, and for weights that sum to 1 the mean `entropy`
    (T,) as a share of log E: 0 where one expert is chosen, 1 where all count alike.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_batch, example_schema
    >>> schema = example_schema(2)
    >>> model = models.mmoe(Inputs(schema, embedding_dim=4), num_experts=3)
    >>> usage = gate_usage(model, [example_batch(schema, 8)])
    >>> [round(sum(task), 4) for task in usage["head"]["mean"]]
    [1.0, 1.0]
    """
    seen: dict[str, list[Tensor]] = {}

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        weights = module.gate_weights(*inputs)  # type: ignore[operator]
        seen.setdefault(name, []).append(weights.float())

    hooks = [
        module.register_forward_pre_hook(functools.partial(look, name))
        for name, module in model.named_modules()
        if hasattr(module, "gate_weights")
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    usage: Report = {}
    for name, parts in seen.items():
        weights_TBE = torch.cat(parts, dim=1)
        usage[name] = {"mean": weights_TBE.mean(1).tolist()}
        if torch.allclose(weights_TBE.sum(2), torch.ones(())):
            entropy = torch.special.entr(weights_TBE).sum(2).mean(1) / np.log(max(weights_TBE.shape[2], 2))
            usage[name]["entropy"] = entropy.tolist()
    return usage


def step_scores(scores: Scores) -> Scores:
    """Scores of steps given the one before, from scores of all steps up to each: CTR and CVR from CTR and CTCVR.

    The CVR is p(CTCVR) / p(CTR) and its label is known in clicked rows alone, so that `score` of the result gives the
    clicked-only AUC. Where a model holds a later step likelier than an earlier one, the CVR is held to be 1 - 1e-7.

    >>> logit = np.log([[0.5 / 0.5, 0.1 / 0.9]])
    >>> scores = Scores(logit, np.array([[0.0, 0.0]]), np.ones(1), None)
    >>> steps = step_scores(scores)
    >>> round(float(1 / (1 + np.exp(-steps.logits[0, 1]))), 6), steps.labels.tolist()
    (0.2, [[0.0, nan]])
    """
    logits = scores.logits.astype(np.float64)
    log_p = -np.logaddexp(0, -logits)
    log_q = np.minimum(np.diff(log_p, axis=1), np.log1p(-1e-7))
    steps = np.concatenate([logits[:, :1], log_q - np.log(-np.expm1(log_q))], axis=1)
    labels = scores.labels.copy()
    labels[:, 1:] = np.where(scores.labels[:, :-1] == 1, labels[:, 1:], np.nan)
    return replace(scores, logits=steps, labels=labels)
