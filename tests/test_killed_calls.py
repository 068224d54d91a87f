"""Commands that are killed at their file operations: a short version of `make faults`, and what it rests on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TRACED = """
import os, shutil, sys, threading
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from traced_calls import Call, run_alone, run_traced, why_not

if lacking := why_not():
    print(lacking)
    sys.exit(77)
place = Path(sys.argv[2])


def begin():
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "gone").write_text("old")


def work():
    def make(name):
        for number in range(3):
            (place / f"{name}{number}").mkdir()

    threads = [threading.Thread(target=make, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.chdir(place)
    descriptor = os.open(".0123abcd.partial.file", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, b"one")
    os.write(descriptor, b"two")
    os.fsync(descriptor)
    os.close(descriptor)
    os.chmod(".0123abcd.partial.file", 0o600)
    os.rename(".0123abcd.partial.file", "file")
    Path("file").read_text()
    os.unlink("gone")
    folder = os.open("a0", os.O_RDONLY)
    os.mkdir("inner", dir_fd=folder)
    os.system("echo three > elsewhere; echo four > ../outside")
    return 5


begin()
traced = run_traced(work, place)
made = [f"mkdir {name}{number}" for name in "ab" for number in range(3)]
assert sorted(map(str, traced.calls[:6])) == made, traced.calls
partial = ".*.partial.file"
assert [str(call) for call in traced.calls[6:]] == [
    f"openat {partial}", f"write {partial}", f"write {partial} (number 2)", f"fsync {partial}", f"chmod {partial}",
    f"rename {partial} -> file", "unlink gone", "mkdirat a0/inner", "openat elsewhere", "write elsewhere",
], traced.calls
assert (traced.status, traced.killed, traced.unseen) == (5, False, [])
assert set(traced.elsewhere) == {str(place.parent.resolve() / "outside")}
for call in traced.calls:
    begin()
    killed = run_traced(work, place, call)
    assert (killed.killed, killed.status, killed.calls[-1]) == (True, -9, call)
    left = {path.name for path in place.rglob("*")}
    if call.kind == "mkdir":
        assert call.path not in left
    assert ("file" in left) == (call.kind in ("unlink", "mkdirat") or call.path == "elsewhere"), (call, left)
    assert ("inner" in left) == (call.path == "elsewhere"), (call, left)
    hidden = place / ".0123abcd.partial.file"
    written = {"write": 3 * call.number, "fsync": 6, "chmod": 6, "rename": 6}
    if hidden.exists():
        assert hidden.stat().st_size == (0 if call.path != partial and call.kind != "rename" else written[call.kind])
begin()
assert not run_traced(work, place, Call("mkdir", "a3", 0)).killed
begin()
assert run_alone(work) == 5
"""
CARELESS = """
import contextlib, importlib, shutil, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import killed_calls


@contextlib.contextmanager
def in_place(out, **_):
    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir()
    yield Path(out)


trials = killed_calls.Trials(only=("prepare",), every=70, jobs=1)
status = killed_calls.main(trials)
importlib.import_module("ctrlib.data.prepare").new_folder = in_place
print("careless")
sys.exit(10 * status + killed_calls.main(trials))
"""


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "200"}
    command = [sys.executable, "-c", script, str(TESTS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode in (2, 77):
        pytest.skip(done.stdout + done.stderr)
    return done


def test_every_call_is_seen_and_none_is_done_after_the_kill(tmp_path: Path) -> None:
    done = run(tmp_path, TRACED, str(tmp_path / "place"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_survive_and_a_careless_one_is_found_out(tmp_path: Path) -> None:
    """One that fills its folder in place, of which a kill leaves a part."""
    done = run(tmp_path, CARELESS)
    assert done.returncode == 1, done.stdout + done.stderr
    survived, _, found_out = done.stdout.partition("careless")
    assert "0 not survived" in survived
    assert "prepare --overwrite: killed at " in found_out
    assert "a reader finds a mixture" in found_out
    assert all(path.name.startswith("torch") for path in tmp_path.iterdir())  # torch's own are torch's
