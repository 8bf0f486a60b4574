"""The solvers that are compared, each with the tolerances it is run at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import solver_ours
import solver_peers

OURS = "edgesolve"


@dataclass(frozen=True, slots=True)
class Solver:
    """run(problem, level, clock) to weights. `levels`: loosest first, in the solver's own unit, `step` apart.

    exact : the level at which the tiny problem must be solved to eight digits.
    """

    package: str
    run: Callable
    loosest: float
    step: float
    exact: float

    @property
    def levels(self) -> list[float]:
        return [self.loosest * self.step**k for k in range(12)]

    def between(self, level: float) -> float:
        """The level half a step looser."""
        return level / self.step**0.5


SOLVERS = {
    OURS: Solver("edgesolve", solver_ours.edgesolve, 1e-1, 0.1, 1e-9),
    "adelie": Solver("adelie", solver_peers.adelie, 1e-5, 0.1, 1e-14),
    "adelie path": Solver("adelie", solver_peers.adelie_path, 1e-5, 0.1, 1e-14),
    "celer": Solver("celer", solver_peers.celer, 1e-2, 0.1, 1e-10),
    "skglm": Solver("skglm", solver_peers.skglm, 1.0, 0.1, 1e-6),
    # Its tolerance is on a squared norm.
    "pyscnn": Solver("pyscnn", solver_peers.pyscnn, 1.0, 0.01, 1e-11),
    "clarabel": Solver("clarabel", solver_peers.clarabel, 1e-3, 0.01, 1e-10),
}
