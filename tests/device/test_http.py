"""The web server over real sockets: what it answers, what it refuses, and that nothing stops it."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from edgesolve.device import http as web
from edgesolve.device import listener
from edgesolve.device.bundle import Contract
from edgesolve.device.errors import BusyError, UsageError

TESTS = Path(__file__).resolve().parent
TOKEN = "a-token-of-this-device"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
CONTRACT = Contract((8, 6, 3), np.dtype(np.uint8))


@pytest.fixture(scope="session")
def fakes():
    """serving_fakes.py beside this file (tests are imported by path, not as a package)."""
    spec = spec_from_file_location("serving_fakes", TESTS / "serving_fakes.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def control(fakes):
    return fakes.FakeControl()


@pytest.fixture
def server(control):
    with start(control) as running:
        yield running


def start(control, **more):
    settings = dict(token=TOKEN, metrics=lambda: (b"edgesolve_x 1\n", "text/plain; version=0.0.4"))
    settings |= dict(contract=CONTRACT, max_bytes=200_000, timeout_s=2.0)
    return web.serve("127.0.0.1:0", control, **(settings | more))


def ask(server, method, path, body=None, headers=None):
    """(status, headers, body) over a fresh connection."""
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=10)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def connected(server):
    where = urlsplit(server.url)
    return socket.create_connection((where.hostname, where.port), timeout=10)


def raw(server, data, finish=True):
    """All that comes back for `data`, until the server closes."""
    with connected(server) as client:
        client.sendall(data)
        if finish:
            client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def error_of(answer):
    status, headers, body = answer
    assert headers["Content-Type"] == "application/json"
    sentence = json.loads(body)["error"]
    assert sentence and "\n" not in sentence
    return status, sentence


def png(width=6, height=8, colour=(200, 30, 10)):
    Image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def npy(array, **more):
    out = io.BytesIO()
    np.save(out, array, **more)
    return out.getvalue()


# -- reading


def test_health_and_readiness_follow_the_control(server, control):
    assert ask(server, "GET", "/healthz")[0] == 200
    assert json.loads(ask(server, "GET", "/readyz")[2])["sentence"] == "generation 0 answers."
    control.is_alive, control.is_ready = False, (False, "no frame for 40 s.")
    assert error_of(ask(server, "GET", "/healthz"))[0] == 503
    assert error_of(ask(server, "GET", "/readyz")) == (503, "no frame for 40 s.")


def test_status_metrics_and_page(server, control):
    control.found = control.found | {"score": np.float32(0.5), "gap": float("nan")}
    found = json.loads(ask(server, "GET", "/status.json?x=1")[2])
    assert (found["device"], found["score"], found["gap"]) == ("cam-17", 0.5, None)
    status, headers, body = ask(server, "GET", "/metrics")
    assert (status, body, headers["Content-Type"]) == (
        200,
        b"edgesolve_x 1\n",
        "text/plain; version=0.0.4",
    )
    status, headers, body = ask(server, "GET", "/")
    assert status == 200 and b"cam-17" in body and b"<button" not in body
    status, headers, body = ask(server, "HEAD", "/")
    assert status == 200 and body == b"" and int(headers["Content-Length"]) > 1000


def test_metrics_can_be_off(control):
    with start(control, metrics=None) as server:
        assert error_of(ask(server, "GET", "/metrics"))[0] == 404


def test_every_answer_carries_the_security_headers(server):
    for method, path in (
        ("GET", "/"),
        ("GET", "/nothing"),
        ("POST", "/command"),
        ("GET", "/login"),
    ):
        _, headers, _ = ask(server, method, path)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Server"] == "edgesolve"


def test_unknown_paths_and_methods(server):
    for path in (
        "/nothing",
        "/../etc/passwd",
        "/%2e%2e/etc/passwd",
        "/status.json/",
        "//etc/passwd",
    ):
        assert error_of(ask(server, "GET", path))[0] == 404
    for method, path, allow in (
        ("POST", "/", "GET, HEAD"),
        ("DELETE", "/status.json", "GET, HEAD"),
        ("GET", "/command", "POST"),
        ("OPTIONS", "/predict", "POST"),
    ):
        answer = ask(server, method, path, b"" if method == "POST" else None)
        assert error_of(answer)[0] == 405 and answer[1]["Allow"] == allow


# -- predictions


def test_predict_takes_an_image_or_an_array(server, control):
    answer = ask(server, "POST", "/predict", png())
    assert json.loads(answer[2]) == {"top1": 3, "class": "cat", "score": 0.93, "generation": 0}
    np.testing.assert_array_equal(control.frames[-1], np.full((8, 6, 3), (200, 30, 10)))
    assert ask(server, "POST", "/predict", png(64, 48))[0] == 200
    assert control.frames[-1].shape == (8, 6, 3)
    frame = np.arange(144, dtype=np.uint8).reshape(8, 6, 3)
    for array in (frame, np.asfortranarray(frame), frame[None]):
        assert ask(server, "POST", "/predict", npy(array))[0] == 200
        np.testing.assert_array_equal(control.frames[-1], frame)


def test_an_image_is_read_as_load_frames_reads_it(server, control, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    from edgesolve.device.frames import load_frames

    picture = np.random.default_rng(1).integers(0, 256, (37, 23, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert ask(server, "POST", "/predict", (tmp_path / "a.png").read_bytes())[0] == 200
    expected = load_frames(tmp_path / "a.png", size=(8, 6)).frames[0]
    np.testing.assert_array_equal(control.frames[-1], expected)


def test_what_is_no_frame_is_refused_in_one_sentence(server, control):
    good = npy(np.ones((8, 6, 3), np.uint8))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 6, 3), }".ljust(117) + b"\n"
    bodies = {
        "empty": b"",
        "text": b"not an image",
        "truncated png": png()[:-20],
        "black": npy(np.zeros((8, 6, 3), np.uint8)),
        "pickle": npy(np.array([{}, []], object), allow_pickle=True),
        "float": npy(np.ones((8, 6, 3))),
        "shape": npy(np.ones((9, 6, 3), np.uint8)),
        "two": npy(np.ones((2, 8, 6, 3), np.uint8)),
        "cut": good[:-1],
        "more": good + b"x",
        "negative": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header,
        "huge": good.replace(b"(8, 6, 3), }  ", b"(8, 6, 9**9)}"),
        "deep": good.replace(b"{'descr'", b"[[[[[[[["),
        "gif": b"GIF89a" + bytes(40),
    }
    for name, body in bodies.items():
        assert error_of(ask(server, "POST", "/predict", body))[0] == 422, name
    assert not control.frames
    assert ask(server, "POST", "/predict", good)[0] == 200


def bomb(width, height):
    """A valid PNG of a few kilobytes that promises width x height pixels."""

    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_an_image_bomb_is_refused_before_it_is_decoded(server, control, monkeypatch):
    pytest.importorskip("PIL.Image")
    from edgesolve.device import decode

    monkeypatch.setattr(decode, "image_array", lambda *a: pytest.fail("it was decoded"))
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
    webp += b"\xfe\x3f\x00" * 2
    for body in (bomb(5000, 5000), bomb(11000, 11000), bomb(60000, 60000), webp):
        status, sentence = error_of(ask(server, "POST", "/predict", body))
        assert status == 413 and "pixels" in sentence
    assert not control.frames


def test_bodies_are_bounded_and_need_a_length(server):
    status, sentence = error_of(ask(server, "POST", "/predict", bytes(200_001)))
    assert status == 413 and "200001" in sentence and "200000" in sentence
    assert error_of(ask(server, "POST", "/predict", bytes(3_000_000)))[0] == 413
    assert error_of(ask(server, "POST", "/command", bytes(5000), BEARER | JSON))[0] == 413
    chunks = iter([b"a", b"b"])
    assert error_of(ask(server, "POST", "/predict", chunks))[0] == 411
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    assert raw(server, head + b"\r\n").startswith(b"HTTP/1.1 411")
    for length, status in (
        (b"-1", b"400"),
        (b"1e3", b"400"),
        (b"+5", b"400"),
        (b"5, 5", b"400"),
        (b"\xc2\xb2", b"400"),
        (b"9" * 400, b"413"),
        (b"5\r\nContent-Length: 6", b"400"),
        (b"5\r\nTransfer-Encoding: chunked", b"411"),
    ):
        answer = raw(server, head + b"Content-Length: " + length + b"\r\n\r\nhello")
        assert answer.startswith(b"HTTP/1.1 " + status), length
        assert answer.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in answer


def test_a_body_that_ends_early(server, control):
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    answer = raw(server, head + b"abc")
    assert answer.startswith(b"HTTP/1.1 400") and b"3 of 1000 bytes" in answer
    assert not control.frames


def test_curl_waits_for_leave_to_send(server):
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: "
    body = npy(np.ones((8, 6, 3), np.uint8))
    with connected(server) as client:
        client.sendall(head + b"%d\r\nConnection: close\r\n\r\n" % len(body))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
    with connected(server) as client:
        client.sendall(head + b"99999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


# -- commands


def command(server, body=b'{"command": "rollback"}', headers=BEARER | JSON):
    return ask(server, "POST", "/command", body, headers)


def cookie(server):
    status, headers, _ = ask(server, "GET", f"/login?token={TOKEN}")
    assert (status, headers["Location"]) == (303, "/")
    value, *flags = headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(flags)
    assert TOKEN not in value
    return {"Cookie": f"other=1; {value}"}


def test_a_command_with_the_token(server, control):
    status, _, body = command(server)
    assert status == 200 and json.loads(body)["sentence"] == "rollback: nothing to do."
    assert command(server, b"command=freeze", BEARER | FORM)[0] == 200
    assert control.commands == [("rollback", "http"), ("freeze", "http")]


def test_without_the_right_token_nothing_is_commanded(server, control):
    wrong = (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer \xe9\xff"},
        {"Cookie": "edgesolve="},
        {"Cookie": f"edgesolve={TOKEN}"},
        {"Cookie": "edgesolve=\xe9"},
    )
    for headers in wrong:
        answer = command(server, headers=headers | JSON | {"Origin": server.url})
        assert error_of(answer)[0] == 401, headers
    for query in ("", "?token=", "?token=wrong", "?token=%ff", f"?x={TOKEN}"):
        answer = ask(server, "GET", f"/login{query}")
        assert error_of(answer)[0] == 403 and "Set-Cookie" not in answer[1]
    assert not control.commands


def test_without_a_token_commands_are_off(control):
    with start(control, token=None) as server:
        expected = (403, "commands are off: start with --token-file.")
        assert error_of(command(server)) == expected
        assert error_of(ask(server, "GET", "/login?token=None")) == expected
        assert error_of(command(server, headers=JSON | {"Cookie": "edgesolve=None"})) == expected
    assert not control.commands


def test_the_page_commands_by_its_cookie(server, control):
    held = cookie(server)
    assert b'value="recalibrate"' in ask(server, "GET", "/", headers=held)[2]
    answer = command(server, b"command=freeze", held | FORM | {"Origin": server.url})
    assert answer[0] == 303 and control.commands == [("freeze", "http")]
    assert b"freeze: nothing to do." in ask(server, "GET", answer[1]["Location"], headers=held)[2]
    assert b"nothing to do" not in ask(server, "GET", "/?said=99", headers=held)[2]
    same = {"Sec-Fetch-Site": "same-origin"}
    assert command(server, b"command=unfreeze", held | FORM | same)[0] == 303


def test_a_decision_is_about_the_proposal_that_was_seen(server, control, fakes):
    control.found = fakes.proposal()
    held = cookie(server) | FORM | {"Origin": server.url}
    html = ask(server, "GET", "/", headers=held)[2].decode()
    seen = re.search(r'name="about" value="([^"]+)"', html)[1]
    control.found = fakes.proposal()
    control.found["candidate"]["time"] += 60
    answer = command(server, f"about={seen}&command=approve".encode(), held)
    assert b"has changed meanwhile" in ask(server, "GET", answer[1]["Location"])[2]
    control.found = fakes.fresh()
    command(server, f"about={seen}&command=approve".encode(), held)
    assert not control.commands
    control.found = fakes.proposal()
    command(server, f"about={seen}&command=approve".encode(), held)
    assert control.commands == [("approve", "http")]


def test_another_site_commands_nothing(server, control):
    held = cookie(server)
    port = urlsplit(server.url).port
    for headers, status in (
        ({}, 401),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://127.0.0.1:{port + 1}"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": server.url}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ):
        answer = command(server, b"command=freeze", held | FORM | headers)
        assert error_of(answer)[0] == status, headers
    assert error_of(ask(server, "POST", "/predict", png(), {"Origin": "http://evil"}))[0] == 403
    assert not control.commands and not control.frames


def test_a_foreign_name_for_this_machine_is_refused(server):
    for host, status in (
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:9", 200),
        ("10.0.0.7", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
    ):
        assert ask(server, "GET", "/healthz", headers={"Host": host})[0] == status, host


def test_what_is_no_command(server, control):
    for body, headers, status in (
        (b'{"command": "factory-reset"}', JSON, 400),
        (b'{"command": ["freeze"]}', JSON, 400),
        (b'{"command": {}}', JSON, 400),
        (b"[]", JSON, 400),
        (b"null", JSON, 400),
        (b"{", JSON, 400),
        (b"[" * 4000, JSON, 400),
        (b"\xff", JSON, 400),
        (b"command=", FORM, 400),
        (b"\xff", FORM, 400),
        (b'{"command": "freeze"}', {"Content-Type": "text/plain"}, 415),
    ):
        assert error_of(command(server, body, BEARER | headers))[0] == status, body
    assert not control.commands


def test_errors_of_the_service_become_answers(server, control, capfd):
    control.fails = BusyError("another process recalibrates.")
    assert error_of(ask(server, "GET", "/status.json")) == (409, "another process recalibrates.")
    control.fails = KeyError("x")
    for _ in range(3):
        assert error_of(ask(server, "GET", "/status.json"))[0] == 500
        assert error_of(ask(server, "GET", "/"))[0] == 500
    control.fails = None
    assert ask(server, "GET", "/status.json")[0] == 200
    assert capfd.readouterr().err.count("KeyError: 'x'") == 1
    control.fails = OSError("the disk is gone")  # of the service, not of the connection
    assert error_of(ask(server, "GET", "/status.json"))[0] == 500


# -- whoever doesn't speak HTTP


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /healthz\r\n\r\n", 400),
        (b"GET /healthz HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"GET /healthz HTTP/0.9\r\nHost: localhost\r\n\r\n", 505),
        (b"GET /heal thz HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /%00\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\rY: b\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: local", 400),
        (b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 500 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_malformed_heads(server, head, status):
    answer = raw(server, head)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1


def test_nothing_of_the_request_enters_the_answers_head(server):
    path = "/login?token=x%0d%0aSet-Cookie:%20a=b"
    answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert b"Set-Cookie" not in answer
    evil = {"Origin": "x", "Cookie": "edgesolve=a%0d%0aX: y"}
    assert "X" not in command(server, headers=JSON | evil)[1]


def test_a_connection_is_kept_and_pipelining_works(server):
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(server, one * 3).count(b"HTTP/1.1 200 OK") == 3
    body = b'{"command": "freeze"}'
    post = f"POST /command HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    post += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    assert raw(server, (post.encode() + body) * 2 + one).count(b"HTTP/1.1 200 OK") == 3


def test_a_body_nobody_asked_for_is_never_read_as_a_request(server):
    inner = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(inner)
    answer = raw(server, head + inner)
    assert answer.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in answer


@pytest.mark.parametrize(
    "line", ["POST /predict", "POST /nothing", "POST http://[/", "POST /command", "PUT /predict"]
)
@pytest.mark.parametrize("host", ["localhost", "evil.example"])
def test_the_body_of_a_refused_request_is_never_read_as_another(control, line, host):
    inner = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = f"{line} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(inner)}\r\n\r\n"
    with start(control) as server:
        answer = raw(server, head.encode() + inner)
    assert answer.count(b"HTTP/1.1 ") == 1 and b"edgesolve_x" not in answer


def test_a_slow_client_is_ended_though_it_keeps_sending(control):
    with start(control, timeout_s=0.4) as server, connected(server) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: local")
        answer, began = b"", time.monotonic()
        client.settimeout(0.05)
        while time.monotonic() - began < 5 and not answer:
            try:
                client.sendall(b"h")
                answer = client.recv(4096)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began > 0.2


def test_a_silent_client_is_let_go(control):
    with start(control, timeout_s=0.2) as server, connected(server) as client:
        began = time.monotonic()
        data = b"".join(iter(lambda: client.recv(4096), b""))
        assert time.monotonic() - began < 5
        assert data == b"" or data.startswith(b"HTTP/1.1 408")


def test_idle_connections_make_room(control):
    """More browsers than threads keep their connections open; a health check still gets through."""
    with start(control, timeout_s=60.0) as server:
        idle = [connected(server) for _ in range(listener.CONNECTIONS)]
        try:
            for client in idle:
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
            assert ask(server, "GET", "/healthz")[0] == 200
        finally:
            for client in idle:
                client.close()


def test_slow_senders_make_room(control):
    with start(control, timeout_s=60.0) as server:
        slow = [connected(server) for _ in range(listener.CONNECTIONS + 4)]
        try:
            for client in slow:
                client.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx"
                )
            assert ask(server, "GET", "/healthz")[0] == 200
        finally:
            for client in slow:
                client.close()


def test_twenty_requests_at_once(server, control):
    body = npy(np.ones((8, 6, 3), np.uint8))
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda i: ask(server, "POST", "/predict", body)[0], range(60)))
    assert found == [200] * 60 and len(control.frames) == 60


def test_threads_are_bounded(server, control):
    most, gate = [], threading.Event()

    def slow(frame):
        most.append(sum(t.name == "http client" for t in threading.enumerate()))
        gate.wait(0.1)
        return {}

    control.predict = slow
    body = npy(np.ones((8, 6, 3), np.uint8))
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(lambda i: ask(server, "POST", "/predict", body)[0], range(20))) == {200}
    assert 1 < max(most) <= listener.CONNECTIONS


# -- addresses


def test_addresses(control):
    with web.serve(":0", control) as server:
        assert server.url.startswith("http://127.0.0.1:")
        taken = urlsplit(server.url).netloc
        with pytest.raises(UsageError, match=r"cannot listen here"):
            web.serve(taken, control)
    with web.serve(taken, control):
        pass
    for address in (
        "8080",
        "localhost",
        "a b:80",
        ":99999",
        "[::1]",
        "::1:80",
        ":٣",
        "http://x:80",
        "",
    ):
        with pytest.raises(UsageError) as caught:
            web.serve(address, control)
        assert "\n" not in str(caught.value)
    for token in ("", "two words", "line\n", "\xe9"):
        with pytest.raises(UsageError, match="token"):
            web.serve(":0", control, token=token)


def test_ipv6(control):
    try:
        server = web.serve("[::1]:0", control)
    except UsageError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        assert server.url.startswith("http://[::1]:")
        assert ask(server, "GET", "/healthz")[0] == 200


def test_close_ends_connections_and_threads(control):
    server = start(control, timeout_s=60.0)
    with connected(server) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        server.close()
        assert client.recv(4096) == b""
    assert not [t for t in threading.enumerate() if t.name.startswith("http")]


def test_requests_are_said_only_when_asked_and_without_their_query(control, capfd):
    said = []
    with start(control, say=said.append) as server:
        ask(server, "GET", f"/login?token={TOKEN}")
    assert len(said) == 1 and "/login" in said[0] and TOKEN not in said[0]
    with start(control) as server:
        ask(server, "GET", "/")
        raw(server, b"nonsense\r\n\r\n")
    assert capfd.readouterr() == ("", "")
