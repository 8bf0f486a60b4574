"""A Control that only remembers, and three states of a device: fresh, with a proposal, on probation."""

from __future__ import annotations

import threading

from edgesolve.device.errors import InputError

NOW = 1_795_000_000
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
BEFORE = (0.112, 0.098, 0.101, 0.148, 0.097, 0.062, 0.109, 0.087, 0.104, 0.082)
AFTER = (0.104, 0.101, 0.099, 0.093, 0.104, 0.101, 0.101, 0.096, 0.103, 0.098)


class FakeControl:
    def __init__(self, status=None):
        self.found = fresh() if status is None else status
        self.is_alive, self.is_ready = True, (True, "generation 0 answers.")
        self.commands, self.frames = [], []
        self.fails: Exception | None = None
        self.lock = threading.Lock()

    def status(self):
        if self.fails:
            raise self.fails
        return self.found

    def alive(self):
        return self.is_alive

    def ready(self):
        return self.is_ready

    def command(self, name, source):
        with self.lock:
            self.commands.append((name, source))
        sentence = f"{name}: nothing to do."
        return dict(ok=True, decision="kept", reason="no_drift", generation=0, sentence=sentence)

    def predict(self, frame):
        if self.fails:
            raise self.fails
        if not frame.any():
            raise InputError("body: the frame is black.")
        with self.lock:
            self.frames.append(frame)
        return {"top1": 3, "class": "cat", "score": 0.93, "generation": 0}


def fresh():
    return {
        "schema": 1,
        "device": "cam-17",
        "bundle": "resnet20-cifar",
        "bundle_sha256": "9f2c" * 16,
        "signature": "unsigned",
        "mode": "propose",
        "ready": True,
        "frozen": False,
        "backend": "onnxruntime 1.31.1",
        "generation": 0,
        "previous": 0,
        "committed": True,
        "head_age_s": None,
        "target": None,
        "uptime_s": 42.3,
        "inferences_total": 40,
        "errors_total": 0,
        "deadline_misses_total": 0,
        "latency_ms": {"n": 40, "p50": 14.2, "p90": None, "p99": None},
        "window": {"n": 40, "capacity": 512, "stores_frames": False},
        **dict.fromkeys(("drift", "candidate", "adapting", "probation", "last")),
        "updates_today": 0,
        "rollbacks_total": 0,
        "skipped": {},
        "soc_temp_c": None,
        "throttled": None,
        "rss_mib": 118.0,
        "written_today_mib": 0.0,
        "written_total_mib": 0.0,
        "write_budget_mib": 32,
        "card_years_projected": None,
        "generations": [],
        "history": [],
    }


def entry(ago, decision, reason, generation, n=512, seconds=6.4):
    return {
        "time": NOW - ago,
        "decision": decision,
        "reason": reason,
        "generation": generation,
        "n": n,
        "relative_gap": 8.1e-7,
        "seconds": seconds,
    }


def generation(number, parent, ago, in_force=False, committed=True):
    return {
        "generation": number,
        "parent": parent,
        "time": NOW - ago,
        "n": 512,
        "relative_gap": 1.2e-7,
        "target": "renormalised_teacher",
        "in_force": in_force,
        "committed": committed,
    }


def proposal(names=CLASSES):
    gate = dict(heldout_agreement_old=0.713, heldout_agreement_new=0.934)
    gate |= dict(anchor_agreement_old=0.981, anchor_agreement_new=0.969)
    history = [
        entry(193210, "accepted", "gate_passed", 5),
        entry(7300, "kept", "too_few_classes", 6, 512, 1.4),
        entry(3600, "kept", "too_hot", 6, 0, None),
        entry(240, "proposed", "awaiting_approval", 6),
    ]
    drift = dict(alarm=True, score=2.74, threshold=1.0, windows_per_false_alarm=1000)
    return fresh() | {
        "generation": 6,
        "previous": 5,
        "head_age_s": 93210,
        "target": "renormalised_teacher",
        "inferences_total": 1518204,
        "latency_ms": {"n": 512, "p50": 14.2, "p90": 15.9, "p99": None},
        "window": {"n": 512, "capacity": 512, "stores_frames": False},
        "drift": drift | {"kind": "mean_scale"},
        "candidate": {
            "time": NOW - 240,
            "n": 512,
            "seconds": 6.4,
            "relative_gap": 8.1e-7,
            "target": "renormalised_teacher",
            "flipped": 0.12,
            "gate": gate,
            "classes": [
                {"class": name, "before": before, "after": after}
                for name, before, after in zip(names, BEFORE, AFTER, strict=True)
            ],
        },
        "skipped": {"too_hot": 3},
        "soc_temp_c": 61.5,
        "throttled": [],
        "written_today_mib": 3.2,
        "generations": [generation(6, 5, 93210, True), generation(5, 0, 193210)],
        "history": history,
        "last": history[-1],
    }


def probation():
    history = [
        entry(2400, "accepted", "gate_passed", 7),
        entry(2100, "rollback", "probation_latency", 6, None, None),
        entry(312, "accepted", "gate_passed", 9),
    ]
    return proposal() | {
        "candidate": None,
        "mode": "auto",
        "generation": 9,
        "previous": 6,
        "committed": False,
        "head_age_s": 312,
        "probation": {"seconds_left": 588, "inferences_left": 120, "tries_left": 2},
        "rollbacks_total": 1,
        "throttled": ["under_voltage"],
        "generations": [generation(9, 6, 312, True, False), generation(6, 5, 93210)],
        "history": history,
        "last": history[-1],
    }


STATES = {"fresh": fresh, "proposal": proposal, "probation": probation}
