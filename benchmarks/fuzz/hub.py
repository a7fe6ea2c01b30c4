"""Answers of a model hub: what huggingface_hub is told of a repository, and the files that it is sent."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from benchmarks.fuzz.mutations import Files, bytes_of, json_of
from benchmarks.fuzz.reader import Reader
from stages.sources import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = b'{"text": "river"}\n'
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIBLINGS = [
    {"rfilename": "config.json", "size": len(CONTENT), "blobId": "0" * 40},
    {
        "rfilename": "model.safetensors",
        "size": len(CONTENT),
        "blobId": "0" * 40,
        "lfs": {"sha256": SHA256, "size": 18, "pointerSize": 134},
    },
]
INFO = {
    "id": "org/tiny",
    "sha": COMMIT,
    "private": False,
    "gated": False,
    "siblings": SIBLINGS,
    "tags": [],
    "downloads": 0,
    "likes": 0,
    "cardData": {"license": "mit"},
}
HEAD = {"ETag": '"0123"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
VALUES = ("", "-1", "1", "99999999999", "abc", '"../../outside"', "../../outside", "\u00ff", "bytes 5-2/1", "x" * 3000)
NAMES = ("ETag", "X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size", "Content-Range", "Content-Encoding", "X-Error-Code", "X-Error-Message")
STATUSES = (200, 200, 200, 200, 200, 206, 301, 302, 401, 403, 404, 416)


@st.composite
def answers(draw: DrawFn) -> Files:
    """The body of the answer on a repository, that on a file, and the status and headers of the latter."""
    headers: dict[str, str] = {**HEAD}
    for _ in range(draw(st.integers(0, 2))):
        headers[draw(st.sampled_from(NAMES))] = draw(st.sampled_from(VALUES))
    status = draw(st.sampled_from(STATUSES))
    if status in (301, 302):
        headers["Location"] = draw(st.sampled_from(("/elsewhere", "http://127.0.0.1:{other}/elsewhere", "file:///etc/passwd", "", "//[")))
    described = draw(json_of(INFO)) if draw(st.integers(0, 2)) else json.dumps(INFO).encode()
    return {
        "info": described,
        "info-status": str(draw(st.sampled_from((200, 200, 200, 200, 200, 401, 403, 404)))).encode(),
        "content": draw(st.just(CONTENT) | bytes_of(CONTENT)),
        "head": json.dumps({"status": status, "headers": headers}).encode(),
    }


class _Server(ThreadingHTTPServer):
    """A hub that answers as the case says.

    files: of the case. other: a server elsewhere, to which it may redirect. authorized: addresses that were sent a token.
    """

    daemon_threads = True

    def __init__(self, other: "_Server | None" = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: Files = {}
        self.other = other
        self.authorized: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    server: _Server

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            self._send(int(self.server.files["info-status"]), {"Content-Type": "application/json"}, self.server.files["info"])
        else:
            self._answer(self.server.files.get("content", b""))

    def _answer(self, body: bytes) -> None:
        if "Authorization" in self.headers:
            self.server.authorized.append(self.path)
        if self.server.other is None or self.path == "/elsewhere":
            return self._send(200, HEAD, body)
        head = json.loads(self.server.files["head"])
        self._send(head["status"], head["headers"], body)
        return None

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        other = self.server.other.server_address[1] if self.server.other else 0
        for name, value in {"Content-Length": str(len(body) or len(CONTENT)), **headers}.items():
            self.send_header(name, value.replace("{other}", str(other)))
        self.end_headers()
        self.wfile.write(body)


_SERVERS: list[_Server] = []


@contextmanager
def two_hubs() -> Iterator[None]:
    """A hub and a server elsewhere, both on loopback; huggingface_hub asks the first."""
    other = _Server()
    server = _Server(other)
    _SERVERS[:] = [server, other]
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    constants = huggingface_hub.constants
    with (
        mock.patch.object(constants, "ENDPOINT", endpoint),
        mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
        mock.patch.dict(os.environ, {"HF_ENDPOINT": endpoint}),
    ):
        yield
    for each in _SERVERS:
        each.shutdown()
        each.server_close()


def read_answers(files: Files) -> None:
    server, other = _SERVERS
    server.files, other.files = files, files
    other.authorized.clear()
    repository = hub.resolve("org/tiny", "main", "model")
    names = [file["rfilename"] for file in SIBLINGS if file["rfilename"] in repository.sizes] or list(repository.sizes)
    try:
        hub.download(repository, names, repository.directory(Path("downloads")))
    finally:
        if other.authorized:
            raise RuntimeError("the token was sent to another server than the hub")


def inputs() -> SearchStrategy[Files]:
    return answers()


READERS = (
    Reader(
        name="answers of a hub",
        code="sources/hub.py",
        inputs=inputs(),
        read=read_answers,
        names=("hub model org/tiny",),
        memory=64,
        share=0.6,
        around=two_hubs,
    ),
)
