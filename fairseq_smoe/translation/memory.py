"""Settings of glibc's memory allocator."""

import ctypes
import os

# constants of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory():
    """Let this process keep freed memory, to use it again for later tensors.

    A training step on the CPU allocates tensors of many megabytes. By default glibc returns such
    memory to the system at once, and the next step gets it again, page by page, which can take
    longer than the arithmetic. Does nothing with another C library, or if the user has set
    ``MALLOC_...`` variables in the environment.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
