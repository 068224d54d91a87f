"""Three tasks that are planted to be in each other's way: what a shared bottom loses, and who wins it back.

    python recipes/planted_conflict.py --model shared_bottom --seed 1 [--report runs/conflict] [--record]
    python recipes/planted_conflict.py --model single_task --label label_1

The data is `ctrlib.data.synthetic.conflict`: 60,000 rows, 8:1:1, whose best possible AUC is known. Each task's path has
4 hidden units, enough for one task and too few for three. `--record` appends a row for each label; `--report` compares
each with a model of its own (`ctrlib.training.transfer`).

Width 8, batch 512, Adam 1e-2, learning rate x 0.1 on plateau of the mean validation AUC, patience 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib import presets
from ctrlib.data.synthetic import conflict

LABELS = ("label_1", "label_2", "label_3")
BOTTOM = {"preset": "shared_bottom", "bottom_hidden": (4,), "tower_hidden": ()}
EXPERTS = {"expert_hidden": (4,), "tower_hidden": ()}

# Everything in which the variants differ: the preset and its arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "single_task": BOTTOM,
    "shared_bottom": BOTTOM,
    "mmoe": {"preset": "mmoe", **EXPERTS, "num_experts": 4},
    "cgc": {"preset": "ple", **EXPERTS, "num_levels": 1, "num_own": 1, "num_shared": 1},
    "ple": {"preset": "ple", **EXPERTS, "num_levels": 2, "num_own": 1, "num_shared": 1},
    "stem": {"preset": "stem", **EXPERTS},
    # A shared bottom, which is MMoE with one expert, behind refined fields: no more hidden units than the bottom alone.
    "shared_bottom_refined": {"preset": "mmoe", **EXPERTS, "num_experts": 1, "refine": True},
}


@dataclass(frozen=True)
class Knobs:
    """Train one model on three tasks in conflict and report its test AUC once, label by label."""

    model: Literal[tuple(VARIANTS)] = "shared_bottom"  # type: ignore[valid-type]
    """Which variant."""
    label: str | None = None
    """One label, for `single_task`."""
    data: Path = Path(__file__).parent.parent / "data" / "planted_conflict"
    """Prepared folder, made first if it does not exist; beside it one for each label."""
    report: Path | None = None
    """Folder for transfer.json and transfer.png; a model of each label alone is trained for it as well."""
    seed: int = 1
    """Of initial weights and shuffle."""
    record: bool = False
    """Append the result to results.csv."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report.

    Raises:
        SystemExit: `single_task` is asked for several labels or for a report, or another model for one label.
    """
    if (knobs.model == "single_task") != (knobs.label in LABELS) or (knobs.label and knobs.report):
        raise SystemExit(f"single_task, and only that, takes a --label of {', '.join(LABELS)}, and no --report")
    model, folder, result = _train(knobs)
    print(ctr.to_json(result))
    if knobs.record:
        valid = ctr.evaluate(model, ctr.Loader(folder, "valid", batch_size=8192), quick=True)
        alone = {"auc": result["test_auc"], "log_loss": result["test_logloss"]}
        labels = [knobs.label] if knobs.label else LABELS
        for of_valid, of_test, label in zip(valid.get("tasks", [valid]), result.get("test_tasks", [alone]), labels):
            scores = {"valid_auc": of_valid["auc"], "test_auc": of_test["auc"], "test_logloss": of_test["log_loss"]}
            path = Path(__file__).parent / "results.csv"
            ctr.record({**result, **scores}, path, data=f"planted_conflict, {label}", model=knobs.model)
    if knobs.report:
        singles = [_train(dataclasses.replace(knobs, model="single_task", label=label))[:2] for label in LABELS]
        pairs = [(model, folder), *singles]
        found = [ctr.predict(trained, ctr.Loader(where, "test", batch_size=8192)) for trained, where in pairs]
        valid_batches = list(ctr.Loader(folder, "valid", batch_size=512))
        report = {
            "tasks": ctr.compare_tasks(found[0], found[1:], tasks=LABELS),
            "gradients": ctr.gradient_cosines(model, valid_batches),
            "gates": ctr.gate_usage(model, valid_batches),
        }
        knobs.report.mkdir(parents=True, exist_ok=True)
        (knobs.report / "transfer.json").write_text(ctr.to_json(report, indent=1) + "\n", encoding="utf-8")
        ctr.draw_transfer(report, knobs.report / "transfer.png")


def _train(knobs: Knobs) -> tuple[ctr.Model, Path, dict[str, Any]]:
    """The trained model, its prepared folder, and what `run` found."""
    folder = knobs.data.with_name(knobs.data.name + (f"_{knobs.label}" if knobs.label else ""))
    if not folder.exists():
        frame, logits = conflict(60_000, num_tasks=len(LABELS))
        labels = [knobs.label] if knobs.label else list(LABELS)
        best = ", ".join(f"{ctr.metrics.auc(frame[name], z):.4f}" for name, z in zip(LABELS, logits.T))
        ctr.prepare(
            frame.drop(set(LABELS) - set(labels)),
            folder,
            features=[ctr.Categorical(name) for name in frame.columns[len(LABELS) :]],
            labels=labels,
            note=f"synthetic: the best possible AUC of the three labels is {best}",
        )
    config = {"embedding_dim": 8, **VARIANTS[knobs.model]}
    model, result = ctr.run(
        folder,
        lambda schema: presets.build(config, schema),
        batch_size=512,
        learning_rate=1e-2,
        seed=knobs.seed,
        device="cpu",
    )
    return model, folder, result


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
