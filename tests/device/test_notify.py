"""What systemd would receive, on a real datagram socket."""

from __future__ import annotations

import itertools
import os
import socket

import pytest

from edgesolve.device import notify


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """(socket that receives, NOTIFY_SOCKET)."""
    name = f"@edgesolve-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        inbox.setblocking(False)
        yield inbox, name


def received(inbox):
    found = []
    while True:
        try:
            found.append(inbox.recv(4096).decode())
        except BlockingIOError:
            return found


def test_every_message_arrives_as_systemd_spells_it(manager):
    inbox, name = manager
    told = notify.open_notifier(environ={"NOTIFY_SOCKET": name})
    assert told.ready() and told.status("generation 7\nREADY=0") and told.extend(90.5)
    assert told.stopping()
    assert received(inbox) == [
        "READY=1",
        "STATUS=generation 7 READY=0",  # a second line would be a second message
        "EXTEND_TIMEOUT_USEC=90500000",
        "STOPPING=1",
    ]


def test_the_watchdog_is_fed_at_most_four_times_a_period(manager):
    inbox, name = manager
    clock = Clock()
    environ = {
        "NOTIFY_SOCKET": name,
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    told = notify.open_notifier(environ=environ, clock=clock)
    assert told.watchdog_s == 30
    got = []
    for _ in range(600):  # 5 minutes at 2 Hz
        told.watchdog()
        got += received(inbox)
        clock.now += 0.5
    assert set(got) == {"WATCHDOG=1"}
    assert 300 / 30 < len(got) <= 4 * 300 / 30


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"},  # meant for somebody else
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
    ],
)
def test_no_watchdog_where_none_was_asked_of_us(manager, extra):
    inbox, name = manager
    told = notify.open_notifier(environ={"NOTIFY_SOCKET": name, **extra})
    assert told.watchdog_s is None and not told.watchdog()
    assert received(inbox) == []


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_nothing_happens_without_a_service_manager(environ):
    told = notify.open_notifier(environ={**environ, "WATCHDOG_USEC": "1000000"})
    assert not (told.ready() or told.status("x") or told.watchdog() or told.stopping())
    assert told.watchdog_s is None


def test_a_manager_that_is_gone_or_full_harms_nobody(tmp_path, monkeypatch):
    told = notify.open_notifier(environ={"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert not told.ready()
    monkeypatch.setattr(notify, "_SEND_S", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "full"))
        told = notify.open_notifier(environ={"NOTIFY_SOCKET": str(tmp_path / "full")})
        sent = list(itertools.takewhile(bool, (told.ready() for _ in range(5000))))
        assert 0 < len(sent) < 5000


def test_children_inherit_nothing_on_demand(manager):
    inbox, name = manager
    environ = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "", "HOME": "/"}
    told = notify.open_notifier(unset=True, environ=environ)
    assert environ == {"HOME": "/"}
    assert told.ready() and told.watchdog()
    assert received(inbox) == ["READY=1", "WATCHDOG=1"]
