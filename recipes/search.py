"""What a search finds beside its floors, at equal bytes and from the same start, over several seeds.

    python recipes/search.py optfs --data-set frappe_x1 --data DIR --out runs/search [--seeds 1 2 3] [--record]

The untouched model, the method's, and models of as many bytes whose rows are chosen by how often train reads them, by
their norms in the trained untouched model, and by chance; for OptEmbed also a random search with as many evaluations.
Each such floor is trained from the untouched model's start, and once more, `fine-tuned`, from its trained weights; so
is the untouched model, since to go on at the first learning rate helps by itself. For OptInter, which makes models
larger, the floors are all pairs memorised, all factorised, and the found choices dealt out by chance. All are trained
by the same `fit`, chosen by validation, and reported on test once; then the method is compared with each by paired
tests, over seeds (t) and over the rows of test (DeLong).

`planted` needs no DATA: half of its fields say nothing, and what a method keeps of them is printed. In `..._noise`
every field of DATA has a twin with the values of other rows. OUT receives all models; what is there already is
not trained again.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.stats
import torch
import tyro
from torch import Tensor
from tyro.conf import FlagCreatePairsOff, Positional

import ctrlib as ctr
from ctrlib import models
from ctrlib.schema import PADDING_ID
from ctrlib.search.bytes import bytes_of
from ctrlib.search.counting import count_reads
from ctrlib.search.experiment import settings_of
from ctrlib.search.floors import keep_rows, row_norms
from ctrlib.search.optembed import OptEmbed
from ctrlib.search.optinter import OptInter, plan_of
from ctrlib.search.plan import Plan, materialise
from ctrlib.search.run import search_and_retrain
from ctrlib.structure import describe
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.config import Training
from ctrlib.training.crossing import count_crosses
from ctrlib.training.record import KEY, recorded
from ctrlib.training.run import score_once, sizes_of, train_model
from ctrlib.training.splits import load_splits
from records import record


@dataclass(frozen=True)
class Setting:
    """A data set, its model and training, chosen on validation, and the methods' settings where they are not the
    defaults."""

    config: dict[str, Any]
    training: dict[str, Any]
    share: float = 1.0
    """Of the untouched model's embedding bytes, what methods with a budget and their floors get."""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)


# Fewer candidates than the paper's 600, on fewer rows.
OPTEMBED = {"epochs": 25, "patience": 3, "whole": 0.5, "price": 1e-4, "generations": 8, "rows": 16_384}
THRESHOLDS = {**OPTEMBED, "alpha": 3e-4, "threshold_learning_rate": 0.01}
DEEPFM = {"model": "deepfm", "batch_norm": True}
FRAPPE = Setting(
    {**DEEPFM, "embedding_dim": 10, "hidden": (128, 64), "dropout": 0.2},
    {"batch_size": 4096, "embedding_l2": 0.05, "learning_rate": 1e-3},
    share=0.85,
    # 50 steps an epoch: gates move slowly, and close when the rows have learned what they are for.
    methods={
        "optfs": {"penalty": 1e-5, "temperature": 1000.0, "epochs": 20, "rewind": None},
        # Thresholds would leave no value of the day and the weather, and 2/3 of the users.
        "optembed": {**OPTEMBED, "prune_rows": False, "inherit": True, "price": 0.0, "generations": 15, "rows": 30_000},
    },
)
MOVIELENS = Setting(
    {**DEEPFM, "embedding_dim": 16, "hidden": (128, 64), "dropout": 0.4},
    {"batch_size": 1024, "embedding_l2": 1e-4, "learning_rate": 1e-3},
    share=0.7,
    methods={
        "optfs": {"penalty": 1e-5, "rewind": None},
        "optembed": {**THRESHOLDS, "inherit": True},
        # Every rating is a user and a movie of its own: memorised, they are learnt by heart.
        "optinter": {"min_count": 20},
    },
)
SETTINGS = {
    "frappe_x1": FRAPPE,
    "frappe_x1_noise": replace(
        FRAPPE,
        share=0.45,
        methods={"optfs": {**FRAPPE.methods["optfs"], "penalty": 2e-5}, "optembed": THRESHOLDS},
    ),
    "movielens_1m_ids": MOVIELENS,
    "movielens_1m_ids_noise": replace(MOVIELENS, share=0.45, methods={**MOVIELENS.methods, "optembed": THRESHOLDS}),
    "planted": Setting(
        {"model": "fm", "embedding_dim": 16},
        {"batch_size": 1024, "embedding_l2": 0.0, "learning_rate": 1e-3},
        methods={"optfs": {"penalty": 2e-4, "temperature": 5000.0}},
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
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of weights, order, dropout and the search."""
    epochs: int = 100
    """Of each training at most."""
    only_method: bool = False
    """Without the floors."""
    record: bool = False
    """Append to results.csv."""


def main(knobs: Knobs) -> None:
    """Train, search, report, compare."""
    keep_freed_memory()
    if knobs.data_set == "planted":
        data = planted(knobs.out / "planted_data")
    elif knobs.data is None:
        raise SystemExit(f"{knobs.data_set} needs its prepared folder: add --data")
    else:
        noise = knobs.data_set.endswith("_noise")
        data = with_twins(knobs.data, knobs.out / f"{knobs.data_set}_data") if noise else knobs.data
    scores = [Run(knobs, data, seed).all() for seed in knobs.seeds]
    labels = np.concatenate([batch.labels[:, 0].numpy() for batch in ctr.Loader(data, "test", batch_size=8192)])
    for name in list(scores[0])[1:]:
        compare(knobs.method, name, labels, scores)


class Run:
    """All models of one seed. Each is kept in its folder: its model, result.json and the test logits."""

    def __init__(self, knobs: Knobs, data: Path, seed: int) -> None:
        self.knobs, self.data, self.seed = knobs, data, seed
        self.setting: Setting = SETTINGS[knobs.data_set]
        self.out = knobs.out / f"{knobs.data_set}_seed_{seed}"
        self.how = Training(seed=seed, max_epochs=knobs.epochs, device="cpu", **self.setting.training)
        self.train, self.valid, self.test = load_splits(data, self.how)
        self.schema = self.train.schema
        self.scores: dict[str, npt.NDArray[np.float32]] = {}

    def all(self) -> dict[str, npt.NDArray[np.float32]]:
        """Name of the model -> logits of test; the method's first."""
        method = self.knobs.method
        base = self.trained("untouched", self.fresh)
        num_bytes = int(bytes_of(base).embedding * self.setting.share)
        own = {name: getattr(self.how, name) for name in ("learning_rate", "embedding_l2")}
        own |= self.setting.methods.get(method, {})
        if method in ("optembed", "dnis") and self.setting.share < 1:
            own["num_bytes"] = num_bytes
        settings = settings_of(method, own)
        # A random search asks the same supernet.
        supernet = self.out / "supernet" if isinstance(settings, OptEmbed) else None
        found = self.searched(method, settings, supernet)
        if not self.knobs.only_method:
            if isinstance(settings, OptEmbed):
                candidates = json.loads((self.out / method / "search.json").read_text())["summary"]["candidates"]
                chance = replace(settings, generations=0, parents=candidates)
                self.searched(f"{method}, random search", chance, supernet)
            if isinstance(settings, OptInter):
                self.pair_floors(settings)
            else:
                budget = (num_bytes, f"{self.setting.share:.0%} of the bytes")
                self.row_floors(
                    base, *(budget if "num_bytes" in own else (bytes_of(found).embedding, f"the bytes of {method}"))
                )
        return {method: self.scores.pop(method), **self.scores}

    def fresh(self) -> ctr.Model:
        """The untouched model before training."""
        torch.manual_seed(self.seed)
        return models.build(self.setting.config, self.schema)

    def trained(self, name: str, build: Callable[[], ctr.Model], *, fine_tune: bool = False) -> ctr.Model:
        """The model, trained from what is built, or as it was trained before.

        To `fine_tune`: what is built is trained already, and stays as it is if validation likes that better.
        """
        folder = self.out / name
        if not (folder / "result.json").is_file():
            model = build()
            before = copy.deepcopy(model)
            self.train.set_epoch(0)
            torch.manual_seed(self.seed)
            config = {**self.setting.config, "replaced": describe(model), "training": asdict(self.how)}
            train_model(model, self.how, self.train, self.valid)
            if fine_tune and self.valid_auc(before) > self.valid_auc(model):
                model = before
            ctr.save_model(model, config, self.data, folder)
            self.keep(name, model)
        return self.known(name)

    def searched(self, name: str, settings: Any, checkpoints: Path | None = None) -> ctr.Model:
        """What the search finds, retrained, or as it was found before; `checkpoints`: where its own stay."""
        if not (self.out / name / "result.json").is_file():
            result = search_and_retrain(
                self.knobs.method,
                self.data,
                self.setting.config,
                self.out / name,
                settings=settings,
                seed=self.seed,
                max_epochs=self.knobs.epochs,
                checkpoints=checkpoints,
                **self.setting.training,
            )
            for sentence in result["summary"]["words"]:
                print(sentence)
            loaded: Any = ctr.Predictor.load(self.out / name).model
            self.keep(name, loaded)
        return self.known(name)

    def valid_auc(self, model: ctr.Model) -> float:
        """By which models are chosen."""
        return float(ctr.evaluate(model, self.valid, quick=True)["auc"])

    def keep(self, name: str, model: ctr.Model) -> None:
        """Score a trained model once, and write what it reached."""
        scores, scored = score_once(model, self.valid, self.test)
        np.save(self.out / name / "test.npy", scored.logits[:, 0])
        config = {**self.setting.config, "training": asdict(self.how)}
        said = recorded(config, self.schema, scored, data=self.data, rows_hash=self.train.data_hash)
        result = {**scores, **sizes_of(model), "embedding_bytes": bytes_of(model).embedding, KEY: said}
        (self.out / name / "result.json").write_text(ctr.training.to_json(result), encoding="utf-8")

    def known(self, name: str) -> ctr.Model:
        """A model that is there, with its scores; recorded, if it was not yet."""
        folder = self.out / name
        self.scores[name] = np.load(folder / "test.npy")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        shown = {key: result[key] for key in ("valid_auc", "test_auc", "parameters", "embedding_bytes")}
        print(json.dumps({"model": name, "seed": self.seed, **shown}), flush=True)
        if self.knobs.record and not (folder / "recorded").exists():
            row = {**result, "samples_per_second": "", "engine": "exact", "precision": "fp32", "note": ""}
            row |= {"seed": self.seed, "data_hash": self.schema.hash}
            model_name = f"{self.setting.config['model']}_{self.setting.config['embedding_dim']} {name}"
            record(row, Path(__file__).parent / "results.csv", data=self.knobs.data_set, model=model_name)
            (folder / "recorded").touch()
        model: Any = ctr.Predictor.load(folder).model
        return model

    def row_floors(self, base: ctr.Model, num_bytes: int, size: str) -> None:
        """Rows kept by other rules, in as many bytes, from both starts; `size` is for their names."""
        counts = count_reads(self.schema, self.train)
        generator = torch.Generator().manual_seed(self.seed)
        floors = {"frequency cut": counts, "magnitude pruning": row_norms(base, self.schema)}
        if self.knobs.data_set == "planted":
            floors["random rows"] = {name: torch.rand(len(n), generator=generator) for name, n in counts.items()}
        self.trained("untouched, fine-tuned", lambda: copy.deepcopy(base), fine_tune=True)
        for (name, scores), fine_tune in itertools.product(floors.items(), (False, True)):

            def build(name: str = name, scores: Mapping[str, Tensor] = scores, go_on: bool = fine_tune) -> ctr.Model:
                model = base if go_on else self.fresh()
                # To zero, as the searches do: all in one row for what is rare, magnitude pruning lost .001 on Frappe.
                plan = keep_rows(model, self.schema, scores, num_bytes=num_bytes, method=name, dropped_to=PADDING_ID)
                return materialise(model, plan)

            self.trained(f"{name} to {size}{', fine-tuned' if fine_tune else ''}", build, fine_tune=fine_tune)

    def pair_floors(self, settings: OptInter) -> None:
        """All pairs memorised, all factorised, and as many of each kind as the search chose, by chance."""
        plan = Plan.load(self.out / self.knobs.method / "plan.safetensors")
        fields, matrix = plan.summary["pairs"]["fields"], plan.summary["pairs"]["choice"]
        pairs = list(itertools.combinations(fields, 2))
        found = [matrix[i][j] for i, j in itertools.combinations(range(len(fields)), 2)]
        rows = {feature.name: feature.num_embeddings or 0 for feature in self.schema.sparse}
        crosses = count_crosses(self.train, pairs, rows, min_count=settings.min_count)
        dealt = np.random.default_rng(self.seed).permutation(found).tolist()
        floors = {
            "all memorised": ["memorise"] * len(pairs),
            "all factorised": ["factorise"] * len(pairs),
            "choices by chance": dealt,
        }
        for name, choice in floors.items():

            def build(choice: list[str] = choice) -> ctr.Model:
                model = self.fresh()
                plan = plan_of(model, pairs, crosses, choice, cross_dim=settings.cross_dim, seed=self.seed)
                return materialise(model, plan)

            self.trained(f"optinter, {name}", build)


def compare(method: str, other: str, labels: npt.NDArray[Any], scores: list[dict[str, npt.NDArray[Any]]]) -> None:
    """Print the mean difference of test AUC, method - other, and two paired tests of it."""
    by_rows = [ctr.metrics.auc_paired_test(labels, run[method], run[other]) for run in scores]
    differences = [result.difference for result in by_rows]
    line: dict[str, Any] = {"difference": float(np.mean(differences)), "of_each_seed": differences}
    if len(differences) > 1:
        line["p_over_seeds"] = float(scipy.stats.ttest_1samp(differences, 0).pvalue)
    line["p_over_rows"] = [result.p_value for result in by_rows]
    print(json.dumps({"model": f"{method} - {other}", **line}), flush=True)


def with_twins(data: Path, folder: Path, *, seed: int = 0) -> Path:
    """Prepared data whose every field has a twin: all fields of another row of the split. Prepared, if it is not there.

    So that twins are as frequent as what they copy, and as related to each other, and say nothing about the label.
    """
    if (folder / "schema.json").is_file():
        return folder
    names = [feature.name for feature in ctr.Schema.load(data).sparse]
    splits = {}
    for split in ("train", "valid", "test"):
        ids = pl.read_parquet(data / split / "*.parquet", columns=[*names, "label"])
        splits[split] = ids.with_columns(pl.col(names).shuffle(seed).name.suffix("_noise"))
    features = [ctr.Categorical(name) for name in (*names, *(f"{name}_noise" for name in names))]
    ctr.prepare(splits, folder, features=features, labels="label", log=None)
    return folder


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
