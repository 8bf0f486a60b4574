"""What can go wrong on the workstation, each with the command line's exit code (see device/errors.py)."""

from edgesolve.device.errors import EdgeError


class ModelError(EdgeError):
    """The model can't be loaded, traced, split or exported."""

    exit_code = 7


class DataError(EdgeError):
    """The calibration data can't be used."""

    exit_code = 7
