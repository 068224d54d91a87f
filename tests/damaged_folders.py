"""Damage done to prepared folders and model folders: each must be refused, by the name of a file.

    python tests/damaged_folders.py --trials 1000

Flipped bits, files cut, emptied, deleted, or swapped for that of another folder. A damage that is not noticed, or that
is not named, makes the exit code 1. `tests/faults.py` does the same to checkpoints.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import tyro

import ctrlib as ctr
from ctrlib.data import codes
from ctrlib.manifest import check_folder

CONFIG = {"model": "mlp", "embedding_dim": 4, "hidden": [8], "numeric": "bucketised"}
DAMAGES = ("flip", "cut", "empty", "delete", "swap")


@dataclass(frozen=True)
class Trials:
    """How much is tried."""

    trials: int = 1000
    """Damaged folders, of which half are prepared folders and half model folders."""
    seed: int = 0
    """Number that files and damages are drawn from."""


def rows(seed: int, num_rows: int = 300) -> pl.DataFrame:
    """Rows with every kind of column; another seed gives other ones."""
    rng = random.Random(seed)
    return pl.DataFrame(
        {
            "item": [f"i{rng.randrange(40)}" for _ in range(num_rows)],
            "tags": ["|".join(f"t{rng.randrange(9)}" for _ in range(rng.randrange(4))) for _ in range(num_rows)],
            "price": [rng.random() for _ in range(num_rows)],
            "user": [f"u{rng.randrange(20)}" for _ in range(num_rows)],
            "click": [rng.randrange(2) for _ in range(num_rows)],
        }
    )


def make(folder: Path, seed: int) -> None:
    """A prepared folder `data`, its train split of several row groups, and a model folder `model`."""
    rows_per_group, codes.ROWS_PER_GROUP = codes.ROWS_PER_GROUP, 100
    try:
        features = [ctr.Categorical("item"), ctr.MultiValued("tags"), ctr.Numeric("price")]
        frame = rows(seed)
        schema = ctr.prepare(
            frame, folder / "data", features=features, labels="click", group="user", ignore=["user"], log=None
        )
    finally:
        codes.ROWS_PER_GROUP = rows_per_group
    config = {**CONFIG, "edges": ctr.quantile_edges(folder / "data", 4)}
    ctr.save_model(ctr.models.build(config, schema), config, folder / "data", folder / "model")


def read(folder: Path) -> None:
    """Read all that training and prediction read."""
    if (folder / "model.json").exists() or not (folder / "train").exists():
        ctr.Predictor.load(folder).predict(rows(9, 20))
        return
    check_folder(folder)
    for split in ("train", "valid", "test"):
        for _ in ctr.Loader(folder, split, batch_size=64, with_group=True):
            pass
    ctr.quantile_edges(folder, 4)
    ctr.Encoder.load(folder)


def damage(folder: Path, other: Path, rng: random.Random) -> str:
    """Damage a file of `folder`, if need be by that of `other`; what was done, for people."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, how = rng.choice(files), rng.choice(DAMAGES)
    content = path.read_bytes()
    if how == "flip":
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "delete":
        path.unlink()
    else:
        stranger = other / path.relative_to(folder)
        if not stranger.exists() or stranger.read_bytes() == content:
            return damage(folder, other, rng)  # nothing would be damaged
        path.write_bytes(stranger.read_bytes())
    return f"{how} {path.relative_to(folder)}"


def judged(folder: Path) -> str:
    """How a folder is read: "named", or what is wrong with that."""
    try:
        read(folder)
    except ctr.SchemaError as error:
        named = any(f"{folder / name}" in str(error) for name in NAMES)
        return "named" if named and "copy" in str(error) else f"names no file or no cure: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read as if nothing was"


NAMES = ("MANIFEST", "schema.json", "model.json", "model.safetensors", "report.json", "groups.parquet",
         "vocab/", "numbers/", "train/", "valid/", "test/")  # fmt: skip


def try_one(kind: str, sources: tuple[Path, Path], place: Path, rng: random.Random) -> tuple[str, str]:
    """Damage a copy; what was done, and how it was judged."""
    folder = place / kind
    shutil.copytree(sources[0] / kind, folder)
    done = damage(folder, sources[1] / kind, rng)
    verdict = judged(folder)
    shutil.rmtree(folder)
    return f"{kind}: {done}", verdict


def main() -> int:
    """Run the trials; the exit code."""
    trials = tyro.cli(Trials, description=__doc__)
    rng, seen, bad = random.Random(trials.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as temporary:
        sources = Path(temporary, "a"), Path(temporary, "b")
        for seed, source in enumerate(sources):
            make(source, seed)
        for number in range(trials.trials):
            done, verdict = try_one(("data", "model")[number % 2], sources, Path(temporary), rng)
            seen[" ".join(done.split()[:2])] += 1
            if verdict != "named":
                bad += 1
                print(f"{done}: {verdict}")
    for what, number in sorted(seen.items()):
        print(f"{what:15} {number:5}")
    print(f"{trials.trials} damaged folders, {bad} of them not refused by the name of a file")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
