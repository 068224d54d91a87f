"""Damage to prepared folders, model folders and folders of checkpoints: each must be refused, by the name of a file.

    python tests/damaged_folders.py --trials 1000

Flipped bits, files cut, emptied, deleted, or swapped for that of another folder. A damage that is not noticed, or that
is not named, makes the exit code 1. Of a folder of checkpoints, the newest good one is what was saved, and each that is
damaged is refused when it is asked for. `tests/faults.py` goes on from such checkpoints to the end of a run.
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
import torch
import tyro

import ctrlib as ctr
from ctrlib.data import codes
from ctrlib.manifest import CARD, check_folder

CONFIG = {"model": "mlp", "embedding_dim": 4, "hidden": [8], "numeric": "bucketised"}
KINDS = ("data", "model", "checkpoints")
DAMAGES = ("flip", "cut", "empty", "delete", "swap")


@dataclass(frozen=True)
class Trials:
    """How much is tried."""

    trials: int = 1000
    """Damaged folders: a third each are prepared folders, model folders and folders of checkpoints."""
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

    with ctr.Checkpoints(folder / "checkpoints", keep_last=3) as checkpoints:
        for step in STEPS:
            needs = checkpoints.last if step == STEPS[-1] else None
            checkpoints.save(step, tensors(seed, step), {"seed": seed, "step": step}, needs=needs)


def tensors(seed: int, step: int) -> dict[str, torch.Tensor]:
    """What is saved at a step."""
    generator = torch.Generator().manual_seed(10 * seed + step)
    return {"table": torch.randn(40, 4, generator=generator), "bias": torch.randn(3, generator=generator)}


def read_checkpoints(folder: Path) -> None:
    """Read the newest good checkpoint, then each by its name; what is read must be what was saved.

    Raises:
        CheckpointError: with all that was said meanwhile.
    """
    said: list[str] = []
    with ctr.Checkpoints(folder, log=said.append) as checkpoints:
        for name in (None, *(f"step-{step:09d}" for step in STEPS)):
            found = {key: torch.zeros_like(tensor) for key, tensor in tensors(0, 1).items()}
            try:
                state = checkpoints.load(found, name=name)
            except ctr.CheckpointError as error:
                said.append(str(error))
                continue
            assert state is not None, f"{folder} is taken for one in which nothing was saved"
            for key, tensor in tensors(0, state["step"]).items():
                assert state["seed"] == 0 and torch.equal(found[key], tensor), f"{name}: other values of {key}"
    if said:
        raise ctr.CheckpointError("; ".join(said))


def read(folder: Path) -> None:
    """Read all that training and prediction read."""
    if folder.name == "checkpoints":
        read_checkpoints(folder)
        return
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
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != CARD
    )  # which people may change
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
    except ctr.CheckpointError as error:
        return "named" if any(name in str(error) for name in OF_CHECKPOINTS) else f"names no file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read as if nothing was"


NAMES = ("MANIFEST", "schema.json", "model.json", "model.safetensors", "report.json", "groups.parquet",
         "vocab/", "numbers/", "train/", "valid/", "test/")  # fmt: skip


STEPS = (1, 2, 3)  # the last needs the one before it
OF_CHECKPOINTS = ("LATEST", *(f"step-{step:09d}/{name}" for step in STEPS for name in (
    "MANIFEST", "tensors-0.bin", "tensors.json", "state.json")))  # fmt: skip


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
            done, verdict = try_one(KINDS[number % len(KINDS)], sources, Path(temporary), rng)
            seen[" ".join(done.split()[:2])] += 1
            if verdict != "named":
                bad += 1
                print(f"{done}: {verdict}")
    for what, number in sorted(seen.items()):
        print(f"{what:20} {number:5}")
    print(f"{trials.trials} damaged folders, {bad} of them not refused by the name of a file")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
