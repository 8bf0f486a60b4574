"""Broken and hostile requests against a live web server of `edgesolve serve`: what must never happen is counted.

    python benchmarks/fuzz_http.py --cases 30000

The server runs in a process of its own, in an empty temporary folder, with a Control that only counts. An audit hook
there sees every file that is written, every process and every outgoing connection. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from figures import aligned

TOKEN = "the-token-of-the-fuzzed-device"
SHAPE = (8, 6, 3)
MAX_BYTES = 20_000
TIMEOUT_S = 2.0
HANG_S = 8.0
THREADS = 4
COMMANDS = ("recalibrate", "approve", "reject", "rollback", "freeze", "unfreeze")
PATHS = ("/", "/healthz", "/readyz", "/metrics", "/status.json", "/login", "/predict", "/command")
METHODS = (
    "GET",
    "POST",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "TRACE",
    "CONNECT",
    "get",
    "",
)
EVIL_PATHS = (
    *("/../../etc/passwd", "/%2e%2e%2f%2e%2e%2fetc/passwd", "//", "///etc/passwd", "/.", "/..;/"),
    *(
        "*",
        "http://evil.example/",
        "http://[",
        "/login?token=%0d%0aX:y",
        "/?said=-1",
        "/\x00",
        "/ ",
    ),
    *(
        "/status.json\r\nX: y",
        "/%",
        "/%zz",
        "\\\\host\\share",
        "/" + "a" * 20_000,
        "/?" + "&=" * 3000,
    ),
    *("/login?token=" + "a" * 5000, "/?said=" + "9" * 5000, "/ü", "/command/", "/predict?x=1;y=2"),
)
EVIL_NUMBERS = (
    *(
        "-1",
        "0",
        "1",
        "99999999",
        "9" * 30,
        "9" * 5000,
        "1e9",
        "0x10",
        "1_0",
        "+1",
        " 7",
        "7 ",
        "²",
        "NaN",
    ),
    *("", "1,1", "18446744073709551616", "4294967296", "00000000003"),
)
EVIL_HEADERS = (
    *("Transfer-Encoding: chunked", "Transfer-Encoding: identity", "Transfer-Encoding : chunked"),
    *("Expect: 100-continue", "Connection: close", "Connection: keep-alive", "Upgrade: websocket"),
    *("Host: evil.example", "Host:", "Host: a\r\nHost: b", " folded: yes", "no colon", ": empty"),
    *(
        "Cookie: edgesolve=" + "0" * 64,
        "Cookie: ;;;=;",
        "Origin: null",
        "Origin: https://evil.example",
    ),
    *("Sec-Fetch-Site: cross-site", "Authorization: Bearer", "Authorization: Bearer wrong"),
    *(
        "Authorization: Basic eDp5",
        "X: " + "a" * 9000,
        "X: " + "a" * 20_000,
        "X: a\rY: b",
        "X: \x00",
    ),
    *("X: \xff\xfe", "Content-Type: multipart/form-data; boundary=x", "Content-Encoding: gzip"),
    *("Range: bytes=0-", "Content-Length: 5\r\nContent-Length: 6", "Keep-Alive: timeout=1e9"),
)
_ANSWER = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]*\r\n")


# -- the server's process


def serve() -> None:
    """Run until stdin ends; then tell what was seen."""
    from edgesolve.device import http as web
    from edgesolve.device.bundle import Contract

    escaped: list[str] = []
    control = _Counting()
    contract = Contract(SHAPE, np.dtype(np.uint8))
    metrics = _metrics
    server = web.serve(
        "127.0.0.1:0",
        control,
        token=TOKEN,
        metrics=metrics,
        contract=contract,
        max_bytes=MAX_BYTES,
        timeout_s=TIMEOUT_S,
    )
    print(server.url, flush=True)
    sys.addaudithook(_watch(escaped))
    sys.stdin.read()
    from edgesolve.device import board

    seen = {
        "commands": control.commands,
        "frames": control.frames,
        "escaped": escaped[:20],
        "n_escaped": len(escaped),
        "inside": len(list(Path.cwd().rglob("*"))),
        "defects": len(server._listener.defects),
        "threads": threading.active_count(),
        "peak_rss_mib": board.peak_rss_mib(),
    }
    server.close()
    print(json.dumps(seen), flush=True)


class _Counting:
    commands = frames = 0

    def status(self):
        return {"schema": 1, "device": "fuzzed", "generation": 0, "ready": True}

    def alive(self):
        return True

    def ready(self):
        return True, "generation 0 answers."

    def command(self, name, source):
        self.commands += 1
        return {"ok": True, "decision": "kept", "reason": "no_drift", "sentence": "Nothing to do."}

    def predict(self, frame):
        if frame.shape != SHAPE or frame.dtype != np.uint8:
            raise TypeError("a frame outside the contract came through")
        self.frames += 1
        return {"top1": 0, "class": "a", "score": 1.0, "generation": 0}


def _metrics():
    return b"edgesolve_inferences_total 1\n", "text/plain; version=0.0.4"


def _watch(escaped: list[str]):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    events = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.exec")
    events += ("os.system", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
    events += ("os.truncate", "os.chmod", "os.utime", "shutil.rmtree", "pickle.find_class")

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & writes:
            escaped.append(f"open {arguments[0]!r}")
        elif event in events:
            escaped.append(f"{event} {arguments!r}")

    return hook


# -- the cases


def case(seed: int) -> tuple[str, bytes]:
    """(kind, the bytes to send) of case `seed`."""
    rng = random.Random(seed)
    roll = rng.random()
    if roll < 0.15:
        return "valid", _join(*_template(rng))
    if roll < 0.22:
        return "random bytes", rng.randbytes(rng.choice((0, 1, 7, 100, 3000)))
    if roll < 0.30:
        data = _join(*_template(rng))
        return "cut", data[: rng.randrange(len(data))]
    if roll < 0.40:
        return "flipped bytes", _flipped(rng, _join(*_template(rng)))
    if roll < 0.55:
        line, headers, body = _template(rng, "/predict")
        body = _damaged(rng, body)
        headers["Content-Length"] = str(len(body))
        return "damaged body", _join(line, headers, body)
    parts = list(_template(rng))
    for _ in range(rng.randint(1, 3)):
        rng.choice((_bad_line, _bad_length, _bad_header, _bad_ends))(rng, parts)
    data = _join(*parts)
    return "mutated", data if rng.random() < 0.8 else data + _join(*_template(rng))


def _template(rng: random.Random, path: str | None = None):
    path = path or rng.choice(PATHS)
    headers = {"Host": "localhost"}
    body, method = b"", "GET"
    if path == "/predict":
        method, body = "POST", _frame(rng)
    elif path == "/command":
        method, body = "POST", json.dumps({"command": rng.choice(COMMANDS)}).encode()
        headers["Content-Type"] = "application/json"
        if rng.random() < 0.3:
            headers["Authorization"] = f"Bearer {TOKEN}"
    elif path == "/login":
        path += f"?token={TOKEN if rng.random() < 0.2 else 'wrong'}"
    if method == "POST":
        headers["Content-Length"] = str(len(body))
    return f"{method} {path} HTTP/1.1", headers, body


def _join(line: str, headers: dict[str, str], body: bytes, end: str = "\r\n") -> bytes:
    lines = [line, *(k if v is None else f"{k}: {v}" for k, v in headers.items())]
    return (end.join(lines) + end + end).encode("utf-8", "surrogateescape") + body


def _frame(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        out = io.BytesIO()
        np.save(out, np.frombuffer(rng.randbytes(144), np.uint8).reshape(SHAPE))
        return out.getvalue()
    return _png(rng.choice(((6, 8), (1, 1), (40, 30), (9000, 9000), (2**31 - 1, 1))), rng)


def _png(size: tuple[int, int], rng: random.Random) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    rows = b"".join(b"\0" + rng.randbytes(3 * min(size[0], 40)) for _ in range(min(size[1], 30)))
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 5, 30))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _damaged(rng: random.Random, body: bytes) -> bytes:
    how = rng.randrange(5)
    if how == 0:
        return _flipped(rng, body)
    if how == 1:
        return body[: rng.randrange(len(body))]
    if how == 2:
        at = rng.randrange(len(body))
        return body[:at] + rng.randbytes(rng.choice((1, 50, 5000))) + body[at:]
    if how == 3:  # the array's header is what NumPy evaluates
        number = rng.choice(EVIL_NUMBERS).encode()
        return body.replace(b"(8, 6, 3)", b"(8, " + number[:40] + b", 3)")
    magic = (
        b"\x93NUMPY",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
        b"\xff\xd8\xff",
        b"BM",
        b"P6 ",
    )
    return rng.choice(magic) + rng.randbytes(rng.choice((0, 4, 60, 900)))


def _bad_line(rng, parts) -> None:
    method, path, version = [*parts[0].split(" ", 2), "", ""][:3]
    how = rng.randrange(3)
    if how == 0:
        method = rng.choice((*METHODS, "A" * 50, "G\x00T"))
    elif how == 1:
        path = rng.choice(EVIL_PATHS)
    else:
        version = rng.choice(
            ("HTTP/0.9", "HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "HTTP/9.9", "HTTP/1", "", "X")
        )
    parts[0] = f"{method} {path} {version}"


def _bad_length(rng, parts) -> None:
    parts[1]["Content-Length"] = rng.choice(EVIL_NUMBERS)


def _bad_header(rng, parts) -> None:
    for _ in range(rng.choice((1, 1, 2, 150))):
        parts[1][rng.choice(EVIL_HEADERS)] = None
    if rng.random() < 0.1:
        parts[1].pop("Host", None)


def _bad_ends(rng, parts) -> None:
    if len(parts) == 3:
        parts.append(rng.choice(("\n", "\r", "\r\r\n", "\n\r")))


# -- sending them


class Client:
    """Sends cases, and looks at every byte that comes back."""

    def __init__(self, address: tuple[str, int]):
        self.address = address
        self.kept: socket.socket | None = None
        self.found: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.examples: list[str] = []

    def send(self, seed: int) -> None:
        kind, data = case(seed)
        self.found[kind] += 1
        self.found["with token"] += TOKEN.encode() in data
        try:
            answer = self._kept(data) if kind == "valid" else self._fresh(data)
        except TimeoutError:
            self._wrong("hang", seed)
            return
        except OSError as error:
            self._wrong(f"no connection ({type(error).__name__})", seed)
            return
        statuses = _statuses(answer, data)
        if statuses is None:
            self._wrong("not HTTP", seed)
        elif not statuses and data.strip(b"\r\n"):
            self._wrong("no answer", seed)
        else:
            self.statuses.update(map(str, statuses))
            if 500 in statuses:
                self._wrong("defect (500)", seed)
            if kind in ("valid", "damaged body") and len(statuses) != 1:
                self._wrong("more than one answer", seed)
            if kind == "valid" and statuses[0] not in (200, 303, 401, 403, 413, 422):
                self._wrong("valid request refused", seed)

    def _fresh(self, data: bytes) -> bytes:
        with socket.create_connection(self.address, timeout=HANG_S) as client:
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all was sent: the answer lies here already
            return _all(client, until=time.monotonic() + HANG_S)

    def _kept(self, data: bytes) -> bytes:
        for attempt in range(2):
            fresh = self.kept is None
            if fresh:
                self.kept = socket.create_connection(self.address, timeout=HANG_S)
            try:
                self.kept.sendall(data)
                answer = _one(self.kept, head_only=data.startswith(b"HEAD"))
            except (BrokenPipeError, ConnectionResetError):
                answer = b""
            if not answer or b"\r\nConnection: close" in answer:
                self.kept.close()
                self.kept = None
            if answer or fresh or attempt:  # a kept connection may have ended while it was idle
                return answer
        raise AssertionError("unreachable")

    def _wrong(self, what: str, seed: int) -> None:
        self.found[f"! {what}"] += 1
        if len(self.examples) < 20:
            self.examples.append(f"{what}: case {seed}, {case(seed)[1][:100]!r}")


def _all(client: socket.socket, until: float) -> bytes:
    data = b""
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        client.settimeout(left)
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            return data
        if not part:
            return data
        data += part


def _one(client: socket.socket, head_only: bool) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(65536)
        if not part:
            return data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"\r\nContent-Length: (\d+)", head)[1])
    while len(body) < length and not head_only:
        part = client.recv(65536)
        if not part:
            break
        body += part
    return head + b"\r\n\r\n" + body


def _statuses(answer: bytes, request: bytes) -> list[int] | None:
    """The statuses of all answers in these bytes; None if they are anything but whole HTTP answers."""
    found = []
    while answer:
        match = _ANSWER.match(answer)
        head, blank, rest = answer.partition(b"\r\n\r\n")
        if not match or not blank:
            return None
        status = int(match[1])
        if status == 100:
            answer = rest
            continue
        length = re.search(rb"\r\nContent-Length: (\d+)", head)
        if not length or b"\r\nServer: edgesolve\r\n" not in head:
            return None
        if b"HEAD" in request and (not rest or rest.startswith(b"HTTP/1.1 ")):
            answer = rest  # the length is that of the body which a GET would have got
        else:
            body, answer = rest[: int(length[1])], rest[int(length[1]) :]
            if len(body) < int(length[1]) or (status >= 400 and not _is_error(body)):
                return None
        found.append(status)
    return found


def _is_error(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return False


def fuzz(n: int, seed: int, seconds: float) -> dict:
    """Run up to `n` cases for at most `seconds`; returns what was found."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            text=True,
        ) as process,
    ):
        host, port = process.stdout.readline().strip().removeprefix("http://").split(":")
        clients = [Client((host, int(port))) for _ in range(THREADS)]
        began = time.monotonic()
        last = began + seconds

        def work(first: int) -> None:
            for number in range(first, n, THREADS):
                if time.monotonic() > last or process.poll() is not None:
                    return
                clients[first].send(seed * 1_000_003 + number)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        crashed = process.poll() is not None
        after = b"" if crashed else clients[0]._fresh(b"GET /healthz HTTP/1.0\r\n\r\n")
        for client in clients:
            if client.kept is not None:
                client.kept.close()
        out, err = process.communicate(timeout=30)
    found = sum((client.found for client in clients), Counter())
    return {
        "seed": seed,
        "cases": sum(v for k, v in found.items() if not k.startswith("!") and k != "with token"),
        "seconds": took,
        "kinds": {k: v for k, v in sorted(found.items()) if not k.startswith("!")},
        "wrong": {k[2:]: v for k, v in sorted(found.items()) if k.startswith("!")},
        "statuses": dict(sorted(sum((c.statuses for c in clients), Counter()).items())),
        "examples": [line for client in clients for line in client.examples],
        "crashed": crashed,
        "healthy_after": after.startswith(b"HTTP/1.1 200"),
        "server": json.loads(out.splitlines()[-1]) if out.strip() else None,
        "stderr": err[-2000:],
    }


def table(result: dict) -> str:
    server, wrong = result["server"] or {}, result["wrong"]
    rate = result["cases"] / result["seconds"]
    rows = [
        ("cases", f"{result['cases']:,} in {result['seconds']:.0f} s ({rate:.0f}/s)"),
        *((f"  {kind}", f"{n:,}") for kind, n in result["kinds"].items()),
        ("answers", ", ".join(f"{k}: {v:,}" for k, v in result["statuses"].items())),
        ("server crashed", str(result["crashed"])),
        ("healthy afterwards", str(result["healthy_after"])),
        ("hangs", str(wrong.get("hang", 0))),
        ("answers that aren't HTTP", str(wrong.get("not HTTP", 0))),
        (
            "other wrong answers",
            str({k: v for k, v in wrong.items() if k not in ("hang", "not HTTP")} or 0),
        ),
        ("defects (tracebacks)", str(server.get("defects"))),
        ("files written, processes, connections", str(server.get("n_escaped"))),
        ("files in its folder", str(server.get("inside"))),
        (
            "commands carried out",
            f"{server.get('commands')} of {result['kinds']['with token']} with token",
        ),
        ("frames looked at", str(server.get("frames"))),
        (
            "threads at the end, peak memory",
            f"{server.get('threads')}, {server.get('peak_rss_mib', 0):.0f} MiB",
        ),
    ]
    return aligned([["what", "measured"], *map(list, rows)])


def is_clean(result: dict) -> bool:
    """Whether nothing happened that must not."""
    server = result["server"]
    return bool(
        server
        and result["healthy_after"]
        and not (result["crashed"] or result["wrong"] or result["stderr"])
        and not (server["defects"] or server["n_escaped"] or server["inside"])
        and server["commands"] <= result["kinds"]["with token"]
    )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--cases", type=int, default=30_000, metavar="N")
    p.add_argument("--seconds", type=float, default=600.0, help="stop after this long (600)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--quick", action="store_true", help="2000 cases")
    p.add_argument("--json", action="store_true", help="machine-readable result")
    p.add_argument("--out", type=Path, help="write the result here as JSON")
    p.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        serve()
        return 0
    result = fuzz(2000 if args.quick else args.cases, args.seed, args.seconds)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1) if args.json else table(result))
    for line in () if args.json else [*result["examples"], result["stderr"]]:
        print(line)
    return 0 if is_clean(result) else 1


if __name__ == "__main__":
    sys.exit(main())
