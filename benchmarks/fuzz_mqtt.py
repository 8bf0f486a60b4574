"""Hostile payloads on the command topic: does anything crash, stay unanswered, or get carried out?

    python benchmarks/fuzz_mqtt.py [--cases 30000] [--broker mqtt://127.0.0.1:1883 --through 300]

A referee of its own decides what a valid command is; --broker sends some through a real one as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter

from edgesolve.device import mqtt
from edgesolve.device.control import COMMANDS

WORDS = [
    *COMMANDS,
    "factory-reset",
    "FREEZE",
    "freeze ",
    "",
    "../../etc/passwd",
    "http://x/y",
    "ä",
    "\x00",
]
ATOMS = [None, True, 0, -1, 10**300, 1.5, [], {}, [[]], "x" * 65, "x" * 64, "\ud800", "c\n1", "c1"]


class Recorder:
    """A Control that only counts."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def status(self) -> dict:
        return {"generation": 0}

    def command(self, name: str, source: str) -> dict:
        self.done.append(name)
        return {
            "ok": True,
            "decision": "kept",
            "reason": "no_drift",
            "generation": 0,
            "sentence": "",
        }


def payload(rng: random.Random, number: int) -> bytes:
    """One case: valid, nearly valid, mutated bytes, deep, long, or noise."""
    good = {"id": f"n{number}", "command": rng.choice(COMMANDS)}
    kind = rng.randrange(10)
    if kind == 0:
        return json.dumps(good).encode()
    if kind == 1:
        return json.dumps(
            {**good, rng.choice(["id", "command"]): rng.choice(ATOMS + WORDS)}
        ).encode()
    if kind == 2:
        return json.dumps(
            {**good, rng.choice([*WORDS, "path", "url", "code"]): rng.choice(WORDS)}
        ).encode()
    if kind == 3:
        text = json.dumps(good)[:-1]
        return f'{text}, "{rng.choice(["id", "command"])}": "{rng.choice(COMMANDS)}"}}'.encode()
    if kind == 4:
        return rng.randbytes(rng.randrange(200))
    if kind == 5:
        return rng.choice([b"[", b'{"id":', b"1", b"\\u"]) * rng.randrange(1, 2000)
    if kind == 6:
        return json.dumps(good).encode() + b" " * rng.randrange(4000, 4200)
    if kind == 7:
        return json.dumps(good).encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"]))
    if kind == 8:
        return json.dumps(rng.choice(ATOMS)).encode()
    found = bytearray(json.dumps(good).encode())
    for _ in range(rng.randrange(1, 4)):
        found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def expected(data: bytes) -> str | None:
    """The command that `data` is, by a referee that shares no code with device/mqtt.py; None: none."""
    if len(data) > 4096:
        return None
    try:
        pairs = json.loads(data.decode("utf-8"), object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) for p in pairs):
        return None
    if sorted(key for key, _ in pairs) != ["command", "id"]:
        return None
    found = dict(pairs)
    id, name = found["id"], found["command"]
    fits = isinstance(id, str) and 0 < len(id) < 65 and id.isprintable()
    return name if fits and isinstance(name, str) and name in COMMANDS else None


def direct(cases: int, seed: int) -> Counter:
    """Straight into the handler; its clock runs a second a case, so that ids are forgotten in time."""
    rng, control, count, now = random.Random(seed), Recorder(), Counter(), [0.0]
    commands = mqtt.Commands(control, clock=lambda: now[0])
    earlier: dict[str, float] = {}
    for number in range(cases):
        data, before = payload(rng, number), len(control.done)
        now[0] += 1.0
        wanted = expected(data)
        try:
            answer = commands.answer(data)
        except Exception:
            count["crashes"] += 1
            continue
        done = control.done[before:]
        id = answer.get("id")
        fresh = wanted is not None and now[0] - earlier.get(id, -1e9) >= mqtt.REMEMBER_S
        if fresh:
            earlier[id] = now[0]
        count["unanswered"] += not {"id", "ok", "decision", "reason", "sentence"} <= set(answer)
        count["wrongly executed"] += done != ([wanted] if fresh else [])
        count["valid"] += wanted is not None
    return count | Counter(cases=cases)


def through(url: str, cases: int, seed: int) -> Counter:
    """The same through a broker, one after the other answered."""
    import paho.mqtt.client as paho

    rng, control, answers, there = random.Random(seed), Recorder(), [], []
    address = mqtt.parse_url(url)
    sender = paho.Client(paho.CallbackAPIVersion.VERSION2)
    sender.on_message = lambda c, u, m: answers.append(json.loads(m.payload))
    sender.on_connect = lambda c, *_: c.subscribe("edgesolve/fuzz/command/result", 1)
    sender.on_subscribe = lambda *_: there.append(True)
    sender.connect(address.host, address.port)
    sender.loop_start()
    link = mqtt.connect(url, "fuzz", control)
    try:
        _wait(lambda: there and link.trouble is None)
        time.sleep(0.5)  # the link's own subscription
        sent = [payload(rng, number) for number in range(cases)]
        for number, data in enumerate(sent):
            sender.publish("edgesolve/fuzz/command", data, qos=1)
            _wait(lambda: len(answers) > number)  # noqa: B023
        alive = link.trouble is None
    finally:
        link.close()
        sender.disconnect()
        sender.loop_stop()
    wanted = [name for data in sent if (name := expected(data)) is not None]
    return Counter(
        {
            "cases": cases,
            "crashes": int(not alive),
            "unanswered": cases - len(answers),
            "wrongly executed": sum((Counter(control.done) - Counter(wanted)).values()),
            "valid": len(wanted),
        }
    )


def _wait(told, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not told() and time.monotonic() < end:
        time.sleep(0.001)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=30000)
    parser.add_argument("--through", type=int, default=300, help="cases through the broker")
    parser.add_argument("--broker", help="URL of a broker; none: the direct cases only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    runs = {"direct": direct(options.cases, options.seed)}
    if options.broker:
        runs["through the broker"] = through(options.broker, options.through, options.seed + 1)
    bad = ("crashes", "unanswered", "wrongly executed")
    for name, count in runs.items():
        print(f"{name}: " + ", ".join(f"{count[k]} {k}" for k in ("cases", "valid", *bad)))
    return int(any(count[k] for count in runs.values() for k in bad))


if __name__ == "__main__":
    sys.exit(main())
