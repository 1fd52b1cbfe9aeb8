"""Settings of the C library's memory allocator that make compiled programs faster on a CPU."""

import ctypes
import os

# Parameters of mallopt (malloc.h of the GNU C library).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes malloc reuse freed memory rather than return it to the system. Call it before other threads start.

    XLA:CPU allocates a program's temporary buffers with malloc at each call. By default the GNU C library returns large
    blocks to the system as soon as they are freed, so every call has a page fault for each 4 KiB of its activations.
    Without them, a step of a recurrent network takes 0.7 to 0.8 times as long (benchmarks/README.md).

    Does nothing where the C library has no mallopt, or where the environment configures malloc itself (MALLOC_*,
    GLIBC_TUNABLES).
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    # Only the main arena, the heap, keeps large blocks: other threads' arenas map them whatever M_MMAP_MAX says.
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
