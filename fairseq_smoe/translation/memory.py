"""Settings of glibc's memory allocator."""

import ctypes
import os

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory():
    """Let this process keep freed memory for the next tensor of that size.

    A training step on the CPU allocates tensors of many megabytes. By default glibc returns such
    memory to the system at once, and the next step gets it again, page by page, which can take
    longer than the arithmetic. Does nothing with another C library, or if the environment has
    settings of the user's own (``MALLOC_...``).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
