"""Census-Income (KDD): 199,523 + 99,762 people of the 1994 and 1995 surveys of the US Census Bureau (UCI, CC BY 4.0).

    python datasets/census_income.py --out data/census_income
    python datasets/census_income.py --protocol numbers --out data/census_income_numbers

Two labels, as in MMoE (J. Ma et al., KDD 2018, https://doi.org/10.1145/3219819.3220007): income above 50,000 (6.2 %),
and never married (43.3 %). Train is the file of that name; the test file's rows are halved at random into valid and
test, as there. The survey's own row weight is no feature (UCI: not to be used in classifiers) and no weight here.

All columns are categorical, the seven numbers too, by value: most are 0 for nearly everybody, so that few quantiles
are left to cut them at (income then has a test AUC of .949 instead of .953). Values that occur once or twice in train
share the out-of-vocabulary id.

`all` keeps every other column: whether somebody was never married then nearly stands in three of them (tax filer
status, household and family status, household summary). `hard` drops those three. `numbers` is `all` with the seven
numbers as numbers beside their categories: MMoE's AUC of income is .9548 to .9550 on test instead of .9542 to .9543 (on
valid .9557 to .9563 instead of .9554 to .9557; two seeds), that of never married the same.

`leaked` is `all` and the product of both labels as a feature, which tells 9 % of the incomes above 50,000. It is no
task for a model, but the one in which torch-rechub's published AUCs were reached (shared bottom .9560, MMoE .9579, PLE
.9583 and .9593, AITM .9595 for income, .9948 to .9951 for never married): its examples/ranking/run_census.py makes
that product for ESMM, and left it among the features of every model when the table appeared (commit 77056e2,
2022-06-01); commit 6687be3 took it out four weeks later, and the table stayed. MMoE of torch-rechub 0.9.0, with that
script's settings and columns, and MMoE of recipes/census_income.py, AUC on the test rows made here (income; never
married), and of income on random halves of the test file (mean, standard deviation):

    torch-rechub, its columns                 .9481, .9490 (two seeds); .9947, .9948    .9487, .9495 +- .0011
    torch-rechub, the columns of `all`        .9510; .9946                              .9514 +- .0010
    torch-rechub, its columns and the leak    .9564; .9950                              .9567 +- .0012
    ctrlib, numbers scaled as there           .9496; .9949                              .9505 +- .0011
    ctrlib, `all`                             .9542; .9948                              .9548 +- .0010
    ctrlib, `leaked`                          .9620; .9951                              .9628 +- .0009

The draw of the half thus moves income by .001, two thirds of a model's standard error there (.0015: 3,000 incomes
above 50,000); that of seed 0 is .0006 below the whole file. What else differs in torch-rechub: numbers are scaled to
0 to 1 and are no categories, categories are counted over train and test, and each call halves the test file anew, with
equal shares of income.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import tyro

import ctrlib as ctr
from ctrlib.data.download import download

URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/census-income-mld/"
# With the md5 of what is inside.
FILES = {
    "census-income.data.gz": "1391e210e329cdf2919e6791d0384860",
    "census-income.test.gz": "b82952d217858365c8e597827e3e5468",
}

NUMBERS = ("age", "wage_per_hour", "capital_gains", "capital_losses", "dividends", "num_employees", "weeks_worked")
COLUMNS = (
    *("age", "class_of_worker", "industry", "occupation", "education", "wage_per_hour", "enrolled", "marital_status"),
    *("major_industry", "major_occupation", "race", "hispanic_origin", "sex", "union_member", "unemployment_reason"),
    *("employment_status", "capital_gains", "capital_losses", "dividends", "tax_filer", "previous_region"),
    *("previous_state", "household_family", "household_summary", "instance_weight", "migration_msa"),
    *("migration_region", "migration_within_region", "same_house", "migration_sunbelt", "num_employees"),
    *("family_under_18", "birth_father", "birth_mother", "birth_self", "citizenship", "own_business"),
    *("veteran_questionnaire", "veteran_benefits", "weeks_worked", "year", "income"),
)
LABELS = ("income", "never_married")
LEAKING = ("tax_filer", "household_family", "household_summary")


@dataclass(frozen=True)
class Arguments:
    """Prepare Census-Income (KDD) for training."""

    out: Path
    """Prepared folder to write."""
    raw: Path | None = None
    """Folder that holds census-income.data.gz and census-income.test.gz already; otherwise they are downloaded."""
    protocol: Literal["all", "hard", "numbers", "leaked"] = "all"
    """Every column; without those that nearly tell the marital status; with numbers as numbers besides; or with what
    leaks in torch-rechub's script."""
    label: Literal["both", "income", "never_married"] = "both"
    """Keep one label only: the same rows in the same order, for a model of a single task."""
    seed: int = 0
    """Of the halving of the test file."""


def fetch(folder: Path) -> Path:
    """A folder with the raw files; `read` checks what is inside, since archives of one content differ."""
    for name in FILES:
        download(URL + name, checksum=None, folder=folder)
    return folder


def read(path: Path) -> pl.DataFrame:
    """The rows of one file, text and numbers as they stand there, both labels and their product 0 or 1.

    `NAME_number` is a number once more, as one.

    Raises:
        ValueError: the content is not what was published.
    """
    content = gzip.decompress(path.read_bytes())
    if (found := hashlib.md5(content).hexdigest()) != FILES[path.name]:
        raise ValueError(
            f"{path} holds other rows than published: expected md5 {FILES[path.name]} of its content, got {found}; "
            f"take it from {URL}"
        )
    text = content.decode("ascii").replace(", ", ",")
    frame = pl.read_csv(io.StringIO(text), has_header=False, infer_schema=False)
    frame.columns = list(COLUMNS)
    return frame.with_columns(
        pl.col("income").replace_strict({"- 50000.": 0, "50000+.": 1}, return_dtype=pl.Int8),
        pl.col(NUMBERS).cast(pl.Float64).name.suffix("_number"),
        never_married=(pl.col("marital_status") == "Never married").cast(pl.Int8),
    ).with_columns(both_labels=pl.col("income") * pl.col("never_married"))


def features_of(protocol: str) -> list[ctr.Feature]:
    """The columns that are features, and what they mean."""
    dropped = {"marital_status", "instance_weight", "income", *(LEAKING if protocol == "hard" else ())}
    features: list[ctr.Feature] = [
        ctr.Categorical(name, min_count=3 if name in NUMBERS else 1) for name in COLUMNS if name not in dropped
    ]
    if protocol == "numbers":
        features += [ctr.Numeric(f"{name}_number", transform="log_standard") for name in NUMBERS]
    if protocol == "leaked":
        features.append(ctr.Categorical("both_labels"))
    return features


def main(arguments: Arguments) -> None:
    """Fetch if needed, then prepare."""
    raw = arguments.raw or fetch(arguments.out.parent / "raw" / "census_income")
    train, held_out = (read(raw / name) for name in FILES)
    held_out = held_out.sample(fraction=1.0, shuffle=True, seed=arguments.seed)
    half = len(held_out) // 2
    features = features_of(arguments.protocol)
    labels = list(LABELS) if arguments.label == "both" else [arguments.label]
    data = {"train": train, "valid": held_out[:half], "test": held_out[half:]}
    ctr.prepare(
        {split: frame.select(*(feature.name for feature in features), *labels) for split, frame in data.items()},
        arguments.out,
        features=features,
        labels=labels,
        overwrite=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
