"""What a solver hands back: the weights, and how far they can be trusted."""

import enum
from dataclasses import dataclass

import numpy as np


class Status(enum.Enum):
    """How a solve ended; the value is the sentence shown to the user."""

    CONVERGED = "The optimality residual is below its tolerance."
    MAX_ITER = "`max_iter` was reached before `tol`. Raise `max_iter`, loosen `tol`, or warm-start."
    OUT_OF_TIME = "The time budget ran out. The best point is returned; it is usable, not optimal."
    NOT_FINITE = "A NaN or inf appeared. Look at the features first: is the backbone saturated?"
    ILL_CONDITIONED = (
        "The features are too nearly dependent for this accuracy. Raise the ridge or drop features."
    )


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """The end of a solve. Every figure is evaluated at `weights`, in float64.

    weights (D, c), intercept (c,) : float64; the prediction is a @ weights + intercept.
    objective : P(weights), in the scaling of `losses.py`.
    kkt : distance of -grad to the subdifferential over ||grad f(0)||: free of units.
    relative_gap : from `gap.py`, which does not trust the solver.
    """

    weights: np.ndarray
    intercept: np.ndarray
    status: Status
    objective: float
    kkt: float
    relative_gap: float
    n_iter: int
    seconds: float
