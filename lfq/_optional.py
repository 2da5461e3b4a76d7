"""Packages that only the analysis, the command line and exports need."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np


def load(name: str, purpose: str, extra: str = "app") -> ModuleType:
    """Import an optional package, or say what it is needed for and how to get it.

    Raises
    ------
    ImportError
        One sentence naming the missing package and the extra that brings it.
    """
    try:
        # pyerrors sets NumPy print options on import; the caller's survive.
        with np.printoptions():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise
        raise ImportError(
            f"{purpose} needs {error.name}, which is not installed: pip install 'lfq[{extra}]'", name=error.name
        ) from None
