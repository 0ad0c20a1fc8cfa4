"""Imports of what is large, such as torch."""

import gc
from collections.abc import Iterable
from importlib import import_module

__all__ = ["import_all"]


def import_all(modules: Iterable[str]) -> list[str]:
    """Imports modules without Python's search for garbage, which makes a fifth of torch's import: nearly all stays.

    What is there afterwards is not searched any more, so that in forks its pages stay shared.

    Args:
        modules: their names.

    Returns:
        What could not be imported, though it is there: name and why.

    >>> import_all(["json", "no_such_package.inner"])
    []
    """
    failed = []
    gc.disable()
    try:
        for name in modules:
            try:
                import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    failed.append(f"{name}: {error}")
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
    finally:
        gc.freeze()
        gc.enable()
    return failed
