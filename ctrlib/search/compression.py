"""Make a trained model small enough: try what applies, choose by validation, fine-tune, report test once."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ctrlib import plots
from ctrlib._lock import holding
from ctrlib._target import check_target
from ctrlib.data.loader import Loader
from ctrlib.errors import ArgumentError, WrongTypeError, check_path, shown
from ctrlib.model import Ensemble, Model
from ctrlib.search.bytes import bytes_of
from ctrlib.search.coding import transform_coding
from ctrlib.search.distillation import distil
from ctrlib.search.floors import frequency_cut, rounded_rows
from ctrlib.search.mimicking import apply_low_rank, low_rank
from ctrlib.search.plan import Plan, materialise
from ctrlib.search.ranks import Goal
from ctrlib.search.row_errors import row_errors
from ctrlib.search.settings import check_settings
from ctrlib.serving.model_folder import model_in_the_making
from ctrlib.serving.predictor import Predictor
from ctrlib.sharding.plan import TABLES
from ctrlib.structure import KINDS, describe
from ctrlib.training.config import Training
from ctrlib.training.evaluate import evaluate
from ctrlib.training.record import KEY, recorded
from ctrlib.training.run import score_once, sizes_of, write_result
from ctrlib.training.splits import load_splits

SMALLER = tuple(KINDS.values())  # what tables have given way to in a model that was made smaller already
SAMPLE_ROWS = 400_000  # of train, to see how tables are used


@dataclass(frozen=True)
class Candidate:
    """A compressed model that was tried; `row_error` is the largest relative one (`ctrlib.search.row_errors`)."""

    method: str
    embedding_bytes: int
    total_bytes: int
    valid_auc: float
    valid_log_loss: float
    row_error: float


@holding()
def compress(
    folder: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    num_bytes: int | None = None,
    ratio: float | None = None,
    epochs: int = 1,
    batch_size: int = 8192,
    layer_ratio: float | None = None,
    learning_rate: float = 1e-4,
    teachers: Sequence[str | Path] = (),
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a smaller model into `out`: tables, decoders, remaps, vectors of numbers and wide part in the budget.

    Every method is tried at the budget, and the rounded rows at their own sizes; the best on validation within the
    budget is distilled from the original for `epochs` over train, and kept at its best epoch. `out` receives a model
    folder, compression.json with all that was tried, and compression.png, bytes against validation AUC.

    Args:
        folder: a model folder.
        data: the prepared folder it was trained on.
        out: where the smaller model goes.
        num_bytes: the budget,
        ratio: or by how much to divide the bytes that there are.
        epochs: of fine-tuning; 0 for none.
        batch_size: rows per step; twice as many are scored at a time.
        layer_ratio: also give the linear layers so many times fewer weights, by low rank.
        learning_rate: of fine-tuning.
        teachers: folders of more models of the same data, such as other seeds: fine-tuning goes towards the mean logit
            of the original and these, which is often better than any of them; so can the small model be.
        seed: of the order of train.
        console: where progress is shown.

    Raises:
        ValueError: both budgets or none, or one that cannot be met; the message says what the smallest is.
        SchemaError: the data were prepared differently.
        DataError: train or valid has one class of a label only, or no row with weight.
        TargetError: `out` is a model or the data, or holds something else than a compressed model.
        LockedError: somebody else writes into `out`; the message says who.
        TypeError: an argument is of another type.
    """
    if isinstance(teachers, str) or not isinstance(teachers, Sequence):
        raise WrongTypeError(f"teachers must be a list of model folders, got {shown(teachers)}")
    check_path("a model folder", folder=folder, **{f"teacher {n}": other for n, other in enumerate(teachers, 1)})
    check_path("a prepared folder", data=data)
    check_settings(num_bytes, ratio, layer_ratio, epochs, learning_rate, batch_size, seed)
    check_target(out, ("compressed", "other"), inputs=[folder, data, *teachers], overwrite=True)
    console = console or Console(stderr=True)
    predictor = Predictor.load(folder)
    predictor.check_prepared(data)
    model: Model = predictor.model  # type: ignore[assignment]
    others = [Predictor.load(other) for other in teachers]
    for other in others:
        other.check_prepared(data)
    teacher = Ensemble([model, *(other.model for other in others)]) if others else model
    before = bytes_of(model)
    check_tables(model, folder)
    budget = num_bytes if num_bytes is not None else int(before.embedding / (ratio or 1.0))
    if budget >= before.embedding:
        raise ArgumentError(
            f"the model's embeddings take {before.embedding:,} bytes, a budget of {budget:,} asks for nothing: name a "
            "smaller one"
        )
    train, valid, test = load_splits(data, Training(batch_size=batch_size, seed=seed))
    sample = Head(train, SAMPLE_ROWS)

    tried: list[Candidate] = []
    plans: list[Plan | None] = []

    def look_at(method: str, candidate: Model, plan: Plan | None) -> None:
        size, scores = bytes_of(candidate), evaluate(candidate, valid, quick=True)
        error = row_errors(model, candidate).largest
        tried.append(Candidate(method, size.embedding, size.total, scores["auc"], scores["log_loss"], error))
        plans.append(plan)
        console.print(
            f"{method}: {size.embedding:,} bytes, valid AUC {scores['auc']:.6f}, "
            f"largest relative error of a row {error:.1e}"
        )

    look_at("uncompressed", model, None)
    schema, tables = predictor.schema, before.weights + before.remap + before.decoder

    def narrow() -> Plan:
        goal = Goal(num_bytes=budget - (before.embedding - tables))
        return Plan.of("low_rank", apply_low_rank(model, low_rank(model, schema, sample, tables=goal)))

    ways: list[Callable[[], Plan]] = [
        narrow,
        *(lambda bits=bits: rounded_rows(model, bits) for bits in (16, 8, 4, 2)),
        lambda: frequency_cut(model, sample, num_bytes=budget),
        *(
            lambda size=int(budget * factor): transform_coding(model, sample, num_bytes=size)
            for factor in (0.5, 2.0, 1.0)
            if factor <= 1 or budget * factor < before.embedding / 2
        ),
    ]
    smallest = ""
    for way in ways:
        try:
            plan = way()
        except (ValueError, NotImplementedError) as error:
            smallest = str(error)
            console.print(f"passed over: {error}")
            continue
        look_at(plan.method, materialise(model, plan), plan)
    fitting = [place for place, one in enumerate(tried) if one.embedding_bytes <= budget and plans[place] is not None]
    if not fitting:
        raise ArgumentError(f"no method stores the embeddings in {budget:,} bytes. {smallest}")
    place = max(fitting, key=lambda place: tried[place].valid_auc)
    chosen = plans[place]
    assert chosen is not None
    smaller = materialise(model, chosen)
    if layer_ratio is not None:
        smaller = apply_low_rank(smaller, low_rank(smaller, schema, sample, layers=Goal(ratio=layer_ratio)))
        look_at(f"{chosen.method}, low-rank layers", smaller, chosen)
    distil(smaller, teacher, train, valid, epochs=epochs, learning_rate=learning_rate, console=console)
    look_at(f"{chosen.method}, fine-tuned", smaller, chosen)
    config = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
    config["replaced"] = describe(smaller)
    engine = dict(config.get("training") or {}).get("engine", "")  # none is said by whoever trained it otherwise
    how = {"engine": engine, "seed": seed, "select_by": "auc"}
    before_scores = evaluate(model, test, quick=True, labels=schema.labels)
    scores, scored = score_once(smaller, valid, test)
    del scores["inference_samples_per_second"]  # the same command ends with the same result
    tasks = {"before": before_scores.get("tasks"), "after": scores.get("test_tasks")}
    result = {
        "method": chosen.method,
        "budget": budget,
        "embedding_bytes_before": before.embedding,
        "embedding_bytes_after": bytes_of(smaller).embedding,
        "row_error": tried[-1].row_error,
        "bytes_before": asdict(before),
        "bytes_after": asdict(bytes_of(smaller)),
        "total_ratio": before.total / bytes_of(smaller).total,
        "ratio": before.embedding / bytes_of(smaller).embedding,
        "valid_auc_before": tried[0].valid_auc,
        "valid_auc_after": tried[-1].valid_auc,
        "test_auc_before": before_scores["auc"],
        "test_auc_after": scores["test_auc"],
        **{f"test_tasks_{name}": found for name, found in tasks.items() if found is not None},
        "tried": [asdict(candidate) for candidate in tried],
        # What every run reports, so that it can be read beside the original.
        **scores,
        **sizes_of(smaller),
        "embedding_bytes": bytes_of(smaller).embedding,
        "engine": engine,
        "seed": seed,
        "data_hash": schema.hash,
        KEY: recorded({**config, "training": how}, schema, scored, data=Path(data), rows_hash=train.data_hash),
    }
    with model_in_the_making(smaller, config, folder, out, "compress", rows=data) as making:
        draw = functools.partial(plots.compression, tried, budget)
        write_result(making, result, ("compression.json", "compression.png"), draw)
    return result


def check_tables(model: Model, folder: str | Path) -> None:
    """Refuse a model without tables, or with none that the methods take.

    Raises:
        ArgumentError: as said.
    """
    before = bytes_of(model)
    if not before.weights + before.remap + before.decoder:
        raise ArgumentError(
            f"the model in {folder} has no tables, so there is nothing to compress: expected one with features that "
            "have ids (categorical, multi-valued or histories)"
        )
    if not any(isinstance(part, TABLES) for part in model.embedding.modules()):
        kinds = {type(part).__name__ for part in model.embedding.modules() if isinstance(part, SMALLER)}
        raise ArgumentError(
            f"the tables of the model in {folder} cannot be compressed, they are {', '.join(sorted(kinds)) or 'others'}"
            ": expected plain tables, such as those of features with one id a row; a model that was made smaller "
            "already is compressed anew from the one that it came from"
        )


class Head:
    """The first rows of every epoch of a loader."""

    def __init__(self, loader: Loader, num_rows: int) -> None:
        self.loader, self.num_batches = loader, -(-num_rows // loader.batch_size)

    def __iter__(self) -> Any:
        for _, batch in zip(range(self.num_batches), self.loader):
            yield batch
