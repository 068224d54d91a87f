"""What `ctrlib train` reaches without a flag, beside the simple models on the same rows: docs/defaults.md.

    python recipes/defaults.py --raw DIR [--data census_income frappe] [--seeds 1 2 3] [--record]

DIR has a folder for each real data set, as the scripts in datasets/ read them. Three data sets are made up, of kinds
that are hard to get right: numbers that are mostly 0, one click in two hundred rows, and new items all the time.
Nothing here was chosen by these rows' test part; docs/defaults.md says what was chosen by which validation rows.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.data.synthetic import Teacher, generate
from harness import prepare_by_script
from programs import SPLITS
from records import record

HERE = Path(__file__).parent


def mostly_zero(folder: Path) -> None:
    """40,000 rows: eight ids and six numbers, three of them 0 in nine rows of ten, which act by steps and products."""
    draw = np.random.default_rng(11)
    num_rows = 40_000
    amounts = draw.lognormal(3, 1.5, (num_rows, 3)) * (draw.random((num_rows, 3)) < 0.1)
    others = draw.normal(size=(num_rows, 3))
    ids = np.stack([draw.zipf(1.3, num_rows) % size for size in (5, 8, 20, 50, 100, 300, 1_000, 3_000)], axis=1)
    effects = [draw.normal(size=3_000) for _ in range(8)]
    logit = 0.4 * sum(effect[column] for effect, column in zip(effects, ids.T)) - 1.5
    logit += 1.2 * (amounts[:, 0] > 0) + 0.8 * np.log1p(amounts[:, 1]) * (others[:, 0] > 0) - (amounts[:, 2] > 60)
    logit += np.sin(2 * others[:, 1]) + 0.7 * (np.abs(others[:, 2]) > 1)
    frame: dict[str, Any] = {f"amount_{n}": amounts[:, n].round(2) for n in range(3)} | {
        f"x_{n}": others[:, n] for n in range(3)
    }
    frame |= {f"id_{n}": [f"v{value}" for value in ids[:, n]] for n in range(8)}
    prepare_clicks(folder, frame, logit, draw)


def rare_clicks(folder: Path) -> None:
    """300,000 rows, of which one in two hundred is a click."""
    frame, _ = generate(Teacher(300_000, (5_000, 1_000, 200, 50, 10), num_numeric=3, base_rate=0.005, seed=12))
    features = [ctr.Categorical(f"C{n}") for n in range(1, 6)] + [ctr.Numeric(f"I{n}", "log") for n in range(1, 4)]
    ctr.prepare(frame, folder, features=features, labels="label", log=None)


def new_items(folder: Path) -> None:
    """100,000 rows in the order of time: each item is shown for a while only, and what tells of it is its kind."""
    draw = np.random.default_rng(13)
    num_rows = 100_000
    item = (np.arange(num_rows) // 20 + draw.integers(0, 400, num_rows)).astype(int)
    brands, kinds, users = draw.integers(0, 300, item.max() + 1), draw.integers(0, 40, item.max() + 1), 3_000
    user = draw.zipf(1.2, num_rows) % users
    tastes, of_kinds = draw.normal(size=(users, 6)), draw.normal(size=(40, 6))
    logit = 0.5 * (tastes[user] * of_kinds[kinds[item]]).sum(1) + 0.8 * draw.normal(size=300)[brands[item]]
    logit += 0.5 * draw.normal(size=item.max() + 1)[item] - 1.2
    columns = {"user": user, "item": item, "brand": brands[item], "kind": kinds[item]}
    frame = {name: [f"{name[0]}{value}" for value in column] for name, column in columns.items()}
    prepare_clicks(folder, frame, logit, draw)


def prepare_clicks(folder: Path, frame: dict[str, Any], logit: Any, draw: np.random.Generator) -> None:
    """Draw clicks; 8:1:1 in the order of the rows, which is that of time where there is one."""
    click = draw.random(len(logit)) < 1 / (1 + np.exp(-logit))
    rows = pl.DataFrame({**frame, "click": click.astype(int)})
    first, second = int(0.8 * len(rows)), int(0.9 * len(rows))
    parts = dict(zip(SPLITS, (rows[:first], rows[first:second], rows[second:])))
    ctr.prepare(parts, folder, labels="click", log=None)


def first_of_avazu(folder: Path, raw: Path) -> None:
    """The head of Avazu's train.csv as a stranger would have it prepared, without a word on the columns."""
    rows = pl.read_csv(gzip.decompress((raw / "train.csv.gz").read_bytes()), infer_schema_length=None)
    ctr.prepare(rows.drop("id"), folder, labels="click", log=None)


# How each folder is made: a script of datasets/ with its arguments and the folder of its raw files, or a function.
Maker = Callable[[Path], None]
SCRIPTS: dict[str, tuple[str, list[str]]] = {
    "census_income": ("census_income_kdd", ["census_income.py", "--protocol", "numbers", "--label", "income"]),
    "movielens_1m_ids": ("movielens_1m", ["movielens_1m.py", "--protocol", "ids"]),
    "movielens_100k": ("movielens_100k", ["movielens_100k.py"]),
    "frappe": ("frappe_x1", ["frappe.py"]),
    "criteo_10k": ("criteo_10k", ["criteo.py", "--counts", "log"]),
}
MADE: dict[str, Maker] = {"mostly_zero": mostly_zero, "rare_clicks": rare_clicks, "new_items": new_items}
NAMES = (*SCRIPTS, "avazu_8k", *MADE)


@dataclass(frozen=True)
class Knobs:
    """Train with the defaults of the command line, several seeds, and say what came out."""

    raw: Path | None = None
    """Folder with a folder of raw files for each real data set."""
    data: tuple[str, ...] = NAMES
    """Which data sets."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of initial weights, shuffle and dropout."""
    work: Path = HERE.parent / "data" / "defaults"
    """Folder for prepared data, which is kept, and for runs."""
    record: bool = False
    """Append a row for each run to results.csv."""


def prepare(knobs: Knobs, name: str) -> Path:
    """The prepared folder, made first if it is not there."""
    folder = knobs.work / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name in MADE:
        MADE[name](folder)
    elif knobs.raw is None:
        raise SystemExit(f"{name} needs --raw DIR, or choose of {', '.join(MADE)} by --data")
    elif name == "avazu_8k":
        first_of_avazu(folder, knobs.raw / name)
    else:
        raw, script = SCRIPTS[name]
        prepare_by_script(HERE.parent, script, folder, knobs.raw / raw)
    return folder


def train(folder: Path, out: Path, seed: int) -> dict[str, Any]:
    """What the command writes."""
    command = [sys.executable, "-m", "ctrlib", "train", str(folder), "--seed", str(seed), "--out", str(out)]
    subprocess.run([*command, "--overwrite"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def scores_of(result: dict[str, Any]) -> dict[str, float]:
    """AUC and normalised entropy of the model and of each simple one, and how sure it is that the best is worse."""
    model, *others = result["baselines"]
    best = max(others, key=lambda line: line["auc"])
    scores = {"auc": model["auc"], "ne": model["normalized_entropy"]}
    for line in others[1:]:  # behind the constant
        scores |= {f"auc, {line['name']}": line["auc"], f"ne, {line['name']}": line["normalized_entropy"]}
    ahead = {"auc above the best": best["difference"], "p of that": best["p_value"]}
    calibration = {name: result[f"test_{name}"] for name in ("calibration", "calibration_se", "ece", "ece_by_chance")}
    return {**scores, **ahead, **calibration, "seconds": result["seconds"]}


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    if unknown := sorted(set(knobs.data) - set(NAMES)):
        raise SystemExit(f"there is no {', '.join(unknown)}: expected some of {', '.join(NAMES)}")
    for name in knobs.data:
        folder = prepare(knobs, name)
        for seed in knobs.seeds:
            result = train(folder, knobs.work / "runs" / f"{name}-{seed}", seed)
            scores = scores_of(result)
            print(json.dumps({"data": name, "seed": seed, **{what: round(v, 5) for what, v in scores.items()}}))
            if knobs.record:
                record(result, HERE / "results.csv", data=name, model="defaults", task="defaults", scores=scores)


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
