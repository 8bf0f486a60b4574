"""What can go wrong in the world outside, one class per exit code of the command line.

A caller's mistake is a ValueError or TypeError; a refused update is a decision, not an error.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Base of all: the message is one sentence for the user, `exit_code` the command's result."""

    exit_code = 1


class UsageError(EdgeError):
    """The command line asks for something that doesn't exist or doesn't fit together."""

    exit_code = 2


class BundleError(EdgeError):
    """The bundle is damaged, incomplete, or of a newer schema."""

    exit_code = 3


class SignatureError(EdgeError):
    """The bundle's signature is wrong, or required and missing."""

    exit_code = 4


class ParityError(EdgeError):
    """A backend's answers on this board differ from those recorded when the bundle was built."""

    exit_code = 5


class BackendError(EdgeError):
    """A runtime or an extra is missing, or unusable on this machine."""

    exit_code = 6


class InputError(EdgeError):
    """The input is missing, or outside the bundle's input contract."""

    exit_code = 7


class StateError(EdgeError):
    """The state folder can't be used: too new, full, read-only, or damaged beyond any fallback."""

    exit_code = 8


class BusyError(EdgeError):
    """Another process holds the lock of the state folder."""

    exit_code = 9
