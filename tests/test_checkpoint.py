"""Checkpoints: any cut reads any other, and kills, full disks and damage lose nothing silently."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import threading
import time
import traceback
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from ctrlib.manifest import write_new, write_sealed
from ctrlib.training import checkpoint, tensor_files
from ctrlib.training.checkpoint import CheckpointError, Checkpoints, Shards

CUTS = ("plain", "table", "row", "column")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool)


def by_rank(num_ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """`run_ranks`, of a function of the rank."""
    return run_ranks(num_ranks, lambda: work(dist.get_rank()))


def fork(work: Callable[[], None]) -> int:
    """The id of a child that does `work`: to be killed, or to end with status 0, or with 1 after an error."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every pattern of bits may come, NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    num_bytes = math.prod(shape) * dtype.itemsize
    flat = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


def model() -> dict[str, Tensor]:
    """5 x 6 tables of every dtype, one with fewer rows than ranks, one with no rows, a vector, a cube and scalars."""
    tables = {f"tables.{str(dtype)[6:]}": random_bits((5, 6), dtype, i) for i, dtype in enumerate(DTYPES)}
    shapes = {"few": (2, 8), "empty": (0, 4), "vector": (7,), "cube": (3, 2, 5), "scalar": ()}
    others = {key: random_bits(shape, torch.float32, 10 + i) for i, (key, shape) in enumerate(shapes.items())}
    return {**tables, **others, "flag": torch.tensor(True), "count": torch.tensor(2**62 + 1)}


def spans(total: int, count: int) -> list[tuple[int, int]]:
    """Rows a rank as TorchRec gives them: ceil(total / count), so that the last ranks may have none."""
    each = -(-total // count)
    return [(min(total, i * each), min(total, (i + 1) * each)) for i in range(count)]


def cut(tensors: dict[str, Tensor], how: str, rank: int, num_ranks: int) -> dict[str, Tensor | Shards]:
    """The parts of each tensor that a rank holds (views). Columns are cut in two per rank: several parts of one."""
    parts: dict[str, Tensor | Shards] = {}
    for i, (key, tensor) in enumerate(tensors.items()):
        zeros = (0,) * tensor.dim()
        if how == "plain" or (how != "table" and not tensor.dim()):
            parts[key] = tensor
        elif how == "table":
            parts[key] = Shards(tuple(tensor.shape), ((zeros, tensor),) if i % num_ranks == rank else ())
        else:
            dim = 0 if how == "row" else tensor.dim() - 1
            cuts = [spans(tensor.shape[dim], num_ranks)[rank]]
            if how == "column":
                cuts = spans(tensor.shape[dim], 2 * num_ranks)[rank::num_ranks]
            parts[key] = Shards(
                tuple(tensor.shape),
                tuple(((*zeros[:dim], a, *zeros[dim + 1 :]), tensor.narrow(dim, a, b - a)) for a, b in cuts),
            )
    return parts


def parts_of(tensor: Tensor | Shards) -> list[tuple[tuple[int, ...], Tensor]]:
    return list(tensor.parts) if isinstance(tensor, Shards) else [((0,) * tensor.dim(), tensor)]


def fresh(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: random_bits(tuple(tensor.shape), tensor.dtype, 99) for key, tensor in tensors.items()}


def test_every_cut_reads_every_other_bit_for_bit(tmp_path):
    """4 cuts at 1, 2 and 4 ranks, each read by all of them: 144 ways."""
    expected = model()
    saved = [(how, count) for count in (1, 2, 4) for how in CUTS]

    for count in (1, 2, 4):

        def save(rank, count=count):
            for how in CUTS:
                with Checkpoints(tmp_path / f"{how}{count}") as checkpoints:
                    checkpoints.save(3, cut(expected, how, rank, count), {"rank": rank})

        by_rank(count, save)
    for count in (1, 2, 4):

        def load(rank, count=count):
            compared = 0
            for source in saved:
                checkpoints = Checkpoints(tmp_path / "{}{}".format(*source))
                for how in CUTS:
                    # Whole tensors of which this rank passes its parts: those must be filled, and nothing else.
                    whole = fresh(expected)
                    untouched = fresh(expected)
                    mine = cut(whole, how, rank, count)
                    assert checkpoints.load(mine) == {"rank": 0}
                    for key, tensor in mine.items():
                        for offsets, part in parts_of(tensor):
                            box = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape))
                            assert bits(part) == bits(expected[key][box]), (source, how, key)
                            untouched[key][box] = expected[key][box]
                            compared += part.numel()
                        assert bits(whole[key]) == bits(untouched[key]), (source, how, key)
                checkpoints.close()
            return compared

        compared = by_rank(count, load)
        num_elements = sum(tensor.numel() for tensor in expected.values())
        cuts_of_one = len(CUTS) - 1  # each of them in parts, over all ranks; scalars are whole in "row" and "column"
        scalars = sum(not tensor.dim() for tensor in expected.values())
        assert sum(compared) == len(saved) * (
            count * num_elements + cuts_of_one * num_elements + 2 * (count - 1) * scalars
        )


def test_large_tensors_are_copied_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK", 100)
    expected = model()
    Checkpoints(tmp_path).save(1, cut(expected, "column", 0, 1), {})
    for how in CUTS:
        got = fresh(expected)
        assert Checkpoints(tmp_path).load(cut(got, how, 0, 1)) == {}
        assert all(bits(got[key]) == bits(expected[key]) for key in expected)
    whole = Path(tmp_path / "step-000000001" / "tensors-0.bin").stat().st_size
    assert whole == sum(tensor.nbytes for tensor in expected.values())


def test_parameters_and_transposed_tensors(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    Checkpoints(tmp_path).save(1, {"a": weight, "b": weight.t()}, {})
    a, b = torch.nn.Parameter(torch.zeros(2, 3)), torch.zeros(2, 3).t()
    Checkpoints(tmp_path).load({"a": a, "b": b})
    assert torch.equal(a, weight) and torch.equal(b, weight.t()) and a.requires_grad


def small(step: int) -> dict[str, Tensor]:
    return {"table": random_bits((9, 4), torch.float32, step), "bias": random_bits((3,), torch.float64, 1000 + step)}


def check_loads(folder: Path, step: int, log: list[str] | None = None, **options: str) -> None:
    got = fresh(small(0))
    assert Checkpoints(folder, log=(log if log is not None else []).append).load(got, **options) == {"step": step}
    assert all(bits(got[key]) == bits(tensor) for key, tensor in small(step).items())


def make(folder: Path, *steps: int, keep_last: int = 2, needs: dict[int, int] | None = None) -> None:
    """A checkpoint a step; `needs` tells which step needs which."""
    with Checkpoints(folder, keep_last=keep_last) as checkpoints:
        for step in steps:
            needed = (needs or {}).get(step)
            name = checkpoints.save(step, small(step), {"step": step}, needs=None if needed is None else named(needed))
            assert name == checkpoints.last == named(step)


def named(step: int) -> str:
    return f"step-{step:09d}"


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Steps 100 and 200, of two ranks."""
    folder = tmp_path_factory.mktemp("two")

    def save(rank):
        with Checkpoints(folder) as checkpoints:
            for step in (100, 200):
                checkpoints.save(step, cut(small(step), "row", rank, 2), {"step": step})

    by_rank(2, save)
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_layout(two):
    names = ["MANIFEST", "state.json", "tensors-0.bin", "tensors-1.bin", "tensors.json"]
    expected = ["LATEST"] + [f"step-000000{step}/{name}" for step in (100, 200) for name in names]
    assert [str(path.relative_to(two)) for path in files(two)] == expected


def check_damaged(folder: Path, path: Path) -> str:
    """One file of two steps was tampered with: the load says which, and gives the good step. Returns what it said."""
    log: list[str] = []
    damaged_newest = path.parent.name == "step-000000200"
    check_loads(folder, 100 if damaged_newest else 200, log)
    name = "LATEST" if path.name == "LATEST" else f"{path.parent.name}/{path.name}"
    if damaged_newest or path.name in ("LATEST", "MANIFEST"):
        assert [line for line in log if line.startswith(f"{name}: ")], log
    else:  # an older step: not looked at until the newer one goes
        assert not log
        shutil.rmtree(folder / "step-000000200")
        untouched, got = fresh(small(0)), fresh(small(0))
        with pytest.raises(CheckpointError, match=f"{name}: "):
            Checkpoints(folder, log=log.append).load(got)
        assert all(bits(got[key]) == bits(untouched[key]) for key in got)
        assert [line for line in log if line.startswith(f"{name}: ")], log
    return " ".join(log)


def test_100_flipped_bits(two, tmp_path):
    chance = random.Random(0)
    originals = files(two)
    for trial in range(100):
        folder = tmp_path / str(trial)
        shutil.copytree(two, folder)
        path = folder / originals[trial % len(originals)].relative_to(two)
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        check_damaged(folder, path)


def test_20_truncations(two, tmp_path):
    chance = random.Random(1)
    originals = files(two)
    for trial in range(20):
        folder = tmp_path / str(trial)
        shutil.copytree(two, folder)
        path = folder / originals[trial % len(originals)].relative_to(two)
        os.truncate(path, chance.randrange(path.stat().st_size))
        check_damaged(folder, path)


def test_20_missing_and_foreign_files(two, tmp_path):
    """A file is gone, or is that of the other step, of the other rank, or of another training's same step."""
    other = tmp_path / "other"

    def save(rank):
        with Checkpoints(other) as checkpoints:
            for step in (100, 200):
                checkpoints.save(step, cut(small(step + 1), "row", rank, 2), {"step": step + 1})

    by_rank(2, save)
    originals = [path for path in files(two) if path.name != "LATEST"]
    for trial in range(30):
        folder = tmp_path / str(trial)
        shutil.copytree(two, folder)
        path = folder / originals[trial % len(originals)].relative_to(two)
        if trial < 10:
            path.unlink()
            assert "missing" in check_damaged(folder, path)
        elif trial < 20:
            step = "step-000000100" if path.parent.name == "step-000000200" else "step-000000200"
            data = (two / step / path.name).read_bytes()
            if data == path.read_bytes():  # the index of tensors of one shape
                assert path.name == "tensors.json"
                continue
            path.write_bytes(data)
            check_damaged(folder, path)
        else:
            data = (other / path.relative_to(folder)).read_bytes()
            if data == path.read_bytes():
                assert path.name == "tensors.json"
            elif path.name == "MANIFEST" and path.parent.name == "step-000000100":
                # Sound in itself, so that only its files show that it is foreign.
                path.write_bytes(data)
                shutil.rmtree(folder / "step-000000200")
                with pytest.raises(CheckpointError, match=r"step-000000100/tensors-0.bin: not what was written"):
                    Checkpoints(folder, log=[].append).load(small(0))
            else:
                path.write_bytes(data)
                check_damaged(folder, path)


def test_lost_folders_and_an_old_latest(two, tmp_path):
    folder = tmp_path / "lost"
    shutil.copytree(two, folder)
    shutil.rmtree(folder / "step-000000200")
    log: list[str] = []
    check_loads(folder, 100, log)
    assert log == ["step-000000200: missing, though LATEST names it"]
    (folder / "LATEST").unlink()
    check_loads(folder, 100, log)
    assert log[1:] == ["LATEST: missing"]
    shutil.rmtree(folder / "step-000000100")
    assert Checkpoints(folder).load(small(0)) is None
    shutil.copy(two / "LATEST", folder)
    with pytest.raises(CheckpointError, match="step-000000200: missing"):
        Checkpoints(folder, log=log.append).load(small(0))

    old = tmp_path / "old"
    make(old, 1)
    stale = (old / "LATEST").read_bytes()
    make(old, 2)
    (old / "LATEST").write_bytes(stale)
    log.clear()
    check_loads(old, 2, log)
    assert len(log) == 1 and "step-000000002 is newer" in log[0]

    renamed = tmp_path / "renamed"
    shutil.copytree(two, renamed)
    (renamed / "step-000000100").rename(renamed / "step-000000300")
    log.clear()
    check_loads(renamed, 200, log)
    assert log == ["step-000000300/MANIFEST: that of step-000000100"]


def test_all_damaged_names_all_and_copies_nothing(two, tmp_path):
    folder = tmp_path / "all"
    shutil.copytree(two, folder)
    for step in (100, 200):
        path = folder / f"step-000000{step}" / "tensors-1.bin"
        path.write_bytes(bytes(path.stat().st_size))

    def load(rank):
        got = fresh(small(0))
        log = []
        with Checkpoints(folder, log=log.append) as checkpoints, pytest.raises(CheckpointError) as caught:
            checkpoints.load(got)
        assert all(bits(got[key]) == bits(tensor) for key, tensor in fresh(small(0)).items())
        return str(caught.value), log

    texts, logs = zip(*by_rank(2, load))
    for text in texts:
        assert "step-000000100/tensors-1.bin: not what was written" in text
        assert "step-000000200/tensors-1.bin: not what was written" in text
    assert len(logs[0]) == 2 and not logs[1]  # once, not by each rank


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_not_run(two, tmp_path):
    folder, trap = tmp_path / "checkpoints", tmp_path / "exploded"
    shutil.copytree(two, folder)
    bomb = pickle.dumps(Bomb(trap))
    newest = folder / "step-000000200"
    for where in (folder, newest):
        (where / ".metadata").write_bytes(bomb)
    check_loads(folder, 200)

    # In place of a shard, by someone who can seal: raw bytes are all that a shard can be.
    path = newest / "tensors-0.bin"
    path.write_bytes(bomb)
    check_damaged(folder, path)
    manifest, _ = checkpoint._read_sealed(newest / "MANIFEST")
    manifest["files"][path.name] = write_new(tmp_path / "copy", [bomb])
    (newest / "MANIFEST").unlink()
    seal = write_sealed(newest / "MANIFEST", manifest)
    latest, _ = checkpoint._read_sealed(folder / "LATEST")
    (folder / "LATEST").unlink()
    write_sealed(folder / "LATEST", {**latest, "manifest": seal})
    got = fresh(small(0))
    assert Checkpoints(folder).load(got) == {"step": 200}
    assert bits(got["table"][:5]) == bomb[: 5 * 4 * 4]

    # And one that points out of its folder.
    index = json.loads((two / "step-000000200" / "tensors.json").read_text())
    index["table"]["parts"][0]["file"] = "../../exploded"
    (newest / "tensors.json").unlink()
    manifest["files"]["tensors.json"] = write_new(newest / "tensors.json", [json.dumps(index).encode()])
    (newest / "MANIFEST").unlink()
    seal = write_sealed(newest / "MANIFEST", manifest)
    (folder / "LATEST").unlink()
    write_sealed(folder / "LATEST", {**latest, "manifest": seal})
    with pytest.raises(CheckpointError, match="which is not in MANIFEST"):
        Checkpoints(folder).load(small(0))
    assert not trap.exists()
    pickle.loads(bomb)
    assert trap.exists()  # it would have been seen


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kill_9_at_any_moment(tmp_path, asynchronous):
    """What loads after a kill is whole, and not older than the last save that was reported done."""
    chance = random.Random(asynchronous)
    newest, needing = -1, 0
    seen = set()
    for trial in range(15):
        folder, report = tmp_path / "checkpoints", tmp_path / f"report{trial}"

        def train(start=newest + 1, report=report, folder=folder):
            with report.open("w") as done:
                checkpoints = Checkpoints(folder, asynchronous=asynchronous, keep_last=1 + start % 2)
                best = {"name": None, **(checkpoints.load(fresh(small(0))) or {})}["name"]
                for step in range(start, start + 10_000):
                    state = {"step": step, "name": None if step % 5 == 0 else best}
                    name = checkpoints.save(step, small(step), state, needs=state["name"])
                    best = name if step % 5 == 0 else best
                    if asynchronous and step % 2:
                        continue  # and be killed while the thread writes
                    checkpoints.wait()
                    os.write(done.fileno(), f"{step}\n".encode())

        pid = fork(train)
        end, saves = time.monotonic() + 30, chance.randrange(5)
        while time.monotonic() < end and (report.read_text().count("\n") if report.exists() else -1) < saves:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the training failed"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reported = [int(line) for line in report.read_text().split()]
        got = fresh(small(0))
        state = Checkpoints(folder, log=[].append).load(got)
        if state is None:
            assert not reported and newest == -1
            continue
        seen.add("+".join(sorted(re.sub(r"[\d-]+", "", path.name) for path in folder.iterdir())))
        assert state["step"] >= max([newest, *reported])
        assert all(bits(got[key]) == bits(tensor) for key, tensor in small(state["step"]).items())
        newest = state["step"]
        if state["name"]:
            best = Checkpoints(folder, log=[].append).load(got, name=state["name"])
            assert best["step"] % 5 == 0 and newest - best["step"] < 5
            needing += 1
    assert newest > 10 and needing > 3
    assert len(seen) > 1  # some kills left something behind
    make(folder, newest + 1)
    assert not list(folder.glob(".*"))  # and the next save cleared it away


STEPS_OF_A_SAVE = ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "unlink")


def test_kill_between_any_two_calls_to_the_file_system(tmp_path, monkeypatch):
    """A fourth save that needs the third, two to delete, killed before its 1st, 2nd ... call that changes the disk."""
    killed = 0
    while True:
        folder = tmp_path / str(killed)
        make(folder, 1, 2, 3, needs={2: 1})  # 1 is there for 2 alone

        def train(folder=folder, survive=killed):
            left = survive

            def counted(call):
                def wrapper(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **kwargs)

                return wrapper

            for name in STEPS_OF_A_SAVE:
                monkeypatch.setattr(os, name, counted(getattr(os, name)))
            Checkpoints(folder, keep_last=1).save(4, small(4), {"step": 4}, needs=named(3))

        _, status = os.waitpid(fork(train), 0)
        complete = (folder / named(4)).exists()
        check_loads(folder, 4 if complete else 3)
        check_loads(folder, 3, name=named(3))
        make(folder, 5, keep_last=2)
        check_loads(folder, 5)
        assert kept(folder) == ([3, 4, 5] if complete else [3, 5])
        assert not list(folder.glob(".*"))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert killed > 15


def test_a_file_system_that_refuses_to_grow_a_file(tmp_path):
    """A write that fails half-way, in one rank of two: both raise, nothing is left, the step before loads."""
    big = {"table": torch.ones(1000, 100)}

    def save(rank):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, cut(small(1), "row", rank, 2), {"step": 1})
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            with pytest.raises(CheckpointError) as caught:
                checkpoints.save(2, cut(big, "row", rank, 2), {"step": 2})
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            names = sorted(path.name for path in tmp_path.iterdir())
            checkpoints.save(3, cut(small(3), "row", rank, 2), {"step": 3})
            return str(caught.value), names

    for text, names in by_rank(2, save):
        needed, free = map(int, re.findall(r"a checkpoint needs (\d+) bytes, (\d+) are free", text)[0])
        assert 400_000 < needed < 410_000 and free > 1000
        assert text.startswith("rank 1: no room in") and "File too large" in text
        assert names == ["LATEST", "step-000000001"]
    check_loads(tmp_path, 3)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_with_too_little_room(tmp_path, monkeypatch, asynchronous):
    make(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    with (
        Checkpoints(tmp_path, asynchronous=asynchronous) as checkpoints,
        pytest.raises(CheckpointError, match=r"needs \d{4} bytes, 100 are free; earlier ones are as they were"),
    ):
        checkpoints.save(2, small(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-000000001"]
    check_loads(tmp_path, 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_errors_of_the_disk_keep_what_was(tmp_path, monkeypatch, call, code):
    make(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        message = re.escape(os.strerror(code)) if code == errno.EIO else r"a checkpoint needs \d+ bytes, \d+ are free"
        with pytest.raises(CheckpointError, match=message):
            Checkpoints(tmp_path).save(2, small(2), {"step": 2})
    assert not list(tmp_path.glob(".step*"))
    check_loads(tmp_path, 2 if call == "replace" else 1)  # whole, and only LATEST not moved


def test_asynchronous_saves_copy_first(tmp_path):
    steps = 5
    with Checkpoints(tmp_path, asynchronous=True, keep_last=steps) as checkpoints:
        live = fresh(small(0))
        for step in range(steps):
            for key, tensor in small(step).items():
                live[key].copy_(tensor)
            state = {"step": step}
            checkpoints.save(step, {**live, "table": cut(live, "column", 0, 1)["table"]}, state)
            state["step"] = -1
            for tensor in live.values():
                tensor.fill_(7)
    for step in reversed(range(steps)):
        check_loads(tmp_path, step)
        shutil.rmtree(tmp_path / f"step-00000000{step}")


def test_asynchronous_saves_do_not_block_and_move_latest_last(tmp_path, monkeypatch):
    gate, started = threading.Event(), threading.Event()
    write = tensor_files.write_tensors

    def slow(*args):
        started.set()
        assert gate.wait(10)
        return write(*args)

    make(tmp_path, 1)
    monkeypatch.setattr(tensor_files, "write_tensors", slow)
    with Checkpoints(tmp_path, asynchronous=True) as checkpoints:
        checkpoints.save(2, small(2), {"step": 2})
        assert started.wait(10)
        check_loads(tmp_path, 1)
        gate.set()
        checkpoints.wait()
        check_loads(tmp_path, 2)


def test_asynchronous_errors_surface_on_all_ranks(tmp_path, monkeypatch):
    write = tensor_files.write_tensors

    def save(rank):
        texts = []
        with Checkpoints(tmp_path, asynchronous=True) as checkpoints:
            for ask in (checkpoints.wait, lambda: checkpoints.save(2, cut(small(2), "row", rank, 2), {"step": 2})):

                def fail(*args):
                    raise ValueError("planted")

                if rank == 1:
                    tensor_files.write_tensors = fail
                checkpoints.save(1, cut(small(1), "row", rank, 2), {"step": 1})
                with pytest.raises(CheckpointError) as caught:
                    ask()
                tensor_files.write_tensors = write
                texts.append(str(caught.value))
                checkpoints.wait()  # raised once
            assert not list(tmp_path.glob("*"))
            checkpoints.save(3, cut(small(3), "row", rank, 2), {"step": 3})
        return texts

    assert by_rank(2, save) == [["rank 1: ValueError('planted')"] * 2] * 2
    check_loads(tmp_path, 3)


def test_what_is_kept(tmp_path):
    make(tmp_path, 0, 1, 2, 3, 4, 5, needs={3: 2, 4: 2, 5: 2})
    assert kept(tmp_path) == [1, 2, 4, 5]  # 1, since the others stand on 2
    log: list[str] = []
    check_loads(tmp_path, 5, log)
    check_loads(tmp_path, 2, log, name=named(2))
    assert not log
    make(tmp_path, 6)
    assert kept(tmp_path) == [2, 5, 6]  # 5 still needs 2
    make(tmp_path, 7, 8, needs={7: 6, 8: 6})
    assert kept(tmp_path) == [2, 5, 6, 7, 8]  # as the two newest stand on 6, the newest that does not, with its own
    make(tmp_path, 9)
    assert kept(tmp_path) == [6, 8, 9]
    make(tmp_path, 10, 11, keep_last=1, needs={11: 10})
    assert kept(tmp_path) == [10, 11]
    make(tmp_path, 12, 13, keep_last=1, needs={12: 11, 13: 12})
    assert kept(tmp_path) == [12, 13]  # and not what 12 needs


def test_pruning_keeps_what_the_rule_says(tmp_path):
    """200 random sequences of saves with random needs, each from two objects: against the rule on a list."""
    chance = random.Random(4)
    kinds = set()
    for trial in range(200):
        folder = tmp_path / str(trial)
        keep_last = chance.choice((1, 2, 3))
        there: list[list[int]] = []  # of each on disk: its step, and the step that it needs
        for steps in (range(chance.randint(1, 5)), range(5, 5 + chance.randint(1, 5))):
            with Checkpoints(folder, keep_last=keep_last) as checkpoints:
                for step in steps:
                    needed = [] if chance.random() < 0.5 else chance.choices([pair[0] for pair in there] or [step])
                    needed = [each for each in needed if each != step]
                    checkpoints.save(step, {}, {}, needs=named(needed[0]) if needed else None)
                    there.append([step, *needed])
                    wanted = there[-keep_last:]
                    shared = [each for each in wanted[0] if all(each in pair for pair in wanted)]
                    others = [pair for pair in there if not set(pair) & set(shared)]
                    others = [pair for pair in others if all(each in [pair[0] for pair in there] for each in pair)]
                    if keep_last > 1 and shared and others:
                        wanted = [others[-1], *wanted]
                    there = [pair for pair in there if any(pair[0] in each for each in wanted)]
                    assert kept(folder) == [pair[0] for pair in there]
                    kinds.add((keep_last, len(wanted), len(there)))
                    if keep_last > 1 and len(wanted) > keep_last:  # whichever is lost, something is left
                        assert all(any(lost not in pair for pair in wanted) for lost in range(10))
        shutil.rmtree(folder)
    assert {(1, 1, 2), (2, 2, 4), (2, 3, 5), (3, 3, 6), (3, 4, 5)} <= kinds


def test_a_checkpoint_that_is_needed_must_be_there(tmp_path):
    make(tmp_path, 1, 2, 3)

    def save(rank):
        texts = []
        with Checkpoints(tmp_path, log=[].append) as checkpoints:
            for needs in (named(1), "../step-000000002", ""):
                with pytest.raises(CheckpointError) as caught:
                    checkpoints.save(4, small(4), {"step": 4}, needs=needs)
                texts.append(str(caught.value))
            assert checkpoints.last is None
            assert kept(tmp_path) == [2, 3]
            assert checkpoints.save(4, small(4), {"step": 4}, needs=named(2)) == named(4)
        return texts

    for texts in by_rank(2, save):
        assert all("missing from" in text and "['step-000000002', 'step-000000003']" in text for text in texts)
        assert "needs is 'step-000000001'" in texts[0]
    (tmp_path / named(2) / "MANIFEST").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"needs is 'step-000000002', which is missing from .* or damaged"):
        make(tmp_path, 5, needs={5: 2})


def test_a_training_that_went_back(tmp_path):
    """Steps count again from an older one: the last saved is the newest, also where its step was there before."""
    make(tmp_path / "sound", 10, 30, keep_last=3)
    make(tmp_path / "sound", 20, keep_last=3)
    check_loads(tmp_path / "sound", 20)
    shutil.rmtree(tmp_path / "sound")
    make(tmp_path, 10, 20, 30, keep_last=3)
    newest = tmp_path / "step-000000030"
    os.truncate(newest / "tensors-0.bin", 5)
    with Checkpoints(tmp_path, keep_last=2, log=[].append) as checkpoints:
        assert checkpoints.load(small(0)) == {"step": 20}
        checkpoints.save(25, small(25), {"step": 25})
        check_loads(tmp_path, 25)
        # The damaged one does not count as one of the two.
        assert sorted(path.name[-2:] for path in tmp_path.glob("step-*")) == ["20", "25", "30"]
        checkpoints.save(30, small(31), {"step": 31})
        check_loads(tmp_path, 31)
        assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000025", "step-000000030.2"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_newest_is_damaged_after_a_new_best(tmp_path, num_ranks):
    """4 is a new best; 3 still needs the best of its time, 1, and finds it."""
    make(tmp_path, 1, 2, 3, 4, needs={2: 1, 3: 1})
    assert kept(tmp_path) == [1, 3, 4]
    os.truncate(tmp_path / named(4) / "tensors-0.bin", 3)

    def load(rank):
        got, log = fresh(small(0)), []
        with Checkpoints(tmp_path, log=log.append) as checkpoints:
            assert checkpoints.load(got) == {"step": 3}
            assert checkpoints.last == named(3)
            assert checkpoints.load(got, name=named(1)) == {"step": 1}
            assert checkpoints.last == named(3)  # where the training stands
            assert all(bits(got[key]) == bits(tensor) for key, tensor in small(1).items())
            checkpoints.save(4, small(5), {"step": 5}, needs=named(1))
            assert checkpoints.last == "step-000000004.2"
        return log

    logs = by_rank(num_ranks, load)
    assert logs[0] and all(line.startswith("step-000000004/tensors-0.bin: ") for line in logs[0])
    assert not any(logs[1:])
    check_loads(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [*map(named, (1, 3, 4)), "step-000000004.2"]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("file", ["tensors-0.bin", "MANIFEST", None])
def test_a_checkpoint_is_of_no_use_without_what_it_needs(tmp_path, file, num_ranks):
    make(tmp_path, 1, 2, 3, 4, 5, keep_last=4, needs={2: 1, 4: 3, 5: 3})
    damaged = f"{named(3)}/{file}: " if file else f"{named(3)}: missing"
    shutil.rmtree(tmp_path / named(3)) if file is None else os.truncate(tmp_path / named(3) / file, 3)

    def load(rank):
        got, log = fresh(small(0)), []
        with Checkpoints(tmp_path, keep_last=1, log=log.append) as checkpoints:
            assert checkpoints.load(got, name=named(5)) == {"step": 5}  # by its name alone
            assert not log
            assert checkpoints.load(got) == {"step": 2}
            with pytest.raises(CheckpointError, match=named(3)):
                checkpoints.load(got, name=named(3))
            assert all(bits(got[key]) == bits(tensor) for key, tensor in small(2).items())
        return log

    log = by_rank(num_ranks, load)[0]
    assert sum(line.startswith(damaged) for line in log) == 1
    assert [line for line in log if "of no use" in line] == [
        f"{named(step)}: of no use without {named(3)}" for step in (5, 4)
    ]
    os.truncate(tmp_path / named(1) / "tensors-0.bin", 3)
    with pytest.raises(CheckpointError, match=f"no good checkpoint .*{damaged}.*{named(1)}/tensors-0.bin: "):
        Checkpoints(tmp_path, log=[].append).load(small(0))


def test_what_was_rejected_is_not_counted_as_kept(tmp_path):
    make(tmp_path, 1, 2, 3, 4, 5, keep_last=4, needs={2: 1, 4: 3, 5: 3})
    os.truncate(tmp_path / named(3) / "tensors-0.bin", 3)
    with Checkpoints(tmp_path, keep_last=2, log=[].append) as checkpoints:
        assert checkpoints.load(small(0)) == {"step": 2}
        checkpoints.save(6, small(6), {"step": 6}, needs=named(1))
        assert kept(tmp_path) == [1, 2, 3, 4, 5, 6]
        checkpoints.save(7, small(7), {"step": 7}, needs=named(1))
        assert kept(tmp_path) == [1, 6, 7]


def test_a_name_reads_that_one_only(tmp_path):
    make(tmp_path, 1, 2, 3, keep_last=3)
    for step in (1, 2, 3):
        check_loads(tmp_path, step, name=named(step))
    os.truncate(tmp_path / named(2) / "state.json", 3)
    got, log = fresh(small(0)), []
    loads = Checkpoints(tmp_path, log=log.append).load
    with pytest.raises(CheckpointError, match=r"step-000000002 is damaged: step-000000002/state\.json: 3 bytes"):
        loads(got, name=named(2))
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step-4' in .*: there are .'step-000000001', 'step-000"):
        loads(got, name="step-4")
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step-1' in .*: there are \[\]"):
        Checkpoints(tmp_path / "none").load(got, name="step-1")
    assert Checkpoints(tmp_path / "none").load(got) is None
    assert all(bits(got[key]) == bits(tensor) for key, tensor in fresh(small(0)).items())
    assert not log


def test_keys_shapes_and_dtypes_must_match(tmp_path):
    make(tmp_path, 1)
    loads = Checkpoints(tmp_path).load
    right = fresh(small(0))
    for wrong, message in [
        ({"table": right["table"]}, "bias is saved, but not asked for"),
        ({**right, "extra": right["bias"]}, "extra is asked for, but not saved"),
        ({**right, "bias": torch.zeros(4, dtype=torch.float64)}, r"bias is saved as \(3,\), but asked for as \(4,\)"),
        ({**right, "bias": torch.zeros(3)}, "bias is saved as float64, but asked for as float32"),
        ({**right, "bias": Shards((4,), ())}, r"bias is saved as \(3,\), but asked for as \(4,\)"),
        ({**right, "bias": [1.0]}, "bias: expected a Tensor, or Shards"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            loads(wrong)
    assert all(bits(right[key]) == bits(tensor) for key, tensor in fresh(small(0)).items())
    assert loads({"bias": right["bias"]}, prefix="bi") == {"step": 1}
    assert bits(right["bias"]) == bits(small(1)["bias"])
    with pytest.raises(CheckpointError, match="table is saved, but not asked for"):
        loads({}, prefix="t")


def test_state_comes_back_exactly_or_is_refused(tmp_path):
    state = {"a": [0.1, 5e-324, -0.0, math.pi * 1e300, 2**70, True, None], "naïve": {"inf": math.inf, "-": -math.inf}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, {**state, "nan": math.nan})
    loaded = checkpoints.load({})
    assert math.isnan(loaded.pop("nan")) and repr(loaded) == repr(state)
    for bad, message in [
        ({"a": {1: 2}}, r"state\['a'\]: expected strings as keys, got 1"),
        ({"a": [(1, 2)]}, r"state\['a'\]\[0\]: expected numbers.* got tuple"),
        ({"a": torch.zeros(1)}, r"state\['a'\]: expected numbers.* got Tensor; tensors go into"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(2, {}, bad)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000001"]


def test_parts_must_fill_the_tensor_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    table = torch.zeros(4, 2)
    for parts, message in [
        ((((0, 0), table[:3]),), r"table: the parts hold 6 of 8 elements of \(4, 2\)"),
        ((), "table: the parts hold 0 of 8 elements"),
        ((((0, 0), table[:3]), ((2, 0), table[2:])), "overlap or leave gaps: .*key:table has overlapping chunks"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(1, {"table": Shards((4, 2), parts)}, {})
    with pytest.raises(ValueError, match="several dtypes"):
        Shards((2,), (((0,), torch.zeros(1)), ((1,), torch.zeros(1, dtype=torch.int64))))
    with pytest.raises(ValueError, match=r"lies outside of a tensor of \(2,\)"):
        Shards((2,), (((0, 0), torch.zeros(1)),))
    for step in (-1, 1.0, True, 10**9):
        with pytest.raises(CheckpointError, match=f"step is {step}: expected an int from 0"):
            checkpoints.save(step, {}, {})
    with pytest.raises(CheckpointError, match="keep_last is 0"):
        Checkpoints(tmp_path, keep_last=0)
    assert not list(tmp_path.glob("*step*"))


def test_parts_without_rows_do_not_hide_those_at_the_same_place(tmp_path):
    table = random_bits((4, 2), torch.float32, 5)

    def save(rank):
        parts = [((0, 0), table[:0]), ((0, 0), table)]
        with Checkpoints(tmp_path) as checkpoints:
            tensors = {
                "a": Shards((4, 2), tuple(parts if rank else ())),
                "b": Shards((4, 2), tuple(parts[::-1] if rank else ())),
                "c": Shards((4, 2), (parts[rank],)),
                "d": Shards((4, 2), (parts[1 - rank],)),
            }
            checkpoints.save(1, tensors, {})

    by_rank(2, save)
    got = {key: torch.zeros(4, 2) for key in "abcd"}
    Checkpoints(tmp_path).load(got)
    assert all(bits(tensor) == bits(table) for tensor in got.values())


def test_what_differs_between_ranks_is_raised_on_all(tmp_path):
    table = torch.zeros(4, 2)
    cases = [
        (lambda rank: (rank, {}, {}), r"step and needs are \(0, None\) on rank 0, but \(1, None\) on rank 1"),
        (lambda rank: (1, {"ab"[rank]: table}, {}), r"ranks 0 and 1 save different keys: .*\['a', 'b'\]"),
        (lambda rank: (1, {"a": table[rank:]}, {}), r"a is \(4, 2\) torch.float32 on rank 0, but \(3, 2\)"),
        (lambda rank: (1, {"a": [table, None][rank]}, {}), "rank 1: a: expected a Tensor"),
        (lambda rank: (1, {}, {"a": [set(), 1][rank]}), r"rank 0: state\['a'\]: expected"),
        (lambda rank: (1, {"a": Shards((4, 2), (((rank, 0), table[:2]),))}, {}), "overlap or leave gaps"),
    ]

    def save(rank):
        texts = []
        with Checkpoints(tmp_path) as checkpoints:
            for case, _ in cases:
                with pytest.raises(CheckpointError) as caught:
                    checkpoints.save(*case(rank))
                texts.append(str(caught.value))
            checkpoints.save(5, {"a": table}, {})
            with pytest.raises(CheckpointError) as caught:
                checkpoints.load({"a": table, **({"b": table} if rank else {})})
        return [*texts, str(caught.value)]

    for texts in by_rank(2, save):
        for text, (_, message) in zip(texts, [*cases, (None, "rank 1: .*b is asked for, but not saved")]):
            assert re.search(message, text), (message, text)


def test_no_word_to_the_terminal(tmp_path, capfd):
    def both(rank):
        with Checkpoints(tmp_path, asynchronous=True) as checkpoints:
            checkpoints.save(1, cut(model(), "column", rank, 2), {})
            checkpoints.load(cut(fresh(model()), "row", rank, 2))

    by_rank(2, both)
    assert capfd.readouterr() == ("", "")
