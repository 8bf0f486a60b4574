"""The device at a real broker: amqtt, else mosquitto, as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest

from edgesolve.device import mqtt
from edgesolve.device.control import COMMANDS
from edgesolve.device.errors import BackendError, BusyError, UsageError

paho = pytest.importorskip("paho.mqtt.client", reason="the extra `mqtt` is missing")

AMQTT = """
listeners:
  default: {{type: tcp, bind: "127.0.0.1:{port}"}}
plugins:
  amqtt.plugins.authentication.AnonymousAuthPlugin: {{allow_anonymous: true}}
"""
CLIENT = """
import sys, time
from edgesolve.device import mqtt
class Control:
    def status(self):
        return {"generation": 7}
link = mqtt.connect(sys.argv[1], "cam", Control())
time.sleep(60)
"""


class Fake:
    """A Control that remembers what it was told."""

    def __init__(self):
        self.done = []
        self.generation = 7
        self.threads = set()

    def status(self):
        return {"schema": 1, "generation": self.generation, "drift": None}

    def command(self, name, source):
        self.done.append(name)
        self.threads.add(threading.current_thread().name)
        if name == "approve":
            raise BusyError("a solve runs; try again later.")
        if name == "reject":
            raise RuntimeError("secret")
        reason = f"{source}_{len(self.done)}"
        return {"ok": True, "decision": "kept", "reason": reason, "generation": 7, "sentence": "."}


class Broker:
    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.config = folder / "broker.conf"
        if find_spec("amqtt"):
            self.config.write_text(AMQTT.format(port=self.port))
            start = "from amqtt.scripts.broker_script import main; main()"
            self.command = [sys.executable, "-c", start, "-c", str(self.config)]
        elif mosquitto := shutil.which("mosquitto"):
            self.config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")
            self.command = [mosquitto, "-c", str(self.config)]
        else:
            pytest.skip("no MQTT broker: neither amqtt nor mosquitto is installed")
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self._listens, 30)

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _listens(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


class Listener:
    """Another client: all that arrives, as (topic below the device, payload, retained)."""

    def __init__(self, broker):
        self.got = []
        there = threading.Event()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        self.client.on_connect = lambda c, *_: c.subscribe("#", 1)
        self.client.on_subscribe = lambda *_: there.set()
        self.client.on_message = self._keep
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        assert there.wait(20)

    def _keep(self, client, userdata, message):
        topic = message.topic.removeprefix("edgesolve/cam/")
        self.got.append((topic, message.payload, bool(message.retain)))

    def of(self, topic):
        return [payload for found, payload, _ in self.got if found == topic]

    def answers(self):
        return [json.loads(payload) for payload in self.of("command/result")]

    def order(self, payload, retain=False):
        data = json.dumps(payload) if isinstance(payload, dict) else payload
        self.client.publish("edgesolve/cam/command", data, 1, retain)

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


def guard(link):
    """The link finds the broker only once this is set: after the listener subscribed."""
    door, connect = threading.Event(), link._client.connect

    def guarded(*arguments):
        if not door.is_set():
            raise ConnectionRefusedError("refused by the test")
        return connect(*arguments)

    link._client.connect = guarded
    return door


def until(told, seconds=20):
    end = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def listener(broker):
    listener = Listener(broker)
    yield listener
    listener.order(b"", retain=True)
    listener.close()


@pytest.fixture
def control():
    return Fake()


@pytest.fixture
def link(broker, control):
    link = mqtt.connect(broker.url, "cam", control, discovery=True)
    until(lambda: link.trouble is None)
    yield link
    link.close()


def test_state_is_retained_and_follows_every_change(broker, control, listener, link):
    until(lambda: listener.of("state"))
    late = Listener(broker)  # subscribes after the first state
    try:
        until(lambda: late.of("state") and late.of("availability"))
        assert ("availability", b"online", True) in late.got
        assert json.loads(late.of("state")[0])["generation"] == 7
        control.generation = 8
        link.changed()
        until(lambda: json.loads(late.of("state")[-1])["generation"] == 8)
    finally:
        late.close()


def test_the_state_is_repeated_without_a_change(broker, control, listener):
    link = mqtt.connect(broker.url, "cam", control, every_s=0.2)
    until(lambda: len([1 for t, _, retained in listener.got if t == "state" and not retained]) >= 3)
    link.close()
    until(lambda: listener.of("availability")[-1] == b"offline")


def test_discovery_names_our_topics(listener, link):
    topic = "homeassistant/sensor/edgesolve_cam_drift/config"
    until(lambda: listener.of(topic))
    found = json.loads(listener.of(topic)[0])
    assert found["state_topic"] == "edgesolve/cam/state"
    assert found["availability_topic"] == "edgesolve/cam/availability"


def test_a_killed_process_is_offline(broker, listener):
    child = subprocess.Popen([sys.executable, "-c", CLIENT, broker.url])
    try:
        until(lambda: listener.of("availability")[-1:] == [b"online"])
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    until(lambda: listener.of("availability")[-1] == b"offline")


def test_a_command_is_answered_and_the_same_id_does_nothing_more(listener, control, link):
    for _ in range(3):
        listener.order({"id": "c1", "command": "freeze"})
    listener.order({"id": "c1", "command": "rollback"})
    listener.order({"id": "c2", "command": "rollback"})
    until(lambda: len(listener.answers()) == 5)
    first, again, third, reused, other = listener.answers()
    assert first == again == third and first["id"] == "c1" and first["ok"] is True
    assert (first["decision"], first["reason"]) == ("kept", "mqtt_1")
    assert (reused["id"], reused["ok"], reused["reason"]) == ("c1", False, "bad_command")
    assert (other["id"], other["ok"]) == ("c2", True)
    assert control.done == ["freeze", "rollback"]
    assert control.threads == {"mqtt-commands"}  # paho's thread stays free


def test_a_retained_command_is_not_obeyed_again(broker, listener, control):
    listener.order({"id": "old", "command": "rollback"}, retain=True)
    until(lambda: listener.of("command"))
    link = mqtt.connect(broker.url, "cam", control)
    listener.order({"id": "new", "command": "freeze"})
    until(lambda: link.trouble is None)
    time.sleep(0.2)
    listener.order({"id": "new2", "command": "freeze"})
    until(lambda: "new2" in [a["id"] for a in listener.answers()])
    link.close()
    assert "rollback" not in control.done


def test_hostile_payloads_are_answered_and_change_nothing(listener, control, link):
    for payload in HOSTILE:
        listener.order(payload)
    until(lambda: len(listener.answers()) == len(HOSTILE))
    assert {(a["ok"], a["reason"]) for a in listener.answers()} == {(False, "bad_command")}
    assert control.done == []
    listener.order({"id": "after", "command": "freeze"})
    until(lambda: control.done == ["freeze"])


def test_events_published_while_the_broker_is_away_arrive_in_order(tmp_path, control, monkeypatch):
    monkeypatch.setattr(mqtt, "LAST_WAIT_S", 1.0)
    broker = Broker(tmp_path)
    link = mqtt.connect(broker.url, "cam", control)  # nobody listens: no error
    door = guard(link)
    try:
        sent = 0
        for _ in range(2):
            until(lambda: "refused" in (link.trouble or ""))
            for k in range(sent, sent + 40):
                link.event({"event": "kept", "k": k})
            broker.start()
            listener = Listener(broker)
            door.set()
            numbers = list(range(sent, sent + 40))
            until(lambda: len(listener.of("event")) >= 40)  # noqa: B023
            assert [json.loads(p)["k"] for p in listener.of("event")] == numbers
            door.clear()
            listener.close()
            until(lambda: not link._in_flight)
            broker.stop()
            sent += 40
    finally:
        link.close()
        broker.stop()


def test_what_does_not_fit_is_counted_where_the_gap_is(tmp_path, control, monkeypatch):
    monkeypatch.setattr(mqtt, "EVENTS", 50)
    broker = Broker(tmp_path)
    link = mqtt.connect(broker.url, "cam", control)
    for k in range(57):
        link.event({"k": k})
    try:
        door = guard(link)
        broker.start()
        listener = Listener(broker)
        door.set()
        until(lambda: len(listener.of("event")) == 51)
        link.event({"k": "after"})
        until(lambda: len(listener.of("event")) == 52)
        got = [json.loads(p) for p in listener.of("event")]
        assert [e["k"] for e in got[:50]] == list(range(50))
        assert got[50] == {"event": "dropped", "n": 7}
        assert got[51] == {"k": "after"}
        listener.close()
    finally:
        link.close()
        broker.stop()


def test_close_leaves_no_thread_with_and_without_a_broker(broker, control):
    before = set(threading.enumerate())
    for url in (broker.url, "mqtt://127.0.0.1:1"):
        link = mqtt.connect(url, "cam", control)
        time.sleep(0.1)
        link.close()
        link.close()
        link.event({"event": "kept"})  # too late, and no error
        link.changed()
    assert set(threading.enumerate()) == before


# Without a broker.

HOSTILE = [
    b"\xff\xfe",
    b"[" * 4096,
    b"1" * 4096,
    b" " * 4097,
    b"null",
    b'"freeze"',
    b"{}",
    b'{"id": "h1"}',
    b'{"id": "h2", "command": "factory-reset"}',
    b'{"id": "h3", "command": "freeze", "path": "/etc/passwd"}',
    b'{"id": "h4", "command": ["freeze"]}',
    b'{"id": "h5", "command": "freeze", "command": "rollback"}',
    b'{"id": "h6", "command": "freeze "}',
    b'{"id": 6, "command": "freeze"}',
    b'{"id": "", "command": "freeze"}',
    b'{"id": "\\ud800", "command": "freeze"}',
    b'{"id": "a\\nb", "command": "freeze"}',
    b'{"id": "' + b"x" * 65 + b'", "command": "freeze"}',
    b'\xef\xbb\xbf{"id": "bom", "command": "freeze"}',
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reaches_the_service(control, name):
    answer = mqtt.Commands(control).answer(json.dumps({"id": "c", "command": name}).encode())
    assert control.done == [name] and answer["id"] == "c"
    expected = {"approve": (False, "busy"), "reject": (False, "failed")}.get(name, (True, "mqtt_1"))
    assert (answer["ok"], answer["reason"]) == expected
    assert "secret" not in json.dumps(answer)


def test_an_id_counts_for_ten_minutes_and_memory_is_bounded(control):
    now = [0.0]
    commands = mqtt.Commands(control, clock=lambda: now[0])
    assert commands.execute("a", "freeze") == commands.execute("a", "freeze")
    now[0] = 599
    commands.execute("a", "freeze")
    assert len(control.done) == 1
    now[0] = 601
    commands.execute("a", "freeze")
    assert len(control.done) == 2
    answers = [commands.execute(f"b{k}", "freeze") for k in range(1500)]
    assert [a["reason"] for a in answers].count("busy") == 1500 - 999
    assert len(control.done) == 2 + 999


@pytest.mark.parametrize(
    "url",
    ["", "http://h", "mqtt://", "mqtt://h:x", "mqtt://h:70000", "mqtt://h/topic", "mqtt://h?ca=/x"],
)
def test_a_url_that_is_none(control, url):
    with pytest.raises(UsageError, match="MQTT URL"):
        mqtt.connect(url, "cam", control)


def test_the_password_is_decoded_and_never_shown():
    address = mqtt.parse_url("mqtts://u%40x:p%3Aw@broker.local")
    assert (address.user, address.password, address.port) == ("u@x", "p:w", 8883)
    assert "p:w" not in repr(address) and "u@x" not in repr(address)
    with pytest.raises(UsageError) as caught:
        mqtt.parse_url("mqtt://u:hunter2@h:bad")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("device", ["", "a/b", "+", "#", "ä", "x" * 65, "a\n", "a b"])
def test_a_device_name_that_would_leave_its_topics(control, device):
    with pytest.raises(UsageError, match="device name"):
        mqtt.connect("mqtt://127.0.0.1:1", device, control)


def test_numbers_that_json_does_not_know_become_null():
    value = {"a": float("nan"), "b": [float("inf"), np.float32(1.5)], "c": np.int64(3), "d": None}
    assert json.loads(mqtt.encode(value)) == {"a": None, "b": [None, 1.5], "c": 3, "d": None}


def test_without_paho_the_sentence_names_the_extra(control, monkeypatch):
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    with pytest.raises(BackendError, match=r"pip install 'edgesolve\[mqtt\]'"):
        mqtt.connect("mqtt://127.0.0.1:1", "cam", control)
