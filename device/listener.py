"""Sockets and threads of the web server: bounded, with a deadline for whoever is slow."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import itertools
import re
import socket
import sys
import threading
import time
import traceback
from collections import deque
from socketserver import TCPServer
from typing import Any

from edgesolve.device.errors import UsageError

CONNECTIONS = 8


def resolved(address: str) -> tuple[int, tuple]:
    """(address family, what to bind) for "HOST:PORT", ":PORT" (loopback) or "[IPv6]:PORT". Raises UsageError."""
    found = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]*):(\d{1,5})", address, re.ASCII)
    if not found or int(found[2]) > 65535:
        raise UsageError(
            f"{address}: not an address; expected HOST:PORT, such as 127.0.0.1:8080, :8080 (this "
            "machine only) or [::1]:8080."
        )
    host = found[1].strip("[]") or "127.0.0.1"
    try:
        info = socket.getaddrinfo(host, int(found[2]), type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{address}: {host} is not a host of this machine.") from error
    return info[0], info[4]


class Listener(TCPServer):
    """Accepts connections; at most CONNECTIONS are served at a time, the others wait in the kernel's queue.

    When all are taken, one that only waits for its client makes room, so that idle browsers and slow senders
    don't shut out a health check.
    """

    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, family: int, where: tuple, handler: type, settings: Any):
        self.address_family = family
        self.settings = settings
        self._said: deque[tuple[str, str]] = deque(maxlen=16)
        self._numbers = itertools.count(1)
        self.defects: set[str] = set()
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._lock = threading.Lock()
        self._served: dict[threading.Thread, socket.socket] = {}
        self._waiting: dict[socket.socket, float] = {}
        self._closing = False
        super().__init__(where, handler)
        host = ipaddress.ip_address(str(self.server_address[0]).partition("%")[0])
        self.loopback = host.is_loopback

    def get_request(self):
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.05)  # out of descriptors: the queue stays readable, and would spin
            raise

    def process_request(self, request, client_address) -> None:
        while not self._slots.acquire(blocking=False):
            if self._closing:
                self.shutdown_request(request)
                return
            self._make_room()
            if self._slots.acquire(timeout=0.05):
                break
        thread = threading.Thread(
            target=self._serve, args=(request, client_address), name="http client", daemon=True
        )
        with self._lock:
            self._served[thread] = request
        try:
            thread.start()
        except RuntimeError:
            self._gone(thread)
            self.shutdown_request(request)

    def _serve(self, request, client_address) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)
            self._gone(threading.current_thread())

    def _gone(self, thread: threading.Thread) -> None:
        with self._lock:
            request = self._served.pop(thread)
            self._waiting.pop(request, None)
        self._slots.release()

    def waits(self, request: socket.socket, patience_s: float) -> None:
        """This connection waits for its client; after `patience_s` it may be ended to make room."""
        with self._lock:
            self._waiting[request] = time.monotonic() + patience_s

    def works(self, request: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(request, None)

    def _make_room(self) -> None:
        with self._lock:
            first = min(self._waiting, key=self._waiting.__getitem__, default=None)
            if first is not None and self._waiting[first] <= time.monotonic():
                del self._waiting[first]
                # What has arrived can still be read and answered: only the waiting ends.
                with contextlib.suppress(OSError):
                    first.shutdown(socket.SHUT_RD)

    def remember(self, sentence: str) -> int:
        """A number under which the page shows `sentence` after a redirect; the last 16 are kept."""
        number = next(self._numbers)
        self._said.append((str(number), sentence))
        return number

    def remembered(self, number: str) -> str:
        return dict(list(self._said)).get(number, "")

    def stop(self) -> None:
        self._closing = True
        self.shutdown()
        self.server_close()
        with self._lock:
            threads = dict(self._served)
            for request in threads.values():
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)
        until = time.monotonic() + 2.0
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def handle_error(self, request, client_address) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.defect(error)

    def defect(self, error: BaseException) -> None:
        """Each defect of ours goes to stderr once: a request that finds one must not fill the log."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        key = f"{type(error).__name__} {place.filename}:{place.lineno}"
        with self._lock:
            new = key not in self.defects and len(self.defects) < 32
            self.defects.add(key)
        if new:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            print(f"edgesolve: a defect in the web server:\n{text}", file=sys.stderr, flush=True)


class Gone(Exception):
    """The client has gone. Not an OSError: those are the service's own."""


class Late(Exception):
    """The client took too long."""


class Stream(io.RawIOBase):
    """A socket's bytes until `deadline` (monotonic): a client that sends byte by byte gains no time.

    Raises Late and Gone. `received` counts the bytes.
    """

    def __init__(self, connection: socket.socket):
        self.connection, self.deadline, self.received = connection, 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Late
        try:
            self.connection.settimeout(left)
            n = self.connection.recv_into(buffer)
        except TimeoutError:
            raise Late from None
        except OSError:
            raise Gone from None
        self.received += n
        return n
