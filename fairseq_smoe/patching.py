"""Replacing names in modules of other packages, which may be imported later."""

import importlib.util
import sys
from contextlib import contextmanager


class Overlay:
    """A module with some of its attributes replaced."""

    def __init__(self, module, replacements):
        self._module = module
        self.__dict__.update(vars(replacements))

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextmanager
def replaced(module, **replacements):
    """Replace names of a module for a while."""
    stock = {name: vars(module)[name] for name in replacements if name in vars(module)}
    vars(module).update(replacements)
    try:
        yield
    finally:
        for name in replacements:
            del vars(module)[name]
        vars(module).update(stock)


def when_imported(name, change):
    """Call ``change(module)``: at once if the module is imported, else when it is."""
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, change))


class _Finder:
    """Stands before Python's own finders until its module is imported."""

    def __init__(self, name, change):
        self._name, self._change = name, change

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module):
                execute(module)
                self._change(module)

            spec.loader.exec_module = execute_and_change
        return spec
