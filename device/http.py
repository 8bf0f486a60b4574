"""The web server of `edgesolve serve`: health, metrics, status, one page; predictions and commands.

    GET /  /healthz  /readyz  /metrics  /status.json  /login?token=…      POST /predict  /command

Nothing is read from disk and nothing is written. A command needs the token: `Authorization: Bearer`, or the
cookie that /login sets. SameSite=Strict and the check of Origin stand in for a hidden form field: no other site
can make a browser post here (SameSite alone would let another port of this host do it).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import io
import ipaddress
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from edgesolve.device import upload
from edgesolve.device.bundle import Contract
from edgesolve.device.control import COMMANDS
from edgesolve.device.errors import BusyError, EdgeError, InputError, UsageError
from edgesolve.device.listener import Gone, Late, Listener, Stream, resolved

if TYPE_CHECKING:
    from edgesolve.device.control import Control

TIMEOUT_S = 10.0
HEAD_BYTES = 16 << 10
COMMAND_BYTES = 4 << 10
COOKIE = "edgesolve"
ROUTES = {
    "/": ("GET", "_page"),
    "/healthz": ("GET", "_healthz"),
    "/readyz": ("GET", "_readyz"),
    "/metrics": ("GET", "_metrics"),
    "/status.json": ("GET", "_status"),
    "/login": ("GET", "_login"),
    "/predict": ("POST", "_predict"),
    "/command": ("POST", "_command"),
}
_ALLOW = {"GET": "GET, HEAD", "POST": "POST"}
_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'"
_SECURITY = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    # Not "no-referrer": browsers then send "Origin: null" with our own forms too.
    ("Referrer-Policy", "same-origin"),
)
_OFF = "commands are off: start with --token-file."
_HEADER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r?\n")


class Server:
    """A running server: `url`, and `close()`, which ends every connection and thread."""

    def __init__(self, listener: Listener):
        self._listener = listener
        self._thread = threading.Thread(
            target=listener.serve_forever, args=(0.1,), name="http", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        host, port = self._listener.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def close(self) -> None:
        self._listener.stop()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()


def serve(
    address: str,
    control: Control,
    *,
    token: str | None = None,
    metrics: Callable[[], tuple[bytes, str]] | None = None,
    contract: Contract | None = None,
    max_bytes: int = 10 << 20,
    timeout_s: float = TIMEOUT_S,
    say: Callable[[str], None] | None = None,
) -> Server:
    """Listen on `address` ("127.0.0.1:8080", ":8080" = loopback only, "[::1]:0" = any free port), in threads.

    contract : the bundle's; images in /predict are converted and resized to it. None: /predict is off.
    metrics : () -> (body, content type) of /metrics.
    max_bytes : largest body of /predict.
    timeout_s : from a request's first byte awaited to its last byte read, and again for the answer.
    say : gets one line a request.

    Raises UsageError with one sentence if the address makes no sense or is taken, or the token is no token.
    """
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UsageError("the token must be one line of printable ASCII without spaces.")
    family, where = resolved(address)
    settings = _Settings(control, token, metrics, contract, max_bytes, timeout_s, say)
    try:
        listener = Listener(family, where, _Handler, settings)
    except OSError as error:
        raise UsageError(
            f"{address}: cannot listen here ({error.strerror}). Choose another address or port."
        ) from error
    return Server(listener)


class _Settings:
    """What the handlers know: never changed once the server runs."""

    def __init__(self, control, token, metrics, contract, max_bytes, timeout_s, say):
        self.control, self.metrics, self.contract, self.say = control, metrics, contract, say
        self.max_bytes, self.timeout_s = max_bytes, timeout_s
        self.token = None if token is None else token.encode()
        # Cookies are sent to every port of a host: a value made from the token, not the token.
        self.cookie = self.token and hmac.new(self.token, b"cookie", "sha256").hexdigest().encode()


class _Refusal(Exception):
    """The request isn't answered with what it asks for: a status and one sentence."""

    def __init__(self, status: int, sentence: str, *headers: tuple[str, str]):
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"
    disable_nagle_algorithm = True
    server: Listener

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._stream = Stream(self.connection)
        self.rfile = io.BufferedReader(self._stream)
        self._linger = False
        self._patience_s = 1.0

    def finish(self) -> None:
        # Closing on bytes not read would reset the connection and take our answer with it.
        if self._linger:
            with contextlib.suppress(OSError, Gone, Late):
                self._drain()
        super().finish()

    def _drain(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)
        self._stream.deadline = time.monotonic() + 1.0
        self.server.waits(self.connection, 0.0)
        while self._stream.read(1 << 16):
            pass

    def handle_one_request(self) -> None:
        self.close_connection = True
        self._left = -1  # bytes of the body not read yet; until they are known, a refusal closes
        self.command, self.requestline, self.request_version = "", "", "HTTP/1.1"
        self._stream.deadline = time.monotonic() + self.server.settings.timeout_s
        self.server.waits(self.connection, self._patience_s)
        before = self._stream.received
        try:
            self._one_request()
        except _Refusal as refusal:
            self._refuse(refusal)
        except Late:
            if self._stream.received > before:
                self._refuse(_Refusal(408, "the request took too long to arrive."))
        except Gone:
            self.close_connection = True
        except Exception as error:
            self.server.defect(error)
            self._refuse(_Refusal(500, "a defect of edgesolve; its log says more."))
        self._patience_s = 0.0  # whoever keeps a connection open without asking makes room first

    def _one_request(self) -> None:
        lines = self._head()
        if not lines:
            return
        self.server.waits(self.connection, 1.0)
        self._parse(lines)
        try:
            parts = urlsplit(self.path)
        except ValueError:
            raise _Refusal(400, "the address in the request is malformed.") from None
        self._check_host()
        self._left = self._length()
        self.query = parts.query
        if (parts.path or "/") not in ROUTES:
            raise _Refusal(404, "there is nothing at this address.")
        method, name = ROUTES[parts.path or "/"]
        if ("GET" if self.command == "HEAD" else self.command) != method:
            allow = _ALLOW[method]
            raise _Refusal(405, f"this address takes {allow} only.", ("Allow", allow))
        try:
            getattr(self, name)()
        except upload.TooLarge as error:
            raise _Refusal(413, str(error)) from error
        except InputError as error:
            raise _Refusal(422, str(error)) from error
        except BusyError as error:
            raise _Refusal(409, str(error)) from error
        except EdgeError as error:
            raise _Refusal(503, str(error)) from error

    # -- reading a request

    def _head(self) -> list[bytes]:
        """The request line and the header lines, checked; [] if the client has nothing more to ask."""
        lines: list[bytes] = []
        size = 0
        while True:
            line = self.rfile.readline(HEAD_BYTES + 1 - size)
            size += len(line)
            if size > HEAD_BYTES:
                status = 431 if lines else 414
                raise _Refusal(status, f"the request's head is longer than {HEAD_BYTES} bytes.")
            if not line.endswith(b"\n"):
                if lines or line:
                    raise _Refusal(400, "the request ended within its headers.")
                return []
            if line in (b"\r\n", b"\n"):
                if lines:
                    return lines
                continue  # RFC 9112, 2.2: an empty line before a request is no request
            if lines and not _HEADER.fullmatch(line):
                raise _Refusal(400, "a header line of the request is malformed.")
            lines.append(line)

    def _parse(self, lines: list[bytes]) -> None:
        if not re.fullmatch(rb"[A-Za-z-]{1,20} [!-~]+ HTTP/\d\.\d\r?\n", lines[0]):
            raise _Refusal(400, "the request line is malformed.")
        self.raw_requestline = lines[0]
        stream, self.rfile = self.rfile, io.BytesIO(b"".join(lines[1:]) + b"\r\n")
        try:
            self.parse_request()
        finally:
            self.rfile = stream
        if not self.request_version.startswith("HTTP/1."):
            self.request_version, self.close_connection = "HTTP/1.1", True
            raise _Refusal(505, "this server speaks HTTP/1.1.")

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1 or (not hosts and self.request_version != "HTTP/1.0"):
            raise _Refusal(400, "the request needs one Host header.")
        if self.server.loopback and hosts and not _is_local(hosts[0]):
            # A foreign name that leads to 127.0.0.1 is how a web page reaches into this machine.
            raise _Refusal(
                421, "this server answers to localhost; a proxy before it must set that Host."
            )

    def _length(self) -> int:
        """Bytes of the body. Whatever is unclear about where a request ends, ends the connection."""
        if "Transfer-Encoding" in self.headers:
            raise _Refusal(411, "a body needs Content-Length; chunked bodies are not read.")
        found = self.headers.get_all("Content-Length", [])
        if not found:
            if self.command == "POST":
                raise _Refusal(411, "a body needs Content-Length.")
            return 0
        if len(found) > 1 or not re.fullmatch(r"[0-9]+", found[0]):
            raise _Refusal(400, "Content-Length is not one whole number.")
        if len(found[0]) > 15:
            raise _Refusal(413, "the body is too large.")
        return int(found[0])

    def _body(self, most: int) -> bytes:
        if self._left > most:
            raise _Refusal(413, f"the body has {self._left} bytes, at most {most} are taken.")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(self._left)
        if len(body) < self._left:
            raise _Refusal(400, f"the body ended after {len(body)} of {self._left} bytes.")
        self._left = 0
        self.server.works(self.connection)
        return body

    def handle_expect_100(self) -> bool:
        return True  # said in _body, once the request has passed every check

    # -- who may

    def _own_site(self) -> bool | None:
        """Was this sent by our own page (True), by another site's (False), or by no browser (None)?"""
        site = self.headers.get("Sec-Fetch-Site")
        if site is not None:
            return site == "same-origin"
        origin = self.headers.get("Origin")
        if origin is None:
            return None
        return origin.partition("://")[2] == self.headers.get("Host")

    def _refuse_other_sites(self) -> None:
        if self._own_site() is False:
            raise _Refusal(403, "refused: the request comes from another site.")

    def _holds_cookie(self) -> bool:
        expected = self.server.settings.cookie
        if expected is None:
            return False
        for part in ";".join(self.headers.get_all("Cookie", [])).split(";"):
            name, _, value = part.strip().partition("=")
            if name == COOKIE and hmac.compare_digest(_bytes(value), expected):
                return True
        return False

    def _holds_token(self) -> bool:
        expected = self.server.settings.token
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        if expected is None or kind.lower() != "bearer":
            return False
        return hmac.compare_digest(_bytes(value.strip()), expected)

    # -- the answers

    def _healthz(self) -> None:
        alive = bool(self.server.settings.control.alive())
        if not alive:
            raise _Refusal(503, "no frame was looked at for 30 seconds: the loop hangs.")
        self._json(200, {"alive": True})

    def _readyz(self) -> None:
        ready, sentence = self.server.settings.control.ready()
        if not ready:
            raise _Refusal(503, sentence)
        self._json(200, {"ready": True, "sentence": sentence})

    def _metrics(self) -> None:
        if self.server.settings.metrics is None:
            raise _Refusal(404, "metrics are off: pip install 'edgesolve[metrics]'.")
        body, kind = self.server.settings.metrics()
        self._send(200, body, kind)

    def _status(self) -> None:
        self._json(200, self.server.settings.control.status())

    def _page(self) -> None:
        from edgesolve.device import page

        message = self.server.remembered(parse_qs(self.query).get("said", [""])[0])
        may = self._holds_cookie() or self._holds_token()
        html = page.render(self.server.settings.control.status(), may_command=may, message=message)
        digest = base64.b64encode(hashlib.sha256(page.STYLE.encode()).digest()).decode()
        policy = f"{_POLICY}; form-action 'self'; img-src data:; style-src 'sha256-{digest}'"
        self._send(200, html.encode("utf-8", "replace"), "text/html; charset=utf-8", policy=policy)

    def _login(self) -> None:
        expected = self.server.settings.token
        if expected is None:
            raise _Refusal(403, _OFF)
        given = parse_qs(self.query).get("token", [""])[0]
        if not hmac.compare_digest(_bytes(given), expected):
            raise _Refusal(403, "this is not the token.")
        value = self.server.settings.cookie.decode()
        cookie = f"{COOKIE}={value}; Path=/; HttpOnly; SameSite=Strict"
        self._send(303, b"", "text/plain", ("Location", "/"), ("Set-Cookie", cookie))

    def _predict(self) -> None:
        contract = self.server.settings.contract
        if contract is None:
            raise _Refusal(404, "predictions over HTTP are off.")
        self._refuse_other_sites()
        body = self._body(self.server.settings.max_bytes)
        if not body:
            raise _Refusal(422, "the body is empty; expected the bytes of an image or an .npy.")
        frame = upload.frame(body, contract)
        self._json(200, self.server.settings.control.predict(frame))

    def _command(self) -> None:
        from edgesolve.device import page

        if self.server.settings.token is None:
            raise _Refusal(403, _OFF)
        self._refuse_other_sites()
        by_token = self._holds_token()
        # A browser adds the cookie by itself, so a cookie counts only with proof that our page asks.
        if not by_token and not (self._holds_cookie() and self._own_site()):
            raise _Refusal(
                401,
                "a command needs the token: Authorization: Bearer …, or open /login?token=… first.",
                ("WWW-Authenticate", "Bearer"),
            )
        name, about = self._asked()
        if about is not None and about != page.proposal_id(self.server.settings.control.status()):
            result = {"ok": False, "sentence": "The proposal has changed meanwhile; look again."}
        else:
            result = self.server.settings.control.command(name, "http")
        if by_token:
            self._json(200, result)
            return
        number = self.server.remember(str(result.get("sentence", "")))
        self._send(303, b"", "text/plain", ("Location", f"/?said={number}"))

    def _asked(self) -> tuple[str, str | None]:
        """(command, the proposal it is about if it says so)."""
        body = self._body(COMMAND_BYTES)
        kind = self.headers.get_content_type()
        try:
            if kind == "application/json":
                found = json.loads(body)
            elif kind == "application/x-www-form-urlencoded":
                found = {key: values[0] for key, values in parse_qs(body.decode("ascii")).items()}
            else:
                raise _Refusal(415, 'expected Content-Type: application/json, {"command": …}.')
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise _Refusal(400, 'the body is not {"command": …}.')
        if found.get("command") not in COMMANDS:
            raise _Refusal(400, f"no such command; there are {', '.join(COMMANDS)}.")
        about = found.get("about")
        return found["command"], None if about is None else str(about)

    # -- writing

    def _json(self, status: int, value: Any, *headers: tuple[str, str]) -> None:
        self._send(status, to_json(value), "application/json", *headers)

    def _refuse(self, refusal: _Refusal) -> None:
        if self._left:
            self.close_connection = True
        self._linger = self.close_connection
        try:
            self._json(refusal.status, {"error": refusal.sentence}, *refusal.headers)
        except Gone:
            self.close_connection = True

    def _send(
        self,
        status: int,
        body: bytes,
        kind: str,
        *headers: tuple[str, str],
        policy: str = _POLICY,
    ) -> None:
        self.server.works(self.connection)
        if self._left:  # a body that nobody asked for
            self.close_connection = self._linger = True
        self.send_response(status)
        ours = (("Content-Type", kind), ("Content-Length", str(len(body))))
        for name, value in (*ours, ("Content-Security-Policy", policy), *_SECURITY, *headers):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            self.send_header("Connection", "keep-alive")
        self._headers_buffer.append(b"\r\n")
        head, self._headers_buffer = b"".join(self._headers_buffer), []
        self._write(head if self.command == "HEAD" else head + body)

    def _write(self, data: bytes) -> None:
        try:
            self.connection.settimeout(self.server.settings.timeout_s)
            self.connection.sendall(data)
        except OSError:
            raise Gone from None

    def send_error(self, code, message=None, explain=None) -> None:
        """What the standard library finds wrong with a request, said in our form."""
        status = HTTPStatus(code)
        raise _Refusal(int(status), f"{(status.description or status.phrase).rstrip('.')}.")

    def version_string(self) -> str:
        return "edgesolve"

    def log_request(self, code="-", size="-") -> None:
        if self.server.settings.say is not None:
            path = self.requestline.partition("?")[0]  # a query may hold the token
            self.server.settings.say(f"{self.client_address[0]} {path!r} {int(code)}")

    def log_message(self, format, *args) -> None:
        pass


def to_json(value: Any) -> bytes:
    """UTF-8 JSON; NumPy's numbers as numbers, NaN and infinities as null."""
    from edgesolve.device.generation import plain

    try:
        text = json.dumps(value, default=plain, allow_nan=False)
    except ValueError:
        value = json.loads(json.dumps(value, default=plain))
        text = json.dumps(_finite(value), allow_nan=False)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _is_local(host: str) -> bool:
    """A Host header that names this machine by "localhost" or by any address."""
    name = re.sub(r":\d*$", "", host.strip().lower())
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
