"""Finds the Numba kernels when the first one is called, not before."""

import os
from functools import cache


@cache
def compiled():
    """The Numba kernels, or None: Numba missing, switched off, or no writable place for its cache.

    EDGESOLVE_NUMBA=0 switches them off; every caller has a NumPy twin that gives the same answer.
    """
    if os.environ.get("EDGESOLVE_NUMBA") == "0":
        return None
    try:
        from edgesolve.kernels import compiled
    except (ImportError, RuntimeError):
        return None
    return compiled


def read_only(array):
    """A view that can't be written to, whoever owns the array: for Numba these are two types, and
    it would compile once more for the other. Kernels get all that they only read this way."""
    view = array.view()
    view.flags.writeable = False
    return view
