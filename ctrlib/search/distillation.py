"""Fine-tuning of a compressed model towards the model that it came from.

Trained on with labels, a compressed model loses validation AUC: the original was stopped where its fit to train began
to hurt, and goes on from there. The original's own logits hold no noise of labels (G. Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from rich.console import Console
from torch import nn

from ctrlib.data.loader import Loader
from ctrlib.training.evaluate import evaluate


def distil(
    model: nn.Module,
    teacher: nn.Module,
    train: Loader,
    valid: Loader,
    *,
    epochs: int = 2,
    learning_rate: float = 1e-4,
    console: Console | None = None,
    choose: Callable[[dict[str, float]], float] = lambda scores: scores["auc"],
) -> float:
    """Minimise the squared difference of logits on train, by Adam with a cosine schedule, in place.

    The teacher may be a better model than what `model` came from: an `Ensemble` of several seeds, say.

    Both models are in evaluation mode: without dropout, and with the statistics of batch normalisation as they are. The
    model is left with the weights of the epoch that validation likes best, the start included; its validation AUC is
    returned.
    """
    console = console or Console(stderr=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * len(train)))
    model.eval(), teacher.eval()
    best, weights = choose(evaluate(model, valid, quick=True)), copy.deepcopy(model.state_dict())
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in train:
            with torch.no_grad():
                target = teacher(batch)
            loss = ((model(batch) - target).square() * batch.weights[:, None]).sum() / batch.weights.sum().clamp(min=1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        score = choose(evaluate(model, valid, quick=True))
        console.print(
            f"distilling, epoch {epoch}: squared difference of logits {total / len(train):.5f}, valid AUC {score:.6f}"
        )
        if score > best:
            best, weights = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return best
