"""Solvers and their certificates: numpy, and Numba where it is installed.

moments.py      the additive record of a data set        ridge.py   closed form and its path
losses.py       the scaling, from moments or from rows   fista.py   group penalties
gates.py        seeded gate vectors and patterns         gap.py     independent certificate
gated.py        the gated design, never formed           accel.py   finds compiled.py, warm.py fills
prox.py         group shrinkage; penalties.py uses it               its cache
solution.py     what a solver returns                    drift.py   distance of two sets of statistics

Importing this package imports none of them.
"""
