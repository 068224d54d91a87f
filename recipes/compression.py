"""Bytes against AUC: one trained model made smaller in every way there is, on three data sets.

    python recipes/compression.py --data-set movielens_1m_ids --data DIR --out runs/ml32 --seed 1 [--record]

DCN V2 is trained as it is best, then its embeddings are compressed to a tenth and less: transform coding (fine-tuned
by distillation too), low rank, rows rounded to 16, 8, 4 and 2 bits, a frequency cut. Beside it, trained from scratch:
smaller widths, and tables whose rows are shared by ids (hashed, multiplexed, quotient and remainder). All bytes but
the network's count: rows or codes, decoders, remaps, scales. Nothing is chosen by its test AUC: every point is fixed
before. With --whole, tables and layers shrink together, and the small model is distilled from three seeds of the
original. OUT receives the trained models, so that a second call only compresses, and a picture.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib import plots
from ctrlib.embeddings.unified import proportional_rows
from ctrlib.search.bytes import bytes_of
from ctrlib.search.coding import transform_coding
from ctrlib.search.compression import Candidate, Head
from ctrlib.search.distillation import distil
from ctrlib.search.floors import frequency_cut, rounded_rows
from ctrlib.search.mimicking import apply_low_rank, low_rank
from ctrlib.search.plan import Plan, materialise
from ctrlib.search.ranks import Goal
from ctrlib.structure import describe
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.config import Training
from ctrlib.training.record import KEY, recorded
from ctrlib.training.run import score_once, sizes_of
from ctrlib.training.splits import load_splits
from records import record


@dataclass(frozen=True)
class Setting:
    """A data set, and how its uncompressed model is trained; chosen on validation."""

    config: dict[str, Any]
    training: dict[str, Any]
    ratios: tuple[float, ...]
    """How many times fewer bytes; the first is the claim, run with several seeds."""
    widths: tuple[int, ...] = field(default=())
    """Narrower tables, trained from scratch."""
    whole: tuple[float, float, int] | None = None
    """For the whole model: how many times fewer bytes of tables, and of layers, and epochs of distilling."""


TEACHERS = (1, 2, 3)
MLP = {"model": "dcnv2", "batch_norm": True}
SETTINGS = {
    "movielens_1m_ids": Setting(
        {**MLP, "embedding_dim": 32, "hidden": (400, 400), "dropout": 0.4},
        {"batch_size": 1024, "embedding_l2": 1e-4},
        ratios=(30, 10, 20, 40, 60),
        widths=(8, 4),
        whole=(20, 2.5, 4),
    ),
    "frappe_x1": Setting(
        {**MLP, "embedding_dim": 10, "hidden": (400, 400, 400), "dropout": 0.4, "num_cross_layers": 4},
        {"batch_size": 4096, "embedding_l2": 0.05},
        ratios=(8, 4, 6, 10),
        widths=(4, 2),
        whole=(8, 3.5, 8),
    ),
    # Ids are mostly seen once: one epoch, by the fused engine. 1.15 million rows.
    "criteo_synthetic": Setting(
        {
            **{**MLP, "embedding_dim": 16, "hidden": (256, 128), "dropout": 0.2, "num_cross_layers": 2},
            **{"stacked": 4},
        },
        {"engine": "fused", "batch_size": 4096, "embedding_learning_rate": 0.005},
        ratios=(20, 10, 40),
        widths=(4,),
    ),
}


@dataclass(frozen=True)
class Knobs:
    """Train a model, compress it in every way, report the test AUC of each."""

    data_set: Literal[tuple(SETTINGS)]  # type: ignore[valid-type]
    """Which data set."""
    data: Path
    """Its prepared folder (datasets/ has the scripts)."""
    out: Path
    """For trained models and the picture."""
    seed: int = 1
    """Of weights, order and dropout."""
    only_claim: bool = False
    """Only the first ratio, transform coding, and the uncompressed model."""
    whole: bool = False
    """Instead: tables and layers made smaller together, and distilled from three seeds of the original."""
    record: bool = False
    """Append to results.csv."""


def main(knobs: Knobs) -> None:
    """Train, compress, report."""
    keep_freed_memory()
    setting: Setting = SETTINGS[knobs.data_set]
    width = setting.config["embedding_dim"]
    engine = setting.training.get("engine", "exact")
    how = Training(seed=knobs.seed, **setting.training)
    config = {**setting.config, "training": dataclasses.asdict(how)}
    train, valid, test = load_splits(knobs.data, how)
    sample = Head(ctr.Loader(knobs.data, "train", batch_size=8192, shuffle=True, seed=knobs.seed), 400_000)
    tried: list[Candidate] = []

    def report(name: str, model: ctr.Model) -> None:
        scores, scored = score_once(model, valid, test)
        size = bytes_of(model)
        reached = (scores["valid_auc"], scores["valid_logloss"])
        tried.append(Candidate(series(name), size.embedding, size.total, *reached, row_error=float("nan")))
        result = {
            **scores,
            **sizes_of(model),
            "embedding_bytes": size.embedding,
            "samples_per_second": float("nan"),
            "engine": engine,
            "precision": "fp32",
            "seed": knobs.seed,
            "data_hash": train.schema.hash,
            "note": "",
            KEY: recorded(config, train.schema, scored, data=knobs.data, rows_hash=train.data_hash),
        }
        print(json.dumps({"model": f"dcnv2_{width} {name}", **result}), flush=True)
        plots.compression(tried, int(tried[0].embedding_bytes / setting.ratios[0]), knobs.out / f"{knobs.data_set}.png")
        if knobs.record:
            result["samples_per_second"] = ""
            record(result, Path(__file__).parent / "results.csv", data=knobs.data_set, model=f"dcnv2_{width} {name}")

    base = trained(knobs, setting, width)
    size = bytes_of(base).embedding
    if knobs.whole:
        assert setting.whole is not None, f"{knobs.data_set} has no setting for the whole model"
        ratio, layer_ratio, epochs = setting.whole
        smaller = materialise(base, transform_coding(base, sample, num_bytes=int(size / ratio)))
        layers = low_rank(smaller, train.schema, sample, layers=Goal(ratio=layer_ratio))
        smaller = apply_low_rank(smaller, layers)
        title = f"whole model x{round(bytes_of(base).total / bytes_of(smaller).total)}"
        report(title, smaller)
        teacher = ctr.Ensemble([trained(dataclasses.replace(knobs, seed=seed), setting, width) for seed in TEACHERS])
        distil(smaller, teacher, train, valid, epochs=epochs, learning_rate=3e-4)
        report(f"{title}, distilled from {len(TEACHERS)} seeds", smaller)
        config = {**setting.config, "replaced": describe(smaller)}
        ctr.save_model(smaller, config, knobs.data, knobs.out / f"{knobs.data_set}_whole_seed_{knobs.seed}")
        return
    report("uncompressed", base)
    for name, plan in plans(base, sample, size, setting.ratios[:1] if knobs.only_claim else setting.ratios, knobs):
        report(name, materialise(base, plan))
        if name == f"transform_coding x{setting.ratios[0]:g}":
            tuned = materialise(base, plan)
            distil(tuned, base, train, valid, epochs=1)
            report(f"{name}, distilled", tuned)
    if not knobs.only_claim:
        for narrower in setting.widths:
            report(f"width {narrower} from scratch", trained(knobs, setting, narrower))
        features, rows = train.schema.features, int(size / setting.ratios[1] / (4 * width))
        for name, tables in {
            "hashing": {"kind": "unified", "num_embeddings": proportional_rows(features, rows)},
            "multiplexed": {"kind": "unified", "num_embeddings": rows},
            "quotient_remainder": {"kind": "quotient_remainder", "num_embeddings": rows},
        }.items():
            title = f"{name} x{setting.ratios[1]:g}"
            report(f"{title} from scratch", trained(knobs, setting, width, title.replace(" ", "_"), tables=tables))


def series(name: str) -> str:
    """The method that a point belongs to: its name without sizes."""
    for pattern, short in ((r" x\d+", ""), (r"rows of \d+ bits", "rounded rows"), (r"width \d+", "narrower")):
        name = re.sub(pattern, short, name)
    return name


def trained(knobs: Knobs, setting: Setting, width: int, name: str = "", **changes: Any) -> ctr.Model:
    """The model of that width, with `changes` of the config that `name` stands for, from OUT if it is there."""
    folder = knobs.out / f"{knobs.data_set}_{name or f'width_{width}'}_seed_{knobs.seed}"
    config = {**setting.config, "embedding_dim": width, **changes}
    if changes:
        config.pop("stacked", None)  # what is shared by all features needs no stacks
    if not (folder / "model.safetensors").is_file():
        config["training"] = {"seed": knobs.seed, **setting.training}
        ctr.run(knobs.data, config, on_trained=lambda model: ctr.save_model(model, config, knobs.data, folder))
    model: Any = ctr.Predictor.load(folder).model
    return model


def plans(
    base: ctr.Model, sample: Head, size: int, ratios: tuple[float, ...], knobs: Knobs
) -> Iterator[tuple[str, Plan]]:
    """Every method at every ratio; rounded rows at sizes of their own."""
    for ratio in ratios:
        ways: dict[str, Callable[[int], Plan]] = {"transform_coding": transform_at(base, sample)}
        if not knobs.only_claim:
            ways |= {"frequency_cut": cut_at(base, sample), "low_rank": narrow_at(base, sample, knobs.data)}
        for name, way in ways.items():
            torch.manual_seed(knobs.seed)
            try:
                plan = way(int(size / ratio))
            except ValueError as error:
                print(f"{name} x{ratio:g} passed over: {error}", file=sys.stderr)
                continue
            yield f"{name} x{ratio:g}", plan
    if not knobs.only_claim:
        for bits in (16, 8, 4, 2):
            yield f"rows of {bits} bits", rounded_rows(base, bits)


def transform_at(base: ctr.Model, sample: Head) -> Callable[[int], Plan]:
    """Transform coding at a budget."""
    return lambda num_bytes: transform_coding(base, sample, num_bytes=num_bytes)


def narrow_at(base: ctr.Model, sample: Head, data: Path) -> Callable[[int], Plan]:
    """Narrower tables at a budget, of which the vectors of numbers and the wide part take their share."""
    size = bytes_of(base)
    others, schema = size.embedding - size.weights - size.remap - size.decoder, ctr.Schema.load(data)

    def narrow(num_bytes: int) -> Plan:
        found = low_rank(base, schema, sample, tables=Goal(num_bytes=num_bytes - others))
        return Plan.of("low_rank", apply_low_rank(base, found))

    return narrow


def cut_at(base: ctr.Model, sample: Head) -> Callable[[int], Plan]:
    """The frequency cut at a budget, rows in float16: twice as many as in float32."""
    return lambda num_bytes: frequency_cut(base, sample, num_bytes=num_bytes)


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
