"""Noticing that gloo ends this process because another one does not run the same step.

If a rank gets more data than it expects, a thread of gloo throws a C++ exception that nothing
catches. The process is then aborted, and to the other ranks it looks as if it had died.
"""

import ctypes
import functools

_MISMATCH = b"N4gloo13EnforceNotMetE"  # the exception's type, as C++ names it
_FUNCTION = ctypes.CFUNCTYPE(None)


@functools.cache  # for the life of the process, as C++ keeps a pointer to it
def when_sizes_differ(report):
    """Have ``report`` called, without arguments, before gloo aborts this process. Does nothing
    where torch is not built with GNU's C++ library."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_handler = library._ZSt13set_terminatePFvvE  # std::set_terminate
        thrown_type = library.__cxa_current_exception_type
    except (OSError, AttributeError):
        return None
    set_handler.restype = ctypes.c_void_p
    thrown_type.restype = ctypes.c_void_p

    @_FUNCTION
    def before_the_end():
        thrown = thrown_type()  # a std::type_info: pointers to its functions and to its name
        if thrown:
            name = ctypes.c_char_p.from_address(thrown + ctypes.sizeof(ctypes.c_void_p)).value
            if name == _MISMATCH:
                report()
        _FUNCTION(stock)()

    stock = set_handler(before_the_end)
    return before_the_end
