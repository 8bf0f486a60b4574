"""`edgesolve warmup`: compile every kernel at install time, so that no request waits for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from edgesolve.device.errors import BackendError


def warmup() -> list[tuple[str, float]]:
    """Compile all kernels into `cache_folder()`: (kernel and dtypes, seconds) of each.

    A second call takes them from the cache. Empty where Numba is missing or switched off. Raises
    BackendError if the folder can't be written.
    """
    writable(cache_folder())
    from edgesolve.kernels.warm import warm

    return warm()


def cache_folder() -> Path:
    """Numba's cache: NUMBA_CACHE_DIR, which is set to ~/.cache/edgesolve/numba where it is unset.

    Must run before Numba is imported. Creates nothing.
    """
    default = Path("~/.cache/edgesolve/numba").expanduser()
    return Path(os.environ.setdefault("NUMBA_CACHE_DIR", str(default)))


def writable(folder: Path) -> None:
    """Raises BackendError unless a file can be created in `folder`, which is made if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BackendError(
            f"{folder}: Numba's cache can't be written ({error.strerror}): set NUMBA_CACHE_DIR to "
            "a folder of this user, or EDGESOLVE_NUMBA=0 to use NumPy alone."
        ) from error
