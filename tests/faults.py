"""Faults, injected into real runs: after each, the run must end with the bits of one that nothing happened to.

    python tests/faults.py --help

A run is three epochs of a small DeepFM, with dropout and batch normalisation, in forked processes. What it ends with is
one hash over weights, optimisers and learning curve. A fault that is not survived makes the exit code 1. Whole commands
are killed, at every file operation, by `tests/killed_calls.py`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro
from forking import be_ready, import_all
from rich.console import Console
from rich.table import Table

import ctrlib as ctr
from ctrlib import distributed, models
from ctrlib.batch import Batch
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.training.config import EngineName
from ctrlib.training.engines import make_engine

CONFIG = {"model": "deepfm", "embedding_dim": 8, "hidden": [16], "wide_columns": 4, "dropout": 0.1, "batch_norm": True}
TEACHER = Teacher(num_rows=5200, cardinalities=(50, 40, 30), num_numeric=2, max_history=5, seed=3)
TRAIN_ROWS, BATCH, EPOCHS = 1200, 128, 3
STEPS = -(-TRAIN_ROWS // BATCH)  # an epoch
PATIENCE = 90.0  # seconds: whoever takes longer hangs
OUTSIDE = 77  # exit code after a SIGTERM before or after `fit`
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Trials:
    """How many trials of each fault."""

    kills: int = 200
    """Runs killed by SIGKILL, one to three times each."""
    terminations: int = 20
    """Runs told to end by SIGTERM."""
    last_steps: int = 4
    """Runs that go on with the last step of an epoch, where a pipeline has nothing left to take."""
    flips: int = 100
    """Checkpoint folders with one bit flipped."""
    truncations: int = 20
    """Checkpoint folders with one file cut short."""
    swaps: int = 20
    """Checkpoint folders with a file missing, or that of another checkpoint or rank in its place."""
    resumed: int = 9
    """How many of these damaged folders a run goes on from, to its end."""
    full_disks: int = 10
    """Runs whose checkpoint does not fit on the disk."""
    lost: int = 10
    """Runs of two processes of which one is killed in mid-step."""
    stopped: int = 4
    """Runs of two processes of which one stops answering."""
    torchruns: int = 5
    """Runs under torchrun with a process that kills itself in its first `suicides` lives."""
    suicides: int = 2
    rank_changes: int = 5
    """Runs that go on with one process instead of two, then with four."""
    checkpoint_seconds: float = 0.02
    """From one checkpoint of a run to the next."""
    seed: int = 0


@dataclass(frozen=True)
class Setup:
    """How a run is made."""

    engine: EngineName
    ranks: int = 1
    asynchronous: bool = False
    learning_rate: float = 0.01

    def __str__(self) -> str:
        saves = ", asynchronous saves" if self.asynchronous else ""
        return f"{self.engine}, {self.ranks} process{'es' if self.ranks > 1 else ''}{saves}"


# The first has its best epoch before the last, so that the last checkpoints need an older one, at rates that were cut.
SETUPS = (Setup("exact", learning_rate=0.1), Setup("fused"), Setup("fused", 2), Setup("fused", asynchronous=True))
TWO = SETUPS[2]


# ---- what runs in the processes of a run


@dataclass(frozen=True)
class Life:
    """What the processes of a run do between a start and an end."""

    setup: Setup
    data: Path
    folder: Path
    checkpoint_seconds: float | None = 0.02  # None: no checkpoints
    timeout: float = 60.0
    on_batch: Callable[[int], None] = lambda number: None  # called as the loader hands out its n-th batch
    on_saved: Callable[[int], None] = lambda number: None  # called after the n-th step of this life, and its checkpoint
    count_rows: bool = False


class WatchedLoader(ctr.Loader):
    """A `Loader` that says which batch it is about to hand out in this life."""

    def watch(self, on_batch: Callable[[int], None]) -> WatchedLoader:
        self._on_batch, self._handed_out = on_batch, 0
        return self

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self._on_batch(self._handed_out)
            self._handed_out += 1
            yield batch


def train(life: Life) -> dict[str, Any]:
    """A run, from where it was left to its end."""
    setup, folder = life.setup, life.folder
    torch.set_num_threads(1)
    distributed.TIMEOUT = datetime.timedelta(seconds=life.timeout)
    if setup.ranks > 1:
        distributed.init_process_group(torch.device("cpu"))
    torch.manual_seed(1)
    model = models.build(models.for_engine(CONFIG, setup.engine), ctr.Schema.load(life.data))
    engine = make_engine(
        model,
        setup.engine,
        learning_rate=setup.learning_rate,
        embedding_learning_rate=0.05,
        sharding="row_wise" if setup.engine == "fused" and setup.ranks > 1 else "auto",
    )
    rank = distributed.rank()
    torch.manual_seed(1 + rank)
    share = {"batch_size": BATCH // setup.ranks, "rank": rank, "world_size": setup.ranks}

    def on_batch(number: int) -> None:
        (folder / f"training-{rank}").touch()
        life.on_batch(number)

    loader = WatchedLoader(life.data, "train", shuffle=True, seed=1, **share).watch(on_batch)
    valid = ctr.Loader(life.data, "valid", **{**share, "batch_size": 2000 // setup.ranks})
    call_after_steps(engine, life.on_saved)
    rows: Counter[str] = Counter()
    if life.count_rows:
        count_rows(engine, loader, rows)
    with contextlib.ExitStack() as stack, (folder / "damage.log").open("a") as log:
        checkpoints = None
        if life.checkpoint_seconds is not None:
            checkpoints = ctr.Checkpoints(
                folder / "checkpoints", asynchronous=setup.asynchronous, log=lambda text: print(text, file=log)
            )
            stack.enter_context(checkpoints)
        if life.count_rows:
            path = folder / f"rows-{setup.ranks}-{rank}.json"
            stack.callback(lambda: path.write_text(json.dumps(rows)))
        history = ctr.fit(
            engine,
            loader,
            valid,
            max_epochs=EPOCHS,
            checkpoints=checkpoints,
            checkpoint_seconds=life.checkpoint_seconds or 0.0,
            console=Console(quiet=True),
        )
    curve = [
        [line.epoch, line.train_loss, line.valid_auc, line.valid_log_loss, line.learning_rate]
        for line in history.epochs
    ]
    own = hashlib.sha256()
    for name, value in sorted(engine.state().items()):
        parts = value.parts if isinstance(value, ctr.sharding.Shards) else (((0,) * value.dim(), value),)
        for offsets, part in sorted(parts, key=lambda pair: pair[0]):
            own.update(f"{name} {offsets} {tuple(part.shape)}".encode())
            own.update(part.detach().reshape(-1).view(torch.uint8).numpy())
    everything = json.dumps([distributed.gather(own.hexdigest()), curve, history.best_epoch])
    return {"hash": hashlib.sha256(everything.encode()).hexdigest(), "auc": max(line[2] for line in curve)}


def row_keys(batch: Batch) -> list[str]:
    """What each row holds, without those of padding."""
    columns = [[values.tolist() for values in jagged.to_dense()] for jagged in batch.sparse.to_dict().values()]
    rows = zip(zip(*columns), batch.dense.tolist(), batch.labels.tolist(), batch.weights.tolist())
    return [hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in rows if row[-1]]


def count_rows(engine: Any, loader: ctr.Loader, rows: Counter[str]) -> None:
    """Count, as "EPOCH ROW", the rows of the batches that `engine` has trained on."""
    plain = engine.train

    def counting(batches: Any) -> Any:
        epoch = loader.epoch
        for batch, loss in plain(batches):
            rows.update(f"{epoch} {key}" for key in row_keys(batch))
            yield batch, loss

    engine.train = counting


def call_after_steps(engine: Any, on_saved: Callable[[int], None]) -> None:
    """When the engine is asked for one more step, what follows a step has been done."""
    plain, steps = engine.train, itertools.count(1)

    def watching(batches: Any) -> Any:
        for pair in plain(batches):
            yield pair
            on_saved(next(steps))

    engine.train = watching


def live(life: Life, rank: int, port: int) -> None:
    """One process of a run: `train`, and write down how it ended."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(OUTSIDE))
    log = os.open(life.folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if life.setup.ranks > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": life.setup.ranks, "RANK": rank}
        os.environ.update({name: str(value) for name, value in where.items()})
    try:
        result = train(life)
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (life.folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise
    if rank == 0:
        (life.folder / "result.json").write_text(json.dumps(result))


# ---- what runs in the process that injects the faults, which forks and so must have no threads of its own


@contextlib.contextmanager
def started(life: Life) -> Iterator[list[BaseProcess]]:
    """The processes of a run; dead at the end of the block, whatever happened."""
    life.folder.mkdir(parents=True, exist_ok=True)
    for name in ("training-*", "error-*", "result.json"):
        for path in life.folder.glob(name):
            path.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORK.Process(target=live, args=(life, rank, port)) for rank in range(life.setup.ranks)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid:
                process.kill()
                process.join()


class NotSurvivedError(Exception):
    """What happened instead."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise NotSurvivedError(what)


def exit_codes(processes: list[BaseProcess], limit: float = PATIENCE) -> list[int | None]:
    """How they end by themselves; None for one that does not."""
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def error_of(folder: Path, rank: int) -> str:
    path = folder / f"error-{rank}"
    return path.read_text() if path.exists() else ""


def to_the_end(life: Life) -> dict[str, Any]:
    """Nothing happens to it."""
    with started(life) as processes:
        codes = exit_codes(processes)
        errors = [error_of(life.folder, rank) for rank in range(life.setup.ranks)]
    expect(not any(codes), f"exit codes {codes}, {errors}")
    result: dict[str, Any] = json.loads((life.folder / "result.json").read_text())
    return result


def check_end(life: Life, expected: str) -> None:
    found = to_the_end(life)["hash"]
    expect(found == expected, f"ended with other bits ({found[:8]}, undisturbed {expected[:8]})")


def wait_for(paths: list[Path]) -> None:
    end = time.monotonic() + PATIENCE
    while not all(path.exists() for path in paths):
        expect(time.monotonic() < end, f"no sign of life: {paths}")
        time.sleep(0.002)


def in_training(life: Life) -> None:
    """Return when each process has its first batch."""
    wait_for([life.folder / f"training-{rank}" for rank in range(life.setup.ranks)])


@dataclass
class Row:
    """Of the table."""

    fault: str
    trials: int = 0
    survived: int = 0
    injected: int = 0
    seconds: float = 0.0
    remarks: dict[str, float] = field(default_factory=dict)

    def count(self, remark: str, by: int) -> None:
        self.remarks[remark] = self.remarks.get(remark, 0) + by

    def most(self, remark: str, value: float) -> None:
        self.remarks[remark] = max(self.remarks.get(remark, 0.0), round(value, 4))


class Suite:
    """All faults, one after another; `rows` has what came of them, `failures` what was not survived."""

    def __init__(self, trials: Trials, folder: Path) -> None:
        self.trials, self.folder = trials, folder
        self.data = folder / "data"
        self.rows: list[Row] = []
        self.failures: list[str] = []
        preparing = FORK.Process(target=prepare, args=(self.data,))
        preparing.start()
        preparing.join()
        import_all((self.data / "imported").read_text().split())
        be_ready()
        self.references: dict[Setup, dict[str, Any]] = {}
        self.seconds: dict[Setup, float] = {}  # of a run with its checkpoints
        self.snapshots: dict[int, Path] = {}  # by the step in which the run was killed

    def life(self, setup: Setup, name: str, **options: Any) -> Life:
        options = {"checkpoint_seconds": self.trials.checkpoint_seconds, **options}
        return Life(setup, self.data, self.folder / name, **options)

    def reference(self, setup: Setup) -> str:
        """The hash of an undisturbed run without checkpoints; those of one with checkpoints must be the same."""
        if setup not in self.references:
            name = f"reference-{len(self.references)}"
            self.references[setup] = to_the_end(self.life(setup, name, checkpoint_seconds=None))
            start = time.monotonic()
            check_end(self.life(setup, name), self.references[setup]["hash"])
            self.seconds[setup] = time.monotonic() - start
        return str(self.references[setup]["hash"])

    def run(self, fault: str, count: int, trial: Callable[[random.Random, Life, Row], None], *setups: Setup) -> None:
        """`count` trials, over the setups in turn."""
        for index, setup in enumerate(setups):
            own = count // len(setups) + (index < count % len(setups))
            if not own:
                continue
            self.reference(setup)
            row = Row(f"{fault}: {setup}")
            start = time.monotonic()
            for number in range(own):
                name = re.sub(r"\W+", "-", f"{row.fault} {number}")
                life = self.life(setup, name)
                row.trials += 1
                try:
                    trial(random.Random(f"{self.trials.seed} {name}"), life, row)
                    row.survived += 1
                    shutil.rmtree(life.folder, ignore_errors=True)
                except NotSurvivedError as what:
                    self.failures.append(f"{name}: {what} (see {life.folder})")
            row.seconds = time.monotonic() - start
            self.rows.append(row)
            print(f"{row.fault}: {row.survived} of {row.trials} survived", file=sys.stderr)

    def all(self) -> None:
        trials = self.trials
        self.run("kill -9", trials.kills, self.kill, *reversed(SETUPS))  # few are for those with most that can go wrong
        self.run("SIGTERM", trials.terminations, self.terminate, TWO, SETUPS[3], SETUPS[0], SETUPS[1])
        self.run("gone on with the last step of an epoch", trials.last_steps, self.last_step, TWO, SETUPS[1])
        damages = {"flipped bit": trials.flips, "truncated": trials.truncations, "swapped": trials.swaps}
        for kind, count in damages.items():
            self.run(f"checkpoint {kind}", count, partial(self.damage, kind), TWO)
        self.run("full disk", trials.full_disks, self.fill_disk, SETUPS[0], TWO, SETUPS[3])
        self.run("one of two killed in mid-step", trials.lost, self.lose, TWO, Setup("exact", 2))
        self.run("one of two stopped", trials.stopped, self.stop, TWO)
        self.run("torchrun, a process kills itself", trials.torchruns, self.torchrun, TWO)
        self.run("2, then 1, then 4 processes", trials.rank_changes, self.change_ranks, TWO, Setup("exact", 2))

    def kill(self, chance: random.Random, life: Life, row: Row) -> None:
        """SIGKILL for one of the processes, one to three times."""
        kills, wanted = 0, chance.randint(1, 3)
        while kills < wanted:
            with started(life) as processes:
                victim = chance.choice(processes)
                victim.join(chance.uniform(0.05, 1.0) * self.seconds[life.setup])
                if victim.exitcode is not None:  # it was faster
                    exit_codes(processes)
                    if not kills:
                        shutil.rmtree(life.folder)
                        continue
                    break
                victim.kill()
                killed = time.monotonic()
                others = [process for process in processes if process is not victim]
                codes = exit_codes(others)
                expect(None not in codes, "one was killed, and the other hangs")
                if others:
                    row.most("seconds until the other ended", time.monotonic() - killed)
            kills += 1
            row.injected += 1
            left = [path.name for path in (life.folder / "checkpoints").glob(".*")]
            row.count("in a save", bool(left))
        check_end(life, self.reference(life.setup))

    def terminate(self, chance: random.Random, life: Life, row: Row) -> None:
        """SIGTERM for one of the processes: all save, and end with exit code 143."""
        for _ in range(20):
            with started(life) as processes:
                in_training(life)
                victim = chance.choice(processes)
                victim.join(chance.uniform(0.0, 0.8) * self.seconds[life.setup])
                if victim.exitcode is None:
                    victim.terminate()
                codes = exit_codes(processes)
            if set(codes) == {143}:
                break
            expect(OUTSIDE in codes or not any(codes), f"exit codes {codes} after SIGTERM, expected 143")
            shutil.rmtree(life.folder)  # it came too late
        else:
            raise NotSurvivedError("twenty runs ended before they could be told to")
        row.injected += 1
        check_end(life, self.reference(life.setup))

    def last_step(self, chance: random.Random, life: Life, row: Row) -> None:
        """Each process is killed when the step before has been saved."""
        last = chance.choice((STEPS, 2 * STEPS))
        killed = replace(life, checkpoint_seconds=0.0, on_saved=partial(kill_self, last - 1))
        with started(killed) as processes:
            exit_codes(processes)
        newest = read_manifest(life.folder / "checkpoints" / "LATEST")
        expect(newest["step"] == last - 1, f"the newest checkpoint is of step {newest['step']}, expected {last - 1}")
        row.injected += 1
        check_end(life, self.reference(life.setup))

    def fill_disk(self, chance: random.Random, life: Life, row: Row) -> None:
        """A rank cannot make files longer, from a random step on: the error says how much is needed."""
        step, limit = chance.randrange(3, EPOCHS * STEPS), chance.randrange(4000)
        rank = chance.randrange(life.setup.ranks)

        def on_batch(number: int) -> None:
            if number == step and distributed.rank() == rank:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        with started(replace(life, checkpoint_seconds=0.0, on_batch=on_batch)) as processes:
            codes = exit_codes(processes)
            errors = [error_of(life.folder, rank) for rank in range(life.setup.ranks)]
        expect(set(codes) == {1}, f"exit codes {codes}, expected 1")
        for error in errors:
            expect(re.search(r"^CheckpointError: .*a checkpoint needs \d+ bytes, \d+ are free", error), error)
        left = [path.name for path in (life.folder / "checkpoints").glob(".*")]
        expect(not left, f"the failed save left {left}")
        row.injected += 1
        check_end(life, self.reference(life.setup))
        expect(not (life.folder / "damage.log").read_text(), "earlier checkpoints are not whole")

    def lose(self, chance: random.Random, life: Life, row: Row) -> None:
        """SIGKILL for one of two in mid-step: the other says so, and ends."""
        took = self._other_ends(life, chance, signal.SIGKILL)
        row.injected += 1
        row.most("seconds until the other ended", took)
        check_end(life, self.reference(life.setup))

    def stop(self, chance: random.Random, life: Life, row: Row) -> None:
        """SIGSTOP for one of two: the other waits for CTRLIB_TIMEOUT seconds, says so, and ends."""
        timeout = 4.0
        took = self._other_ends(replace(life, timeout=timeout), chance, signal.SIGSTOP)
        expect(took < timeout + 4, f"ended after {took:.1f} seconds, with a timeout of {timeout}")
        row.injected += 1
        row.most(f"seconds until the other ended, CTRLIB_TIMEOUT={timeout:g}", took)
        check_end(life, self.reference(life.setup))

    def _other_ends(self, life: Life, chance: random.Random, fault: signal.Signals) -> float:
        """Seconds from the fault of a random rank of two to the end of the other, in `LostProcessError`."""
        with started(life) as processes:
            in_training(life)
            rank = chance.randrange(2)
            time.sleep(chance.uniform(0.0, 0.3) * self.seconds[life.setup])
            os.kill(processes[rank].pid or 0, fault)
            start = time.monotonic()
            (code,) = exit_codes([processes[1 - rank]])
            took = time.monotonic() - start
            error = error_of(life.folder, 1 - rank)
        expect(code == 1, f"the other's exit code is {code}, expected 1")
        expect(error.startswith("LostProcessError: ") and "Start the same command again" in error, error)
        return took

    def torchrun(self, chance: random.Random, life: Life, row: Row) -> None:
        """A random rank kills itself at a random step of its first lives; torchrun starts all anew."""
        suicides = [(chance.randrange(2), chance.randrange(1, STEPS)) for _ in range(self.trials.suicides)]
        life.folder.mkdir()
        script = life.folder / "script.py"
        paths = {"tests": str(Path(__file__).parent), "data": str(life.data), "folder": str(life.folder)}
        script.write_text(SCRIPT.format(suicides=suicides, **paths))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with (life.folder / "output").open("w") as output:
            agent = subprocess.Popen([*command, "--max-restarts", "3", str(script)], stdout=output, stderr=output)
            try:
                code = agent.wait(4 * PATIENCE)
            except subprocess.TimeoutExpired:
                raise NotSurvivedError("torchrun hangs") from None
            finally:
                agent.terminate()  # and it ends its processes
                agent.wait()
        expect(code == 0, f"torchrun ended with {code}")
        result = json.loads((life.folder / "result.json").read_text())
        lives = len(list(life.folder.glob("life-*")))
        expect(lives == 1 + len(suicides), f"{lives} lives, expected {1 + len(suicides)}")
        row.injected += len(suicides)
        expect(result["hash"] == self.reference(life.setup), "ended with other bits")

    def change_ranks(self, chance: random.Random, life: Life, row: Row) -> None:
        """Ended by SIGTERM twice, and gone on with other numbers of processes: each row once an epoch."""
        step = 0
        for ranks in (2, 1, 4):
            step = chance.randrange(3, STEPS + 3)

            def on_batch(number: int, last: int = step) -> None:
                if number == last and distributed.rank() == 0:
                    os.kill(os.getpid(), signal.SIGTERM)

            setup = replace(life.setup, ranks=ranks)
            options: dict[str, Any] = {} if ranks == 4 else {"on_batch": on_batch}
            with started(replace(life, setup=setup, count_rows=True, **options)) as processes:
                codes = exit_codes(processes)
                errors = [error_of(life.folder, rank) for rank in range(ranks)]
            expect(set(codes) == ({0} if ranks == 4 else {143}), f"{ranks} processes: exit codes {codes}, {errors}")
        row.injected += 2
        rows: Counter[str] = Counter()
        for path in life.folder.glob("rows-*.json"):
            rows.update(json.loads(path.read_text()))
        once = json.loads((self.data / "rows.json").read_text())
        expected = Counter({f"{epoch} {key}": count for epoch in range(EPOCHS) for key, count in once.items()})
        missing, twice = (expected - rows).total(), (rows - expected).total()
        expect(not missing and not twice, f"{missing} rows were left out, {twice} trained too often")
        found = json.loads((life.folder / "result.json").read_text())["auc"]
        difference = abs(found - self.references[life.setup]["auc"])
        row.most("largest AUC difference", difference)
        expect(difference < 0.01, f"AUC {found}, undisturbed {self.references[life.setup]['auc']}")

    def damage(self, kind: str, chance: random.Random, life: Life, row: Row) -> None:
        """The damaged file is named, and the newest checkpoint that does not need it is read."""
        step = chance.choice((STEPS // 2, STEPS + 4, 2 * STEPS + 2, 2 * STEPS + 6))
        if step not in self.snapshots:
            self.snapshots[step] = self.snapshot(step)
        snapshot = self.snapshots[step]
        folder = life.folder / "checkpoints"
        shutil.copytree(snapshot, folder)
        manifests = sorted(map(read_manifest, folder.glob("step-*/MANIFEST")), key=lambda manifest: -manifest["save"])
        broken = harm(folder, manifests, kind, chance)
        good = next(each["folder"] for each in manifests if broken.parts[0] not in (each["folder"], each["needs"]))
        (found, log), (expected, _) = in_child(lambda: (load(snapshot, folder), load(snapshot, snapshot, good)))
        expect(found == expected, f"{broken} is damaged, and {good} was not what was read; it said {log}")
        expect(any(line.startswith(f"{broken}: ") for line in log), f"{broken} is damaged, and it said {log}")
        row.injected += 1
        row.count("older checkpoint read", good != manifests[0]["folder"])
        if row.trials <= self.trials.resumed // 3:
            check_end(life, self.reference(life.setup))
            expect(f"{broken}: " in (life.folder / "damage.log").read_text(), f"nothing said that {broken} is damaged")
            row.count("went on to the end", 1)

    def snapshot(self, step: int) -> Path:
        """The checkpoints of a run that was killed in that step and had saved after each."""
        life = self.life(TWO, f"snapshot-{step}", checkpoint_seconds=0.0, on_batch=partial(kill_self, step))
        with started(life) as processes:
            exit_codes(processes)
        return life.folder / "checkpoints"


def kill_self(step: int, number: int) -> None:
    if number == step:
        os.kill(os.getpid(), signal.SIGKILL)


def read_manifest(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text().partition("\n")[2])
    return content


def harm(folder: Path, manifests: list[dict[str, Any]], kind: str, chance: random.Random) -> Path:
    """Damage something that reading the newest checkpoint depends on; returns what, relative to `folder`."""
    names = [name for name in (manifests[0]["folder"], manifests[0]["needs"]) if name]
    files = [folder / "LATEST", *(path for name in names for path in sorted((folder / name).iterdir()))]
    if kind == "swapped" and chance.random() < 0.2:
        name = chance.choice(names)
        shutil.rmtree(folder / name)
        return Path(name)
    path = chance.choice(files)
    data = path.read_bytes()
    if kind == "flipped bit":
        place, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
    elif kind == "truncated":
        path.write_bytes(data[: chance.randrange(len(data))])
    else:
        others = [*folder.glob(f"*/{path.name}"), *path.parent.glob(path.name.translate(str.maketrans("01", "10")))]
        others = [other for other in others if other.read_bytes() != data]
        if others and chance.random() < 0.7:
            shutil.copyfile(chance.choice(others), path)
        else:
            path.unlink()
    return path.relative_to(folder)


def load(model: Path, folder: Path, name: str | None = None) -> tuple[str, list[str]]:
    """A hash of all that `Checkpoints.load` reads from a folder, and what it says; `model` is an undamaged one."""
    log: list[str] = []
    index = json.loads(next(model.glob("step-*/tensors.json")).read_text())
    tensors = {key: torch.zeros(each["size"], dtype=getattr(torch, each["dtype"])) for key, each in index.items()}
    state = ctr.Checkpoints(folder, log=log.append).load(tensors, name=name)
    digest = hashlib.sha256(json.dumps(state).encode())
    for tensor in tensors.values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest(), log


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, in a child: here it would start threads."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sender.send(work()))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise NotSurvivedError("reading failed; its traceback is above") from None
    finally:
        child.join()


SCRIPT = """
import json, os, signal, sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import faults

folder, suicides = Path({folder!r}), {suicides}
life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
(folder / f"life-{{life}}").touch()


def on_batch(number):
    if life < len(suicides) and suicides[life] == (rank, number):
        os.kill(os.getpid(), signal.SIGKILL)


result = faults.train(faults.Life(faults.TWO, Path({data!r}), folder, on_batch=on_batch))
if rank == 0:
    (folder / "result.json").write_text(json.dumps(result))
"""


def prepare(folder: Path) -> None:
    frame, _ = generate(TEACHER)
    splits = {"train": frame.head(TRAIN_ROWS), "valid": frame.tail(-TRAIN_ROWS)}
    ctr.prepare(splits, folder, features=TEACHER.features(), log=None)
    rows = Counter(key for batch in ctr.Loader(folder, "train", batch_size=500) for key in row_keys(batch))
    (folder / "rows.json").write_text(json.dumps(rows))
    models.build(CONFIG, ctr.Schema.load(folder))
    (folder / "imported").write_text("\n".join(sys.modules))  # what those would import that are forked later


def show(rows: list[Row]) -> Table:
    table = Table("fault", "runs", "injected", "survived", "seconds", "of these, at most")
    for row in rows:
        remarks = ", ".join(f"{name}: {value:g}" for name, value in row.remarks.items())
        colour = "green" if row.survived == row.trials else "bold red"
        numbers = (str(row.trials), str(row.injected), f"[{colour}]{row.survived}[/]", f"{row.seconds:.0f}")
        table.add_row(row.fault, *numbers, remarks)
    return table


def main(trials: Trials) -> int:
    folder = Path(tempfile.mkdtemp(prefix="ctrlib-faults-"))
    suite = Suite(trials, folder)
    suite.all()
    Console().print(show(suite.rows))
    for failure in suite.failures:
        print(failure)
    if not suite.failures:
        shutil.rmtree(folder)
    return bool(suite.failures)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Trials, description=__doc__)))
