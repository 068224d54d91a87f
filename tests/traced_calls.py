"""The file operations of a process, as the kernel sees them, and SIGKILL before any one of them.

A child is forked and traced by `ptrace`. A seccomp filter stops it at the system calls that can change a file system,
before they are done, and at no others, so that it runs almost as fast as alone. Whoever makes the call is seen: Python,
polars, Arrow or safetensors, in any of their threads. (`strace -e inject=...:signal=KILL:when=N` counts to N in every
thread by itself, and so misses calls.)

What is written through a memory map is not seen; that a file was mapped for writing is, and is told.

This needs Linux on x86-64 and the right to trace children, which `why_not` looks at.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.restype = ctypes.c_long
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
CONT, LISTEN, SEIZE, SYSCALL_INFO = 7, 0x4208, 0x4206, 0x420E
OPTIONS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100000  # fork, vfork, clone, seccomp; the child dies with its tracer
EVENT_SECCOMP, EVENT_STOP = 7, 128
WALL = 0x40000000  # of `waitpid`: threads, too
AUDIT_ARCH = 0xC000003E  # x86-64
AT_FDCWD = -100
CHANGES_ON_OPEN = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Number of a call on x86-64 -> its name, and where it says what it changes: "f" is a file descriptor, "p" a path, "d" a
# folder's descriptor which the path after it is relative to, "-" something else.
CALLS = {
    1: ("write", "f"), 18: ("pwrite64", "f"), 20: ("writev", "f"), 296: ("pwritev", "f"), 328: ("pwritev2", "f"),
    2: ("open", "p"), 85: ("creat", "p"), 257: ("openat", "dp"), 437: ("openat2", "dp"),
    82: ("rename", "pp"), 264: ("renameat", "dpdp"), 316: ("renameat2", "dpdp"),
    87: ("unlink", "p"), 263: ("unlinkat", "dp"), 84: ("rmdir", "p"), 83: ("mkdir", "p"), 258: ("mkdirat", "dp"),
    86: ("link", "pp"), 265: ("linkat", "dpdp"), 88: ("symlink", "-p"), 266: ("symlinkat", "-dp"),
    133: ("mknod", "p"), 259: ("mknodat", "dp"),
    76: ("truncate", "p"), 77: ("ftruncate", "f"), 285: ("fallocate", "f"),
    74: ("fsync", "f"), 75: ("fdatasync", "f"), 277: ("sync_file_range", "f"),
    90: ("chmod", "p"), 91: ("fchmod", "f"), 268: ("fchmodat", "dp"), 452: ("fchmodat2", "dp"),
    92: ("chown", "p"), 93: ("fchown", "f"), 94: ("lchown", "p"), 260: ("fchownat", "dp"),
    132: ("utime", "p"), 235: ("utimes", "p"), 261: ("futimesat", "dp"), 280: ("utimensat", "dp"),
    188: ("setxattr", "p"), 189: ("lsetxattr", "p"), 190: ("fsetxattr", "f"),
    197: ("removexattr", "p"), 198: ("lremovexattr", "p"), 199: ("fremovexattr", "f"),
    326: ("copy_file_range", "--f"), 40: ("sendfile", "f"), 275: ("splice", "--f"),
    9: ("mmap", "----f"), 425: ("io_uring_setup", ""),
}  # fmt: skip
UNSEEN = ("mmap", "io_uring_setup")  # after these, files may change without a call
RANDOM = (  # parts of names that are others in every run
    (re.compile(r"(^|[/ ])\.[0-9a-f]{8}\."), r"\1.*."),  # `ctrlib.making`
    (re.compile(r"(^|[/ ])\.tmp\w{6}(?=$|[/ ])"), r"\1.tmp*"),  # safetensors
)


@dataclass(frozen=True)
class Call:
    """One operation of a run: the n-th of its kind on that path, below the folder that is watched."""

    kind: str
    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" + (f" (number {self.number + 1})" if self.number else "")


@dataclass
class Traced:
    """What a traced run did, and how it ended."""

    calls: list[Call] = field(default_factory=list)
    elsewhere: Counter[str] = field(default_factory=Counter)  # files outside the folder that were changed
    unseen: list[str] = field(default_factory=list)  # mapped for writing
    status: int = 0  # exit status; minus the signal that ended it
    killed: bool = False  # at the call that was asked for


def why_not() -> str:
    """What is missing here for tracing; nothing if it works.

    >>> isinstance(why_not(), str)
    True
    """
    needs = "killing at every file operation needs Linux on x86-64 and the right to trace children with ptrace"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"{needs}: this is {sys.platform} on {platform.machine()}"
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() == "3":
        return f"{needs}: {scope} is 3, which forbids it until the machine starts anew"
    try:
        found = run_traced(lambda: os.close(os.open(os.devnull, os.O_WRONLY)), Path(os.devnull))
    except OSError as error:
        return f"{needs}: {error.strerror} (in a container, start it with --cap-add=SYS_PTRACE)"
    return "" if found.calls else f"{needs}: the kernel has no seccomp filters, or they are not allowed"


def run_traced(
    work: Callable[[], object], watched: Path, kill_at: Call | None = None, output: Path | None = None
) -> Traced:
    """Call `work` in a traced child, until it ends or is about to make the call `kill_at`.

    Args:
        work: an exception makes the exit status 1, SystemExit what it says, a returned number that number.
        watched: calls that change this, or something in it, are listed.
        kill_at: SIGKILL comes before this call is done.
        output: file for what the child prints.

    Raises:
        OSError: the child cannot be traced.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)  # until it is traced
        _run(work, output, _filter)
    os.close(reader)
    try:
        _ptrace(SEIZE, child, 0, OPTIONS)
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(writer)
    return _follow(child, os.path.realpath(watched), kill_at)


def run_alone(work: Callable[[], object], output: Path | None = None) -> int:
    """Call `work` in a child that nobody disturbs; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        _run(work, output, lambda: None)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(work: Callable[[], object], output: Path | None, before: Callable[[], None]) -> None:
    """In the child: `work`, and the end."""
    status = 1
    try:
        if output is not None:
            log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for stream in (1, 2):
                os.dup2(log, stream)
        before()
        found = work()
        status = found if isinstance(found, int) else 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _filter() -> None:
    """From here on, this process stops at the calls of `CALLS`, and so does what it starts."""
    load, equal, give = 0x20, 0x15, 0x06  # 32 bits of the call's description; jump if equal; answer
    trace, allow = 0x7FF00000, 0x7FFF0000
    numbers = sorted(CALLS)
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH), (give, 0, 0, allow), (load, 0, 0, 0)]
    code += [(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    code += [(give, 0, 0, allow), (give, 0, 0, trace)]
    program = b"".join(struct.pack("HBBI", *one) for one in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer)))
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    LIBC.prctl(no_new_privileges, 1, 0, 0, 0)
    if LIBC.prctl(set_seccomp, mode_filter, head, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _ptrace(request: int, process: int, address: int, data: int | ctypes.Array[ctypes.c_char]) -> None:
    pointer = ctypes.cast(data, ctypes.c_void_p) if isinstance(data, ctypes.Array) else ctypes.c_void_p(data)
    if LIBC.ptrace(request, process, ctypes.c_void_p(address), pointer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def _follow(child: int, watched: str, kill_at: Call | None) -> Traced:
    """Go with the child and its threads from stop to stop."""
    traced, counts = Traced(), Counter[tuple[str, str]]()
    while True:
        process, status = os.waitpid(-1, WALL)
        if not os.WIFSTOPPED(status):
            if process == child:
                traced.status = os.waitstatus_to_exitcode(status)
                return traced
            continue
        event, stopped_by = status >> 16, os.WSTOPSIG(status)
        request, passed_on = CONT, 0
        if event == EVENT_SECCOMP:
            found = _call(process)
            if found is not None and _is_the_one(found, watched, counts, traced, kill_at):
                traced.killed = True
                os.kill(child, signal.SIGKILL)
                continue
        elif event == EVENT_STOP:  # a new thread, or the whole process was stopped by a signal and stays so
            request = CONT if stopped_by == signal.SIGTRAP else LISTEN
        elif event == 0:
            passed_on = stopped_by
        try:
            _ptrace(request, process, 0, passed_on)
        except OSError as error:
            if error.errno != errno.ESRCH:  # killed meanwhile
                raise


def _is_the_one(
    found: tuple[str, list[str]], watched: str, counts: Counter[tuple[str, str]], traced: Traced, kill_at: Call | None
) -> bool:
    """Note a call; whether it is the one to be killed at."""
    kind, paths = found
    below = [path == watched or path.startswith(watched + "/") for path in paths]
    if not any(below):
        if kind == "io_uring_setup":
            traced.unseen.append(kind)
        for path in paths:
            if path.startswith("/") and not path.startswith(("/dev/", "/proc/", "/memfd:")):
                traced.elsewhere[path] += 1
        return False
    name = " -> ".join(os.path.relpath(path, watched) for path in paths)
    if kind in UNSEEN:
        traced.unseen.append(name)
        return False
    for pattern, instead in RANDOM:
        name = pattern.sub(instead, name)
    call = Call(kind, name, counts[kind, name])
    counts[kind, name] += 1
    traced.calls.append(call)
    return call == kill_at


def _call(process: int) -> tuple[str, list[str]] | None:
    """What a stopped thread is about to do, and to which paths; None if it changes nothing."""
    buffer = ctypes.create_string_buffer(88)
    try:
        _ptrace(SYSCALL_INFO, process, len(buffer), buffer)
        # op, architecture, instruction and stack pointers, number, six arguments
        number, *arguments = struct.unpack_from("24xQ6Q", buffer.raw)
        kind, places = CALLS[number]
        if kind in ("open", "openat") and not arguments[len(places)] & CHANGES_ON_OPEN:
            return None
        if kind == "openat2" and not struct.unpack("Q", _memory(process, arguments[2], 8))[0] & CHANGES_ON_OPEN:
            return None
        if kind == "mmap" and not (arguments[2] & 2 and arguments[3] & 1):  # writable, and shared with the file
            return None
        return kind, list(_paths(process, places, arguments))
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.ENOENT, errno.EIO):
            raise
        return None  # killed meanwhile


def _paths(process: int, places: str, arguments: list[int]) -> list[str]:
    found: list[str] = []
    folder = AT_FDCWD
    for place, argument in zip(places, arguments):
        if place == "d":
            folder = ctypes.c_int32(argument).value
        elif place == "f":
            descriptor = ctypes.c_int32(argument).value
            if descriptor >= 0:
                found.append(_descriptor(process, descriptor))
        elif place == "p":
            text = os.fsdecode(_text(process, argument)) if argument else ""
            base = f"/proc/{process}/cwd" if folder == AT_FDCWD else f"/proc/{process}/fd/{folder}"
            found.append(_resolved(Path(base).readlink() / text))
            folder = AT_FDCWD
    return found


def _descriptor(process: int, descriptor: int) -> str:
    try:
        return str(Path(f"/proc/{process}/fd/{descriptor}").readlink()).removesuffix(" (deleted)")
    except FileNotFoundError:
        return ""  # a call that will fail


def _resolved(path: Path) -> str:
    """The folder of a path with its links followed: what is changed is an entry of that folder."""
    return str(path.parent.resolve() / path.name)


def _memory(process: int, address: int, size: int) -> bytes:
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


def _text(process: int, address: int) -> bytes:
    """A text that ends with a zero byte; it may end just before memory that is not there."""
    text = b""
    while b"\0" not in text:
        size = 256 - (address + len(text)) % 256
        text += _memory(process, address + len(text), size)
    return text.partition(b"\0")[0]
