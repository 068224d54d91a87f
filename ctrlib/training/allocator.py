"""How this process keeps memory between training steps."""

from __future__ import annotations

import ctypes
import functools

# Parameter numbers of mallopt(3) in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for reuse instead of handing each back to the system; says whether it could.

    By default every tensor of more than 32 MiB, and at first of more than 128 KiB, is mapped when made and unmapped
    when freed, and its pages are zeroed and faulted in anew at every training step: a tenth of the step of a small
    network on a CPU. The process then stays at its peak size. All threads share one heap: what the loader's threads
    free, others then use, where heaps of their own would grow with every window of a long epoch. Concerns the whole
    process, so ctrlib calls it only where it owns the process: in its command line and recipes. Does nothing where the
    C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    # The mapping threshold is capped by glibc at 32 MiB in some versions, where a larger value is refused.
    mapped = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(mapped and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_ARENA_MAX, 1))
