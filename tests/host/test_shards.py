"""Two real processes against one: the same moments, plan and network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgesolve.host.shards import ALONE, Shards, join
from edgesolve.kernels.moments import Moments

HERE = Path(__file__).parent
CHILD = """
import importlib.util, sys
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(1)
from edgesolve.host import walk
from edgesolve.host.compress import compress
from edgesolve.host.fit import FitOptions
from edgesolve.host.plan import choose
from edgesolve.host.sensitivity import fisher
from edgesolve.host.shards import join, leave
from edgesolve.host.sites import sites
from edgesolve.host.survey import layer_moments, survey

spec = importlib.util.spec_from_file_location("small_nets", sys.argv[1])
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)
walk.BATCH = 8
shards = join()
assert shards.count == int(sys.argv[3])
network = small.made("small")[1]


def walked():
    return small.walk(network, 44, shards=shards)


first = walked()
moments = {s.name: layer_moments(first, s, 0)[0] for s in first.found}
surveys = survey(walked(), sites(network)[1], formats=("tucker2",), n_probe=24)
gammas = fisher(walked(), 24)
plan = choose(surveys, "params", 0.5 * sum(s.site.weight.size for s in surveys))
made = compress(walked(), plan, {}, gammas, FitOptions(sweeps=1, clamp_steps=2))
found = {"choice": plan.allocation.choice, "divergence": made.divergence}
for name, m in moments.items():
    found |= {f"{name} sxx": m.sxx, f"{name} stx": m.stx, f"{name} n": m.n}
for node, gamma in gammas.items():
    found[f"{node} gamma"] = gamma
for s in surveys:
    found[f"{s.site.name} harm"] = np.array(s.harm.divergence)
for node, fitted in made.fitted.items():
    found |= {f"{node} weight": fitted.chain.full(), f"{node} bias": fitted.bias}
    found[f"{node} error"] = np.array([fitted.predicted, fitted.held_out, fitted.rows])
np.savez(Path(sys.argv[2]) / f"{shards.count}-{shards.rank}.npz", **found)
leave()
"""


def run(command, folder, count):
    script = folder / "child.py"
    script.write_text(CHILD)
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(HERE / "small_nets.py"), str(folder), str(count)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def read(path):
    with np.load(path) as found:
        return dict(found)


@pytest.mark.slow
def test_two_processes_come_to_what_one_does(tmp_path, accepts_only):
    run([sys.executable], tmp_path, 1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(launch, tmp_path, 2)
    alone, first, second = (read(tmp_path / f"{name}.npz") for name in ("1-0", "2-0", "2-1"))
    assert set(alone) == set(first) and any(" weight" in k for k in alone)
    for key in alone:
        expected, scale = alone[key], np.max(np.abs(alone[key]), initial=1e-300)
        for found in (first[key], second[key]):
            if "error" in key:  # of a step report: each process predicts its own first batch
                continue
            # Divergences and gammas are of single precision products, summed in another order.
            limit = 1e-6 if "gamma" in key or "harm" in key or key == "divergence" else 1e-10
            np.testing.assert_allclose(
                found / scale, expected / scale, rtol=0, atol=limit, err_msg=key
            )
    for key in first:
        if "error" not in key:
            assert first[key].tobytes() == second[key].tobytes(), key
    assert np.all(alone["choice"] == first["choice"]) and np.any(alone["choice"] > 0)
    sxx = alone["one sxx"]
    accepts_only(
        lambda a: np.testing.assert_allclose(a, sxx, rtol=1e-10, atol=1e-10 * np.abs(sxx).max()),
        first["one sxx"],
    )


def test_alone_nothing_is_merged():
    g = np.random.default_rng(0)
    m = Moments.of(g.standard_normal((20, 3)), g.standard_normal((20, 2)))
    assert ALONE.moments(m) is m and ALONE.numbers(2.0, 3.0) == [2.0, 3.0]
    a, b = ALONE.arrays(np.arange(6, dtype=np.float32).reshape(2, 3), 4)
    assert a.shape == (2, 3) and a.dtype == b.dtype == np.float64 and b.shape == ()


def test_without_torchrun_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is ALONE == Shards(0, 1)
