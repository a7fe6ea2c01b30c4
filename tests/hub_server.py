"""A model hub on loopback: the endpoints that huggingface_hub asks, over files that a test puts there."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.hub_uploads import LARGE, Uploads, blob

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeRepository:
    """files: name -> bytes. break_after: bytes of a file sent before the connection is cut, or None.
    budget: bytes sent in all before every connection is cut, or None. commit: the newest one."""

    files: dict[str, bytes]
    gated: bool | str = False
    license: str | list[str] | None = "mit"
    wrong_hashes: bool = False
    break_after: int | None = None
    budget: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    private: bool = False
    commit: str = COMMIT


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, FakeRepository] = {}
        self.uploads = Uploads(self.repositories, FakeRepository)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait for the first to be acknowledged, 40 ms
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        if not self.server.uploads.refuses(self):
            self._answer(body=True)

    def do_POST(self) -> None:
        self.server.uploads.post(self)

    def do_PUT(self) -> None:
        self.server.uploads.put(self)

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api" and parts[4:5] == ["tree"]:
            self._tree("/".join(parts[1:4]).removeprefix("models/"), "/".join(parts[6:]), recursive="recursive=true" in self.path.lower())
        elif parts[0] == "api":
            self._info(parts[1], "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif parts[0] == "datasets":
            self._file("/".join(parts[:3]), "/".join(parts[5:]), body)
        else:
            self._file("/".join(parts[:2]), "/".join(parts[4:]), body)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _info(self, kind: str, name: str, revision: str) -> None:
        key = name if kind == "models" else f"{kind}/{name}"
        repository = self.server.repositories.get(key)
        if repository is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound", "Content-Type": "application/json"})
        is_commit = len(revision) == 40 and set(revision) <= set("0123456789abcdef")
        if revision not in ("main", "v1") and not is_commit:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "Content-Type": "application/json"})
        siblings = []
        for file, content in repository.files.items():
            entry: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": blob(content)}
            if file.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest() if not repository.wrong_hashes else "f" * 64
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        info = {
            "id": name,
            "sha": revision if is_commit else repository.commit,
            "private": repository.private,
            "gated": repository.gated,
            "siblings": siblings,
            "tags": [],
        }
        info |= {"downloads": 0, "likes": 0, "cardData": {"license": repository.license}}
        self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        return None

    def _tree(self, key: str, folder: str, recursive: bool) -> None:
        """The files of a folder, as `datasets` asks for them."""
        repository = self.server.repositories.get(key)
        prefix = folder and f"{folder}/"
        names = [name for name in repository.files if name.startswith(prefix)] if repository else []
        if repository is None or not names:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "Content-Type": "application/json"})
        rows: dict[str, dict[str, object]] = {}
        for name in names:
            first, _, rest = name.removeprefix(prefix).partition("/")
            if rest:
                rows[prefix + first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
            if recursive or not rest:
                rows[name] = {"type": "file", "path": name, "oid": blob(repository.files[name]), "size": len(repository.files[name])}
        self.send(200, json.dumps(list(rows.values())).encode(), {"Content-Type": "application/json"})
        return None

    def _file(self, key: str, name: str, body: bool) -> None:
        repository = self.server.repositories.get(key)
        if repository is None or name not in repository.files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content, wanted = repository.files[name], self.headers.get("Range")
        repository.requests.append((self.command, name, wanted))
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        status, sent = 200, content
        if wanted and body:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status, sent = 206, content[start:]
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        limit = min(limit for limit in (repository.budget, repository.break_after, len(sent)) if limit is not None)
        if body and limit < len(sent):
            self.send_response(status)
            for header, value in {"Content-Length": str(len(sent)), **headers}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(sent[:limit])
            self.wfile.flush()
            repository.budget = None if repository.budget is None else 0
            self.close_connection = True
            return None
        if body and repository.budget is not None:
            repository.budget -= len(sent)
        return self.send(status, sent, headers, body)
