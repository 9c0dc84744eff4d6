"""The HTTP under the loopback Hub: routes, a record of what was asked, and faults on demand."""

import json
import re
import socket
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from urllib.parse import parse_qs, unquote


@dataclass
class Request:
    """What was asked: the path without its query, the token, and the status of the answer (None if there was none)."""

    method: str
    path: str
    token: str | None
    status: int | None = None


@dataclass
class Call:
    """A request as the methods see that answer it."""

    method: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    token: str | None
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


class Answer:
    """Content, which is written as JSON unless it is bytes, with a status and headers."""

    def __init__(self, content: bytes | dict | list = b"", status: int = 200, headers: dict[str, str] | None = None):
        self.status, self.headers, self.content = status, headers or {}, content
        if not isinstance(content, bytes):
            self.content = json.dumps(content).encode()
            self.headers = {"Content-Type": "application/json"} | self.headers


class Refused(Exception):
    """An error as the Hub tells it: its client reads the code and the message from the headers."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **content):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self.answer = Answer({"error": message, **content}, status, headers)


def ranged(call: Call, content: bytes, headers: dict[str, str]) -> Answer:
    """The part of a file that was asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    if not asked:
        return Answer(content, headers=headers | {"Accept-Ranges": "bytes"})
    start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if start > end:
        raise Refused(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    return Answer(content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"})


def route(methods: str, path: str):
    """Answer requests with a method, to which `ID`, `REV` and `PATH` in the path are given as its last arguments."""
    for name, pattern in {"ID": r"([\w.-]+/[\w.-]+)", "REV": r"([^/]+)", "PATH": r"(.+)"}.items():
        path = path.replace(name, pattern)

    def mark(answer):
        answer.route = methods.split(), re.compile(path)
        return answer

    return mark


class LoopbackServer:
    """A server on a free port of 127.0.0.1, which answers one request at a time.

    Its `requests` are those so far, in the order of their arrival.
    """

    def __init__(self):
        self.requests: list[Request] = []
        self._faults: list[_Fault] = []
        self.lock = RLock()
        marked = [getattr(type(self), name) for name in dir(type(self))]
        self._routes = [(*answer.route, answer) for answer in marked if hasattr(answer, "route")]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.port = self._server.server_port

    def __enter__(self):
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fail(
        self,
        method: str,
        path_pattern: str,
        times: int | None = 1,
        status: int | None = None,
        drop: bool = False,
        after: int = 0,
    ):
        """Let requests fail, with a status or with a connection that breaks off.

        What a request with a body brings is lost, without effect; of any other, the answer breaks off half-way.
        The client tries most requests again, five times, after a drop and after 408, 429, 500, 502, 503 and 504;
        hf_xet, after any 5xx. Other statuses are final, 403 for instance.

        Args:
            method: "PUT", for instance.
            path_pattern: of `Request.path`, where `*` stands for anything: "/storage/*", "*/commit/*".
            times: how many requests; None for all from now on.
            after: how many requests of this kind go well before.
        """
        if (status is None) != drop:
            raise ValueError("a request fails with a status or with drop=True")
        self._faults.append(_Fault(method, path_pattern, times, status, after))

    def fault_of(self, request: Request) -> "_Fault | None":
        with self.lock:
            return next((fault for fault in self._faults if fault.strikes(request)), None)

    def answer(self, path: str, call: Call) -> Answer:
        """The answer to a request; its path is still encoded."""
        routes = (entry for entry in self._routes if call.method in entry[0])
        matches = ((answer, pattern.fullmatch(path)) for _, pattern, answer in routes)
        answer, match = next((pair for pair in matches if pair[1]), (None, None))
        if match is None:
            return Refused(404, f"The loopback Hub does not know {call.method} {path}").answer
        try:
            with self.lock:
                return answer(self, call, *(part and unquote(part) for part in match.groups()))
        except Refused as refused:
            return refused.answer
        except Exception as error:  # a mistake of the tests; 501, as the client tries again after 500
            return Refused(501, f"{call.method} {path}: {error!r}").answer


@dataclass
class _Fault:
    method: str
    path_pattern: str
    times: int | None
    status: int | None
    after: int

    def strikes(self, request: Request) -> bool:
        if request.method != self.method or not fnmatchcase(request.path, self.path_pattern) or self.times == 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times = None if self.times is None else self.times - 1
        return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which costs 40 ms per request
    owner: LoopbackServer

    def do_GET(self):
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        token = headers.get("authorization", "").removeprefix("Bearer ") or None
        request = Request(self.command, unquote(path), token)
        fault = self.owner.fault_of(request)
        self.owner.requests.append(request)
        size = int(headers.get("content-length", 0))
        call = Call(self.command, parse_qs(query, keep_blank_values=True), headers, token, self.rfile.read(size))
        if fault and fault.status is not None:
            answer = Refused(fault.status, "The test wants this request to fail").answer
        elif fault and call.body:
            answer = Answer()
        else:
            answer = self.owner.answer(path, call)
        if fault and fault.status is None:
            return self.break_off(answer)
        request.status = answer.status
        self.send(answer)
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def send(self, answer: Answer):
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def break_off(self, answer: Answer):
        if answer.content and self.command != "HEAD":
            self.send(answer)
            self.wfile.write(answer.content[: len(answer.content) // 2])
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_):
        pass
