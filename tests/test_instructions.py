"""The comparison of instruction counts that `make test-arm64` ends with."""

import json
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RENEW = "`make reference-arm64`"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(BENCHMARKS / "instructions.py"))


@pytest.fixture
def compare(script):
    return script["compare"]


@pytest.fixture
def reference():
    return {
        "versions": {"numpy": "2.4.6", "qemu": "7.2.22"},
        "tolerance": 0.03,
        "counts": {"prox, numba": 1000, "newton, numba": 2_000_000},
        "iterations": {"newton, numba": 3},
    }


@pytest.fixture
def found(reference):
    return {
        "versions": dict(reference["versions"]),
        "counts": dict(reference["counts"]),
        "iterations": dict(reference["iterations"]),
    }


def test_equal_counts_pass_and_make_a_table(compare, found, reference):
    lines, failure = compare(found, reference)
    assert failure is None
    assert len(lines) == 3
    assert lines[2].split() == ["newton,", "numba", "2,000,000", "2,000,000", "1.000"]


@pytest.mark.parametrize(("count", "fails"), [(1030, False), (1031, True), (1200, True)])
def test_only_a_count_above_the_tolerance_fails(compare, found, reference, count, fails):
    found["counts"]["prox, numba"] = count
    _, failure = compare(found, reference)
    assert (failure is not None) == fails
    if fails:
        assert "prox, numba" in failure and "newton" not in failure
        assert "3%" in failure and RENEW in failure


def test_fewer_instructions_pass_with_a_remark(compare, found, reference):
    found["counts"]["prox, numba"] = 900
    lines, failure = compare(found, reference)
    assert failure is None
    assert "prox, numba" in lines[-1] and RENEW in lines[-1]


@pytest.mark.parametrize("versions", [{"numpy": "2.5.0", "qemu": "7.2.22"}, {"numpy": "2.4.6"}])
def test_other_versions_are_reported_and_nothing_fails(compare, found, reference, versions):
    found["versions"] = versions
    found["counts"]["prox, numba"] = 5000
    lines, failure = compare(found, reference)
    assert failure is None
    assert any("5.000" in line for line in lines)
    assert "Nothing is judged" in lines[-1] and RENEW in lines[-1]
    assert ("numpy 2.5.0, was 2.4.6" in lines[-1]) == ("qemu" in versions)


@pytest.mark.parametrize("side", ["found", "reference"])
def test_a_count_without_a_pair_fails(compare, found, reference, side):
    {"found": found, "reference": reference}[side]["counts"]["cone, numba"] = 7
    lines, failure = compare(found, reference)
    assert "cone, numba" in failure and RENEW in failure
    assert any("none" in line for line in lines) == (side == "found")


def test_other_iterations_are_told(compare, found, reference):
    found["iterations"]["newton, numba"] = 4
    lines, failure = compare(found, reference)
    assert failure is None
    assert lines[-1] == "newton, numba: 4 iterations, the reference took 3."


def test_a_reference_holds_medians_and_the_largest_spread(script, found, reference):
    runs = [{**found, "counts": {"a": a, "b": 500}} for a in (1000, 1020, 1004)]
    made = script["reference_of"](runs)
    assert made["counts"] == {"a": 1004, "b": 500}
    assert made["spread"] == 0.02
    assert made["versions"] == reference["versions"]


def test_the_committed_reference_has_both_twins_of_every_case(script):
    committed = json.loads((BENCHMARKS / "reference" / "cortex-a72.json").read_text())
    assert committed["cpu"] == "cortex-a72"
    assert 3 * committed["spread"] <= committed["tolerance"] == script["TOLERANCE"]
    cases = {name.removesuffix(", numba") for name in committed["counts"] if "numba" in name}
    twins = {name.removesuffix(", numpy") for name in committed["counts"] if "numpy" in name}
    assert cases == twins and len(cases) == len(committed["counts"]) // 2
    assert all(count > 1000 for count in committed["counts"].values())
