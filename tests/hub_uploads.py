"""What huggingface_hub asks of a hub to write to it: a repository, LFS objects in one part or several, and a commit."""

import base64
import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.processes import wait_for

LARGE = (".safetensors", ".bin", ".parquet", ".gz")
PART = 30_000  # bytes of a part of a large file; what is no larger is sent whole


def blob(content: bytes) -> str:
    """The hash by which git knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Uploads:
    """The writing half of the hub.

    token: the one that may write. quota: bytes of LFS objects that it grants. cut_after: objects that arrive before every connection
    is cut in the middle of the next; None: all do. is_cut: set then. go_on: the connection is cut no sooner than it is set.
    busy: path, or what paths begin with, up to a slash at its end -> how often it is refused by 429, with the headers `asks`, before it
    is answered.
    stored: LFS objects by SHA-256. begun: those that may arrive, while others are cut. received: names of what arrived, in order.
    parents: of each commit.
    """

    repositories: dict[str, Any]
    made: type
    token: str = "of the tests"
    quota: int | None = None
    cut_after: int | None = None
    is_cut: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    busy: Counter[str] = field(default_factory=Counter)
    asks: dict[str, str] = field(default_factory=lambda: {"Retry-After": "1"})
    stored: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)
    received: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)

    def post(self, request: BaseHTTPRequestHandler) -> None:
        path, body = unquote(urlsplit(request.path).path), _body(request)
        if self.refuses(request):
            return None
        if path.startswith("/lfs/"):
            return self._complete(request, path.split("/")[2], json.loads(body))
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return _answer(request, 401, {"error": "Invalid credentials in Authorization header"}, headers)
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                return self._create(request, json.loads(body))
            case ["api", "validate-yaml"]:
                return _answer(request, 200, {"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", "main"]:
                return self._preupload(request, f"{owner}/{name}", json.loads(body))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                return self._batch(request, f"{owner}/{name.removesuffix('.git')}", json.loads(body))
            case ["api", "models", owner, name, "commit", "main"]:
                return self._commit(request, f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
        return _answer(request, 404, {"error": f"no {path}"})

    def refuses(self, request: BaseHTTPRequestHandler) -> bool:
        """Whether a request was answered by 429."""
        path = unquote(urlsplit(request.path).path)
        busy = next((one for one in self.busy if self.busy[one] and (path == one or one.endswith("/") and path.startswith(one))), None)
        if busy is not None:
            self.busy[busy] -= 1
            _answer(request, 429, {"error": "slow down"}, self.asks)
        return busy is not None

    def put(self, request: BaseHTTPRequestHandler) -> None:
        """An LFS object, or a part of one; the URL is signed and needs no token."""
        _, _, oid, *number = unquote(urlsplit(request.path).path).split("/")
        if self._is_cut(oid):
            wait_for(lambda: self.cut_after is None or len(self.stored) >= self.cut_after)  # the client sends several at once
            request.rfile.read(1000)
            self.is_cut.set()
            self.go_on.wait(60)
            request.close_connection = True
            request.connection.close()
            return None
        content = _body(request)
        if number:
            self.parts[oid, int(number[0])] = content
        else:
            self._store(oid, content)
        return _answer(request, 200, {}, {"ETag": hashlib.md5(content).hexdigest()})

    def _is_cut(self, oid: str) -> bool:
        """Whether an object is one more than those that arrive."""
        with self.lock:
            if self.cut_after is None or oid in self.begun:
                return False
            if len(self.begun) >= self.cut_after:
                return True
            self.begun.add(oid)
            return False

    def _store(self, oid: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self.stored[oid] = content
        self.received.append(oid)

    def _complete(self, request: BaseHTTPRequestHandler, oid: str, said: dict[str, Any]) -> None:
        parts = [self.parts.pop((oid, part["partNumber"])) for part in said["parts"]]
        assert [hashlib.md5(part).hexdigest() for part in parts] == [part["etag"] for part in said["parts"]]
        self._store(oid, b"".join(parts))
        return _answer(request, 200, {})

    def _create(self, request: BaseHTTPRequestHandler, said: dict[str, Any]) -> None:
        name = f"{said['organization']}/{said['name']}"
        if name in self.repositories:
            return _answer(request, 409, {"error": "You already created this model repo"})
        self.repositories[name] = self.made(files={".gitattributes": b"*.safetensors filter=lfs\n"}, license=None)
        self.repositories[name].private = said.get("visibility") == "private"
        self.received.append(f"repository {name}")
        return _answer(request, 200, {"url": f"http://{request.headers['Host']}/{name}"})

    def _preupload(self, request: BaseHTTPRequestHandler, name: str, said: dict[str, Any]) -> None:
        there = self.repositories[name].files
        answers = []
        for file in said["files"]:
            large, content = file["path"].endswith(LARGE), there.get(file["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else blob(content)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _answer(request, 200, {"files": answers})

    def _batch(self, request: BaseHTTPRequestHandler, name: str, said: dict[str, Any]) -> None:
        wanted = sum(one["size"] for one in said["objects"] if one["oid"] not in self.stored)
        if self.quota is not None and wanted > self.quota:
            error = "Private repository storage limit reached"
            return _answer(request, 403, {"error": error}, {"X-Error-Message": error})
        return _answer(request, 200, {"transfer": "multipart", "objects": [self._object(request, **one) for one in said["objects"]]})

    def _object(self, request: BaseHTTPRequestHandler, oid: str, size: int) -> dict[str, Any]:
        """How an object is to be sent; nothing where it is stored already."""
        if oid in self.stored:
            return {"oid": oid, "size": size}
        href = f"http://{request.headers['Host']}/lfs/{oid}"
        action: dict[str, Any] = {"href": f"{href}?signature=secret"}
        if size > PART:
            numbers = range(1, -(-size // PART) + 1)
            action["header"] = {"chunk_size": str(PART)} | {f"{number:05}": f"{href}/{number}?signature=secret" for number in numbers}
        return {"oid": oid, "size": size, "actions": {"upload": action}}

    def _commit(self, request: BaseHTTPRequestHandler, name: str, lines: list[dict[str, Any]]) -> None:
        repository, header = self.repositories[name], lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.commit):
            return _answer(request, 412, {"error": "A commit has happened since"}, {"X-Error-Message": "A commit has happened since"})
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.stored[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        self.parents.append(repository.commit)
        commit = hashlib.sha1(json.dumps([repository.commit, lines]).encode()).hexdigest()
        repository.files, repository.commit = files, commit
        url = f"http://{request.headers['Host']}/{name}/commit/{commit}"
        return _answer(request, 200, {"commitUrl": url, "commitOid": commit})


def _body(request: BaseHTTPRequestHandler) -> bytes:
    """With a length, or in chunks."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    content = b""
    while size := int(request.rfile.readline(), 16):
        content += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return content


def _answer(request: BaseHTTPRequestHandler, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
    request.send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})  # type: ignore[attr-defined]
