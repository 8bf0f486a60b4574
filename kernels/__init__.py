"""Solvers and their certificates: numpy, and Numba where it is installed.

problem    designs.py the rows, masked, pooled or explicit | gated.py gates.py patterns of the gates
           moments.py the additive record of a data set | losses.py softmax.py the scaling
           penalties.py prox.py group norms | cones.py ReLU constraints
answer     solution.py what a solver returns | point.py a point with its certificate
           gap.py the independent certificate
solvers    solve.py chooses, peak.py says what memory it takes |
           newton.py with surrogate.py, group-l2 | variational.py few rows
           fista.py any penalty | ridge.py sample_space.py closed forms | path.py falling lam
           softmax_newton.py labels | cone_newton.py cone_admm.py ReLU, on
           interior.py and barrier.py
           online.py rows and classes that come and go | decompose.py gated to ReLU
           polish.py the second layer
the rest   accel.py finds compiled.py, warm.py fills its cache | drift.py distance of two statistics

Importing this package imports none of them.
"""
