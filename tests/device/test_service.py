"""The service: what it does with frames, drift, a bad head, a dying child, an operator, and two of itself."""

import os
import signal
import subprocess
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from edgesolve.device import cli, operator, service
from edgesolve.device.adapt import Options
from edgesolve.device.board import python_command
from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import BusyError, InputError, StateError, UsageError
from edgesolve.device.lock import Lock
from edgesolve.device.policy import Policy
from edgesolve.device.resources import Limits
from edgesolve.device.sources import Item, SourceEnded
from edgesolve.device.store import Store

FREE = Limits(min_available_mib=0.0, min_disk_mib=0.0)
EAGER = Policy(mode="auto", look_every_s=0.2, min_interval_s=0.0, cooldown_s=60.0, confirmations=2)
PATIENCE_S = 600.0 if os.environ.get("EDGESOLVE_EMULATED") == "1" else 60.0


class Fed:
    """A source that repeats `frames` until it is given others; None ends it."""

    def __init__(self, frames):
        self.frames, self._at = frames, 0

    def next(self, timeout):
        frames = self.frames
        if frames is None:
            raise SourceEnded("the test has seen enough")
        self._at += 1
        time.sleep(0.002)
        item = frames[self._at % len(frames)]
        return item if isinstance(item, Item) else Item(f"frame {self._at}", item)

    def close(self):
        pass


class Running:
    """A service on a thread; `events` so far, and `wait_for` one of them."""

    def __init__(self, bundle, options, fed):
        self.events, self.answers, self.fed = [], [], fed
        self.service = service.Service(bundle, options, self.events.append, self.answers.append)
        self._thread = threading.Thread(target=self.service.run)
        self._thread.start()

    def wait_for(self, name, count=1):
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            found = [e for e in list(self.events) if e["event"] == name]
            if len(found) >= count:
                return found[count - 1]
            time.sleep(0.02)
        raise AssertionError(f"no {name} among {[e['event'] for e in self.events]}")

    def until(self, condition):
        end = time.monotonic() + PATIENCE_S
        while not condition(self.service.status()):
            assert time.monotonic() < end, (self.events, self.service.status()["drift"])
            time.sleep(0.02)
        return self.service.status()

    def stop(self):
        self.service.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@pytest.fixture
def serving(bundle_dir, frames, tmp_path, monkeypatch):
    """serving(**changes of the options) -> Running, on clean frames."""
    started = []

    def start(policy=EAGER, **changes):
        fed = Fed(list(frames.x[:256]))
        monkeypatch.setattr(service, "open_source", lambda *_, **__: fed)
        options = service.ServeOptions(
            source="fed",
            state=tmp_path / "state",
            device="test",
            policy=policy,
            adapt=Options(max_frames=128, again=False),
            backend="onnx",
            limits=FREE,
            probation_s=0.3,
            probation_n=20,
        )
        running = Running(open_bundle(bundle_dir), replace(options, **changes), fed)
        started.append(running)
        return running

    yield start
    for running in started:
        running.stop()


@pytest.fixture(autouse=True)
def _needs_a_runtime():
    pytest.importorskip("onnxruntime")


def test_it_adapts_commits_and_comes_back(serving, frames):
    running = serving()
    running.until(lambda s: s["inferences_total"] > 70 and s["drift"])
    assert not running.service.status()["drift"]["alarm"]
    running.fed.frames = list(frames.window)
    accepted = running.wait_for("accepted")
    assert accepted["reason"] == "gate_passed" and accepted["generation"] == 1
    running.wait_for("committed")
    status = running.until(lambda s: s["generation"] == 1 and s["committed"])
    assert status["updates_today"] == 1 and status["candidate"] is None
    assert [g["generation"] for g in status["generations"]] == [1]

    # The same condition again is no drift for the head that was solved under it.
    end = time.monotonic() + 6.0
    while time.monotonic() < end:
        assert running.service.learner.alarms < 2
        time.sleep(0.02)
    status = running.service.status()
    assert (
        status["generation"] == 1
        and status["drift"]["from_factory"] > 1 >= status["drift"]["score"]
    )

    running.fed.frames = list(frames.x[256:400])
    back = running.wait_for("accepted", 2)
    assert back["reason"] == "returned"
    running.until(lambda s: s["generation"] == 2)
    running.until(lambda s: running.answers[-1]["generation"] == 2)


def test_a_proposal_waits_for_the_operator(serving, frames):
    running = serving(replace(EAGER, mode="propose"))
    running.fed.frames = list(frames.window)
    running.wait_for("proposed")
    status = running.until(lambda s: s["candidate"])
    assert status["generation"] == 0
    running.until(lambda s: s["skipped"].get("awaiting_approval"))  # one proposal at a time
    assert {"flipped", "gate", "n", "relative_gap"} <= set(status["candidate"])
    assert sum(c["after"] for c in status["candidate"]["classes"]) == pytest.approx(1.0)
    found = running.service.command("approve", "test")
    assert found["ok"] and found["generation"] == 1
    running.until(lambda s: s["generation"] == 1 and s["candidate"] is None)
    running.wait_for("committed")
    status = running.service.status()
    assert status["updates_today"] == 1
    assert "approved" in [entry["reason"] for entry in status["history"]]
    assert not running.service.command("reject", "test")["ok"]
    assert running.service.command("rollback", "test")["generation"] == 0
    running.until(lambda s: s["generation"] == 0)
    refused = running.service.command("rollback", "test")
    assert not refused["ok"] and "factory head" in refused["sentence"]


@pytest.mark.parametrize("mode", ["off", "observe"])
def test_modes_that_must_not_learn(serving, frames, mode, tmp_path):
    running = serving(replace(EAGER, mode=mode))
    running.fed.frames = list(frames.window)
    if mode == "observe":
        status = running.until(lambda s: s["skipped"].get("mode_observe"))
        assert status["drift"]["alarm"]
    else:
        running.until(lambda s: s["inferences_total"] > 300)
        assert running.service.status()["window"]["n"] == 0
    assert Store(tmp_path / "state").current() is None


def test_frozen_means_frozen(serving, frames):
    running = serving()
    assert running.service.command("freeze", "test")["ok"]
    running.fed.frames = list(frames.window)
    running.until(lambda s: s["skipped"].get("frozen"))
    assert running.service.status()["frozen"]
    assert not running.service.command("recalibrate", "test")["ok"]
    assert running.service.command("unfreeze", "test")["ok"]
    running.wait_for("accepted")


def test_an_order_passes_over_the_waiting_times(serving, frames):
    running = serving(replace(EAGER, mode="observe", look_every_s=1e6))
    running.fed.frames = list(frames.window)
    running.until(lambda s: s["window"]["n"] >= 64 and s["drift"] and not s["adapting"])
    assert running.service.command("recalibrate", "test")["ok"]
    running.wait_for("accepted")


def test_a_head_that_fails_is_taken_back(serving, frames, monkeypatch):
    running = serving(probation_s=60.0)
    running.fed.frames = list(frames.window)
    running.wait_for("swapped")
    runtime = running.service.inference.runtime
    head = replace(runtime.head, weights=np.full_like(runtime.head.weights, np.nan))
    running.service.inference.runtime = replace(runtime, head=head)
    back = running.wait_for("rollback")
    assert back["reason"] == "probation_errors"
    status = running.until(lambda s: s["generation"] == 0 and s["rollbacks_total"] == 1)
    assert status["errors_total"] >= 3
    running.until(lambda s: s["skipped"].get("cooldown"))


def test_a_probation_goes_on_while_somebody_holds_the_state(serving, frames, tmp_path):
    running = serving(probation_s=0.5)
    running.fed.frames = list(frames.window)
    running.wait_for("swapped")
    with Store(tmp_path / "state").lock():
        refused = running.wait_for("kept")
        assert refused["reason"] == "write_failed"
        assert running.service.learner.probation is not None
    running.wait_for("committed")


def test_a_child_that_dies_changes_nothing(serving, frames):
    running = serving()
    running.fed.frames = list(frames.window)
    learner = running.service.learner
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        child = learner.child
        if child is not None and not child.look_only:
            os.kill(child._process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    kept = running.wait_for("kept")
    assert kept["reason"] == "solver_crashed" and "signal 9" in kept["sentence"]
    running.wait_for("accepted")  # it tries again, and answers all the while


def test_bad_frames_and_uploads(serving, frames):
    running = serving()
    running.fed.frames = [Item("bad.png", None, "bad.png: not an image."), *frames.x[:64]]
    event = running.wait_for("bad_input")
    assert event["sentence"] == "bad.png: not an image."
    answer = running.service.predict(frames.x[0])
    assert set(answer) == {"top1", "class", "score", "generation"}
    with pytest.raises(InputError):
        running.service.predict(frames.x[0][:8])
    with pytest.raises(UsageError):
        running.service.command("format", "test")
    running.fed.frames = None
    running.wait_for("stopped")
    assert not running.service.ready()[0]


def test_a_head_that_crashes_the_process_is_given_up(serving, own_state, frames, tmp_path):
    state = own_state("onnx")
    store = Store(state)
    found = store.current()
    store.commit(found.arrays, found.statistics, found.provenance, committed=False, tries=1)
    assert store.start(found.provenance["bundle_sha256"]).number == 2  # it dies after this
    running = serving(replace(EAGER, mode="observe"), state=state)
    back = running.wait_for("rollback")
    assert (back["reason"], back["generation"]) == ("crash_loop", 1)
    assert store.history()[-1]["reason"] == "crash_loop"
    status = running.until(lambda s: s["rollbacks_total"] == 1)
    assert status["generation"] == 1 and status["committed"]


def test_what_somebody_else_puts_in_force_is_taken_over(serving, frames, bundle_dir, tmp_path):
    running = serving()
    running.fed.frames = list(frames.window)
    running.wait_for("committed")
    running.until(lambda s: s["generation"] == 1 and not s["adapting"])
    running.service.learner._read_at = -1e9
    store = Store(tmp_path / "state")
    for _ in range(100):
        try:
            operator.rollback(open_bundle(bundle_dir), store)
            break
        except BusyError:
            time.sleep(0.1)
    running.service.learner._read_at = -1e9
    running.until(lambda s: s["generation"] == 0)


def test_one_service_a_state_folder(bundle_dir, tmp_path):
    with Lock(tmp_path / "serving").held():
        command = [*python_command(), "-m", "edgesolve.device.cli", "serve", str(bundle_dir)]
        command += ["--source", "stdin", "--state", str(tmp_path)]
        done = subprocess.run(command, input=b"", capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 9 and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--frames", "8"], 2, "at least 64"),
        (["--confirmations", "0"], 2, "must be positive"),
        (["--cooldown", "-1"], 2, "must be >= 0"),
        (["--token-file", "/nope/token"], 7, "cannot be read as a token"),
        (["--http", "nonsense"], 2, "not an address"),
        (["--mqtt", "http://x"], 2, "mqtt://host"),
        (["--source", "/nope/frames"], 7, "no such folder"),
        (["--key", "/nope/key"], 2, "no readable public key"),
        (["--require-signature"], 4, "a signature is required"),
        (["--mode", "sometimes"], 2, "invalid choice"),
    ],
)
def test_one_sentence_for_a_wrong_command_line(bundle_dir, tmp_path, capsys, more, code, said):
    command = ["serve", str(bundle_dir), "--source", str(tmp_path), "--state", str(tmp_path / "s")]
    try:
        found = cli.main([*command, *more])
    except SystemExit as error:  # argparse's own
        found = error.code
    assert found == code
    assert said in capsys.readouterr().err


def test_nothing_to_approve(bundle_dir, tmp_path):
    bundle, store = open_bundle(bundle_dir), Store(tmp_path)
    for act in (operator.approve, operator.reject):
        with pytest.raises(StateError):
            act(bundle, store)
