"""How the C library keeps memory."""

import ctypes
import os

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory():
    """Let this process keep what it frees, for the next tensor of that size.

    A training step on the CPU makes tensors of many megabytes. By default glibc gives such memory
    back at once, and the next step gets it anew, page by page, which can take longer than the
    arithmetic. Does nothing with another C library, or where the environment has settings of the
    user's own (``MALLOC_...``).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
