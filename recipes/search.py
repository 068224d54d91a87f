"""What a search finds beside its floors, at equal bytes and from the same start.

    python recipes/search.py optfs --data-set frappe_x1 --data DIR --out runs/search --seed 1 [--record]

The untouched model, the method's, and models of as many bytes whose rows are chosen by how often train reads them, by
their norms in the trained untouched model, and by chance; for methods that search for widths also a random search with
as many evaluations. All are retrained by the same `fit`, chosen by validation, and reported on test once. `planted`
needs no DATA: half of its fields say nothing, and what a method keeps of them is printed. OUT receives all models, and
the untouched one is trained once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
import tyro
from tyro.conf import FlagCreatePairsOff, Positional

import ctrlib as ctr
from ctrlib import presets
from ctrlib.search.bytes import bytes_of
from ctrlib.search.floors import keep_rows, magnitudes, reads
from ctrlib.search.optembed import OptEmbed
from ctrlib.search.plan import materialise
from ctrlib.search.run import search_and_retrain, settings_of
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.exact import ExactEngine


@dataclass(frozen=True)
class Setting:
    """A data set, its model and training (as in its own recipe), and the methods' settings where they are not the
    defaults; those for MovieLens are a first guess."""

    config: dict[str, Any]
    training: dict[str, Any]
    methods: dict[str, dict[str, Any]]


# Thresholds that rise by 1e-4 in a step; fewer candidates than the paper's 600, on fewer rows.
OPTEMBED = {"alpha": 0.01, "threshold_learning_rate": 0.01, "epochs": 12, "generations": 8, "rows": 16_384}
SETTINGS = {
    "frappe_x1": Setting(
        {"preset": "deepfm", "embedding_dim": 10, "hidden": (400, 400, 400), "batch_norm": True, "dropout": 0.2},
        {"batch_size": 4096, "embedding_l2": 0.05, "learning_rate": 1e-3},
        {
            # 50 steps an epoch: a gate needs steps of 5e-3 to come from 1/2 to 0 in time.
            "optfs": {"penalty": 2e-5, "learning_rate": 5e-3},
            "optembed": {
                "alpha": 0.01,
                "threshold_learning_rate": 0.01,
                "rows": 16_384,
                "generations": 8,
                "epochs": 12,
            },
        },
    ),
    "movielens_1m_ids": Setting(
        {"preset": "deepfm", "embedding_dim": 16, "hidden": (400, 400), "batch_norm": True, "dropout": 0.4},
        {"batch_size": 1024, "embedding_l2": 1e-4, "learning_rate": 1e-3},
        {
            "optfs": {"penalty": 1e-5},
            "optembed": {
                "alpha": 0.01,
                "threshold_learning_rate": 0.01,
                "rows": 16_384,
                "generations": 8,
                "epochs": 12,
            },
        },
    ),
    "planted": Setting(
        {"preset": "fm", "embedding_dim": 16},
        {"batch_size": 1024, "embedding_l2": 0.0, "learning_rate": 1e-3},
        {"optfs": {"penalty": 2e-4, "temperature": 5000.0}},
    ),
}


@dataclass(frozen=True)
class Knobs:
    """Search, retrain, and train the floors of as many bytes."""

    method: Positional[Literal["optfs", "optembed", "dnis", "optinter"]]
    """How to search."""
    data_set: Literal[tuple(SETTINGS)]  # type: ignore[valid-type]
    """Which data set."""
    out: Path
    """For models, plans and pictures."""
    data: Path | None = None
    """Its prepared folder (datasets/ has the scripts); none for `planted`."""
    seed: int = 1
    """Of weights, order, dropout and the search."""
    epochs: int = 100
    """Of each training at most."""
    only_method: bool = False
    """Without the floors."""
    record: bool = False
    """Append to results.csv."""


def main(knobs: Knobs) -> None:
    """Train, search, report."""
    keep_freed_memory()
    setting: Setting = SETTINGS[knobs.data_set]
    data = knobs.data or planted(knobs.out / "planted_data")
    out = knobs.out / f"{knobs.data_set}_seed_{knobs.seed}"
    schema, training = ctr.Schema.load(data), setting.training
    batch_size, l2, rate = training["batch_size"], training["embedding_l2"], training["learning_rate"]
    settings = settings_of(
        knobs.method, {"embedding_l2": l2, "learning_rate": rate, **setting.methods.get(knobs.method, {})}
    )
    common: dict[str, Any] = {**training, "seed": knobs.seed, "max_epochs": knobs.epochs}

    def fresh() -> ctr.Model:
        torch.manual_seed(knobs.seed)
        return presets.build(setting.config, schema)

    def report(name: str, result: dict[str, Any]) -> None:
        line = {name: result[name] for name in ("valid_auc", "test_auc", "test_logloss", "embedding_bytes")}
        print(json.dumps({"model": f"{setting.config['preset']} {name}", **line}), flush=True)
        if knobs.record:
            known = {"samples_per_second": "", "engine": "exact", "precision": "fp32", "note": ""}
            row = {**known, **result, "seed": knobs.seed, "data_hash": schema.hash}
            model = f"{setting.config['preset']}_{setting.config['embedding_dim']} {name}"
            ctr.record(row, Path(__file__).parent / "results.csv", data=knobs.data_set, model=model)

    def search(name: str, settings: Any) -> dict[str, Any]:
        result = search_and_retrain(knobs.method, data, setting.config, out / name, settings=settings, **common)
        report(name, result)
        return result

    found = search(knobs.method, settings)
    for sentence in found["summary"]["words"]:
        print(sentence)
    if knobs.only_method:
        return
    if isinstance(settings, OptEmbed):
        budget = {"generations": 0, "parents": found["summary"]["candidates"]}
        search(f"{knobs.method}, random search", replace(settings, **budget))

    base = out / "untouched"
    if not (base / "result.json").is_file():
        _, result = ctr.run(
            data,
            lambda schema: presets.build(setting.config, schema),
            on_trained=lambda model: ctr.save_model(model, setting.config, data, base),
            **common,
        )
        (base / "result.json").write_text(ctr.to_json(result), encoding="utf-8")
    report("untouched", json.loads((base / "result.json").read_text(encoding="utf-8")))

    trained: Any = ctr.Predictor.load(base).model
    train = ctr.Loader(data, "train", batch_size=batch_size, shuffle=True, seed=knobs.seed)
    valid, test = (ctr.Loader(data, split, batch_size=2 * batch_size) for split in ("valid", "test"))
    generator = torch.Generator().manual_seed(knobs.seed)
    counts = reads(train, schema)
    floors = {
        "frequency cut": counts,
        "magnitude pruning": magnitudes(trained, schema),
        "random rows": {name: torch.rand(len(count), generator=generator) for name, count in counts.items()},
    }
    for name, scores in floors.items():
        model = fresh()
        plan = keep_rows(model, schema, scores, num_bytes=found["embedding_bytes"], method=name)
        smaller = materialise(model, plan)
        train.set_epoch(0)
        torch.manual_seed(knobs.seed)
        ctr.fit(ExactEngine(smaller, learning_rate=rate, embedding_l2=l2), train, valid, max_epochs=knobs.epochs)
        scored = {split: ctr.evaluate(smaller, part, quick=True) for split, part in (("valid", valid), ("test", test))}
        result = {
            "valid_auc": scored["valid"]["auc"],
            "test_auc": scored["test"]["auc"],
            "test_logloss": scored["test"]["log_loss"],
            "parameters": sum(smaller.num_parameters().values()),
            "network_parameters": smaller.num_parameters()["network"],
            "embedding_bytes": bytes_of(smaller).embedding,
        }
        report(f"{name} to the bytes of {knobs.method}", result)


def planted(folder: Path, *, num_rows: int = 200_000, seed: int = 2024) -> Path:
    """10 fields of 20 values that move the logit and 10 of 2,000 that do not; 8:1:1. Prepared, if it is not there."""
    if (folder / "schema.json").is_file():
        return folder
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(10, 20)) * 0.6
    informative, noise = rng.integers(0, 20, (num_rows, 10)), rng.integers(0, 2000, (num_rows, 10))
    logits = effects[np.arange(10), informative].sum(1)
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    test = slice(num_rows * 9 // 10, None)
    print(f"planted: Bayes AUC of test {ctr.metrics.auc(labels[test], logits[test]):.4f}")
    columns = {f"informative_{field}": informative[:, field] for field in range(10)}
    columns |= {f"noise_{field}": noise[:, field] for field in range(10)}
    frame = pl.DataFrame({**columns, "label": labels})
    splits = {
        "train": frame[: num_rows * 8 // 10],
        "valid": frame[num_rows * 8 // 10 : num_rows * 9 // 10],
        "test": frame[test],
    }
    ctr.prepare(splits, folder, features=[ctr.Categorical(name) for name in columns], labels="label", log=None)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
