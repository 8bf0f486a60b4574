"""The device at an MQTT broker: its state, its events, and the operator's commands (extra `mqtt`).

One thread owns paho's client through its interface for foreign event loops, so that no lock of
paho's is ever held by somebody who wants one of ours; a second one waits for commands to be done.
No command carries code, a path or a URL.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import random
import re
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from edgesolve.device.control import COMMANDS, Control
from edgesolve.device.errors import BackendError, BusyError, EdgeError, UsageError

EVENTS = 1000  # waiting for the broker
MAX_COMMAND_BYTES = 4096
MAX_ID = 64
REMEMBER_S = 600.0  # how long a command's id stands for its first result
REMEMBERED = 1000
ORDERS = 16  # commands waiting for the one before
FIRST_WAIT_S, LAST_WAIT_S, STEADY_S = 1.0, 60.0, 10.0
KEEPALIVE_S = 30
FAREWELL_S = 2.0
_IN_FLIGHT = 20
_DEVICE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PORTS = {"mqtt": 1883, "mqtts": 8883}
# How long the loop may sleep: paho's keep-alive wants to be looked at now and then.
_NAP_S = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where the broker is; `repr` hides the password."""

    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None

    def __repr__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"


class Refused(Exception):
    """A payload that is no command: the message is one sentence, `id` what it may be answered to."""

    def __init__(self, id: str | None, sentence: str) -> None:
        super().__init__(sentence)
        self.id = id


def connect(
    url: str, device: str, control: Control, *, every_s: float = 60.0, discovery: bool = False
) -> Link:
    """Start to publish below edgesolve/<device>/ and to obey commands; a broker that is away comes later.

    url : mqtt://user:password@host:1883 or mqtts://… (checked against the system's certificates, or
    SSL_CERT_FILE); user and password percent-encoded. every_s : between two states without a change.
    Raises UsageError (URL, device name) and BackendError (paho-mqtt missing).
    """
    address = parse_url(url)
    if not _DEVICE.fullmatch(device):
        raise UsageError(
            f"device name {device[:80]!r} must be 1 to 64 of the characters A-Z a-z 0-9 _ -: it names MQTT topics."
        )
    return Link(_client(address, device), address, device, control, every_s, discovery)


def parse_url(url: str) -> Address:
    """The broker's address. Raises UsageError, in which no password appears."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError(
            "the MQTT URL is malformed; expected mqtt://user:password@host:1883."
        ) from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise UsageError("the MQTT URL must look like mqtt://host:1883 or mqtts://host:8883.")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UsageError(
            "the MQTT URL ends after the port: topics are fixed, options are not read."
        )
    return Address(
        host=parts.hostname,
        port=_PORTS[parts.scheme] if port is None else port,
        tls=parts.scheme == "mqtts",
        user=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
    )


class Commands:
    """What to do about a payload on the command topic: a dict to answer with, never an exception."""

    def __init__(self, control: Control, clock: Callable[[], float] = time.monotonic) -> None:
        self._control = control
        self._clock = clock
        self._done: OrderedDict[str, tuple[float, str, dict[str, Any]]] = OrderedDict()

    def answer(self, payload: bytes) -> dict[str, Any]:
        """Read and carry out."""
        try:
            id, name = parse_command(payload)
        except Refused as refusal:
            return refused(refusal)
        return self.execute(id, name)

    def execute(self, id: str, name: str) -> dict[str, Any]:
        """Carry out a command that was read; called by one thread.

        An id seen less than ten minutes ago stands for its first result and does nothing.
        """
        self._forget()
        if id in self._done:
            _, earlier, result = self._done[id]
            if earlier == name:
                return result
            return refused(
                Refused(id, f"the id was used for {earlier} a short while ago; take a new one.")
            )
        if len(self._done) >= REMEMBERED:
            return refused(Refused(id, "too many commands within ten minutes."), "busy")
        result = {"id": id, **self._ask(name)}
        self._done[id] = self._clock(), name, result
        return result

    def _ask(self, name: str) -> dict[str, Any]:
        try:
            return dict(self._control.command(name, "mqtt"))
        except EdgeError as error:
            reason = "busy" if isinstance(error, BusyError) else "failed"
            return {"ok": False, "decision": "kept", "reason": reason, "sentence": str(error)}
        except Exception as error:
            sentence = f"the command failed by a defect of ours ({type(error).__name__})."
            return {"ok": False, "decision": "kept", "reason": "failed", "sentence": sentence}

    def _forget(self) -> None:
        before = self._clock() - REMEMBER_S
        while self._done and next(iter(self._done.values()))[0] <= before:
            self._done.popitem(last=False)


def parse_command(payload: bytes) -> tuple[str, str]:
    """(id, one of COMMANDS). Raises Refused."""
    if len(payload) > MAX_COMMAND_BYTES:
        raise Refused(None, f"a command has at most {MAX_COMMAND_BYTES} bytes.")
    try:
        found = json.loads(payload.decode(), object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        raise Refused(None, "a command is a JSON object without repeated keys, in UTF-8.") from None
    if not isinstance(found, dict):
        raise Refused(None, "a command is a JSON object.")
    id, name = found.get("id"), found.get("command")
    if not (isinstance(id, str) and 1 <= len(id) <= MAX_ID and id.isprintable()):
        raise Refused(None, f"a command has an id of 1 to {MAX_ID} printable characters.")
    if set(found) != {"id", "command"}:
        raise Refused(id, "a command has the keys id and command, and no other.")
    if not isinstance(name, str) or name not in COMMANDS:
        raise Refused(id, f"command must be one of {', '.join(COMMANDS)}.")
    return id, name


def refused(refusal: Refused, reason: str = "bad_command") -> dict[str, Any]:
    """The answer to a payload that is not carried out."""
    return {
        "id": refusal.id,
        "ok": False,
        "decision": "kept",
        "reason": reason,
        "sentence": str(refusal),
    }


def encode(value: Mapping[str, Any]) -> bytes:
    """JSON that every reader takes: NaN and infinity become null, NumPy's numbers plain ones."""
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError):
        return json.dumps(_plain(value), allow_nan=False).encode()


class Link:
    """The running connection. `event`, `changed` and `close` may be called from any thread; none waits
    for the broker but `close` (two seconds, or for an attempt to connect or a command under way)."""

    def __init__(
        self,
        client: Any,
        address: Address,
        device: str,
        control: Control,
        every_s: float,
        discovery: bool,
    ) -> None:
        self._client, self._address, self._device = client, address, device
        self._control, self._commands = control, Commands(control)
        self._every_s, self._discovery = every_s, discovery
        self._lock = threading.Lock()
        self._events: deque[bytes] = deque()
        self._dropped = 0
        self._answers: deque[bytes] = deque(maxlen=EVENTS)
        self._in_flight: set[int] = set()  # events
        self._told: set[int] = set()  # all else that is to be acknowledged
        self._orders: queue.Queue[tuple[str, str] | None] = queue.Queue(ORDERS)
        self._connected = False
        self._trouble: str | None = "not connected yet"
        self._changed = True
        self._published = -math.inf
        self._leaving = False
        self._closing = threading.Event()
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        self._threads = [
            threading.Thread(target=self._network, name="mqtt", daemon=True),
            threading.Thread(target=self._obey, name="mqtt-commands", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def trouble(self) -> str | None:
        """Why there is no connection; None while there is one."""
        return None if self._connected else self._trouble

    def event(self, entry: Mapping[str, Any]) -> None:
        """Publish `entry`, at least once, as soon as the broker is there. At most 1,000 wait: what comes
        after is counted, and the count published where the gap is."""
        payload = encode(entry)
        with self._lock:
            if len(self._events) + len(self._in_flight) >= EVENTS:
                self._dropped += 1
            else:
                self._mark_gap()
                self._events.append(payload)
        self._ring()

    def changed(self) -> None:
        """Publish the state now."""
        self._changed = True
        self._ring()

    def close(self) -> None:
        """Say "offline", hand over what can be within two seconds, end both threads."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._ring()
        with contextlib.suppress(queue.Full):
            self._orders.put_nowait(None)
        for thread in self._threads:
            thread.join()
        self._ear.close()
        self._bell.close()

    # The thread "mqtt-commands".

    def _obey(self) -> None:
        while (order := self._orders.get()) is not None and not self._closing.is_set():
            self._answers.append(encode(self._commands.execute(*order)))
            self._ring()

    # The thread "mqtt": nobody else touches the client.

    def _network(self) -> None:
        wait = FIRST_WAIT_S
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                self._client.connect(self._address.host, self._address.port, KEEPALIVE_S)
                while not self._closing.is_set() and self._turn(_NAP_S):
                    pass
            except (OSError, ValueError) as error:  # ValueError: a host that is no name
                self._trouble = f"{self._address!r}: {error}"
            if self._connected and self._closing.is_set():
                self._farewell()
            self._connected = False
            wait = FIRST_WAIT_S if time.monotonic() - began > STEADY_S else wait
            wait = min(2 * wait, LAST_WAIT_S)
            # Jitter: after a power cut a thousand cameras shouldn't come back in the same second.
            self._closing.wait(random.uniform(FIRST_WAIT_S, wait))
        self._client.disconnect()

    def _turn(self, nap_s: float) -> bool:
        """Wait for something to do and do it; False once there is no connection."""
        if self._connected:
            nap_s = min(nap_s, self._send_waiting())
        wire = self._client.socket()
        if wire is None:
            return False
        writing = [wire] if self._client.want_write() else []
        readable, writable, _ = select.select([wire, self._ear], writing, [], nap_s)
        if self._ear in readable:
            with contextlib.suppress(BlockingIOError):
                self._ear.recv(4096)
        if wire in readable:
            self._client.loop_read()
            # TLS may hold whole packets that select doesn't see.
            while self._client.socket() is wire and getattr(wire, "pending", int)():
                self._client.loop_read()
        if writable:
            self._client.loop_write()
        self._client.loop_misc()
        return self._client.socket() is not None

    def _send_waiting(self) -> float:
        """Hand over what fits; seconds until the next state is due."""
        now = time.monotonic()
        if not self._leaving and (self._changed or now - self._published >= self._every_s):
            self._changed, self._published = False, now
            self._publish_state()
        while self._answers and len(self._told) < _IN_FLIGHT:
            self._told.add(self._publish("command/result", self._answers.popleft(), qos=1))
        while len(self._in_flight) < _IN_FLIGHT and (payload := self._next_event()) is not None:
            self._in_flight.add(self._publish("event", payload, qos=1))
        return max(0.0, self._published + self._every_s - now)

    def _publish_state(self) -> None:
        # QoS 0: paho would repeat an unacknowledged state after the fresh one of the next connection.
        # "online" with every one of them: a broker that learns late of an old connection's end says "offline".
        self._publish("availability", b"online", retain=True)
        with contextlib.suppress(
            Exception
        ):  # a status that can't be had must not end the connection
            self._publish("state", encode(self._control.status()), retain=True)

    def _next_event(self) -> bytes | None:
        with self._lock:
            if not self._events:
                self._mark_gap()
            return self._events.popleft() if self._events else None

    def _mark_gap(self) -> None:
        if self._dropped:
            self._events.append(encode({"event": "dropped", "n": self._dropped}))
            self._dropped = 0

    def _farewell(self) -> None:
        """Still connected and about to close: the rest of the answers and events, then "offline"."""
        until = time.monotonic() + FAREWELL_S
        while time.monotonic() < until and self._turn(0.1):
            if self._events or self._answers or self._in_flight or self._told:
                continue
            if self._leaving:
                return
            self._leaving = True
            self._told.add(self._publish("availability", b"offline", qos=1, retain=True))

    def _publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> int:
        return self._client.publish(f"{_base(self._device)}/{topic}", payload, qos, retain).mid

    def _ring(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # full: it rings already; closed: nobody listens any more
            self._bell.send(b"\0")

    # paho's callbacks, on the same thread.

    def _on_connect(self, client, userdata, flags, reason, properties) -> None:
        if reason.is_failure:
            self._trouble = f"{self._address!r}: {reason}"
            return
        self._connected, self._changed = True, True
        client.subscribe(f"{_base(self._device)}/command", qos=1)
        if self._discovery:
            topic, payload = discovery(self._device)
            client.publish(topic, payload, retain=True)

    def _on_disconnect(self, client, userdata, flags, reason, properties) -> None:
        if self._connected:
            self._connected, self._trouble = False, f"{self._address!r}: {reason}"

    def _on_publish(self, client, userdata, mid, reason, properties) -> None:
        self._in_flight.discard(mid)
        self._told.discard(mid)

    def _on_message(self, client, userdata, message) -> None:
        if message.retain:  # left at the broker by an earlier order: obeying it again at every
            return  # reconnection would roll back twice
        try:
            order = parse_command(message.payload)
        except Refused as refusal:
            self._answers.append(encode(refused(refusal)))
            return
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            refusal = Refused(order[0], f"{ORDERS} commands wait already; try again later.")
            self._answers.append(encode(refused(refusal, "busy")))


def discovery(device: str) -> tuple[str, bytes]:
    """Home Assistant's retained topic and payload for the drift score."""
    base, name = _base(device), f"edgesolve_{device}_drift"
    payload = {
        "name": "Drift",
        "unique_id": name,
        "object_id": name,
        "state_topic": f"{base}/state",
        "value_template": "{{ value_json.drift.score if value_json.drift else None }}",
        "state_class": "measurement",
        "availability_topic": f"{base}/availability",
        "device": {"identifiers": [f"edgesolve_{device}"], "name": device},
    }
    return f"homeassistant/sensor/{name}/config", encode(payload)


def _client(address: Address, device: str) -> Any:
    try:
        import paho.mqtt.client as paho

        version = paho.CallbackAPIVersion.VERSION2
    except (ImportError, AttributeError):
        raise BackendError("MQTT needs paho-mqtt 2: pip install 'edgesolve[mqtt]'") from None
    # One id per device: after a crash the broker closes the old connection before it opens the new one.
    client = paho.Client(version, client_id=f"edgesolve-{device}", clean_session=True)
    client.max_inflight_messages_set(0)  # the window is ours: in order, and counted
    client.will_set(f"{_base(device)}/availability", b"offline", qos=1, retain=True)
    if address.user is not None:
        client.username_pw_set(address.user, address.password)
    if address.tls:
        client.tls_set()
    return client


def _base(device: str) -> str:
    return f"edgesolve/{device}"


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
