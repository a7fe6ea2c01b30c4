"""Servers on the loopback interface: OpenSSH's, and one that speaks S3; each ends with the block that it is for."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

HOST = "127.0.0.1"
SSHD = shutil.which("sshd", path=f"/usr/sbin{os.pathsep}{os.environ['PATH']}")
SSHD_CONFIGURATION = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
PidFile {directory}/pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


class Wire:
    """Passes on what goes between a server and its clients, until it breaks, and again once it is mended.

    port: where clients connect. limit: bytes from clients after which it breaks; None: it does not. passed: bytes from clients so far.
    """

    def __init__(self, server_port: int) -> None:
        self.server_port, self.passed, self.broken = server_port, 0, False
        self.limit: int | None = None
        self._connections: list[socket.socket] = []
        self._lock = threading.RLock()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def mend(self) -> None:
        """Pass everything on from now on."""
        self.limit, self.broken = None, False

    def break_(self) -> None:
        """End all connections, and refuse others."""
        with self._lock:
            self.broken = True
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

    def close(self) -> None:
        self.break_()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # once it is closed
            while True:
                client, _ = self._listener.accept()
                if self.broken:
                    client.close()
                    continue
                try:
                    server = socket.create_connection((HOST, self.server_port))
                except OSError:  # it has ended
                    client.close()
                    continue
                for connection in (client, server):  # else each small packet waits for the other side's acknowledgement, 40 ms
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._connections += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, sink), kwargs={"counts": source is client}, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, *, counts: bool) -> None:
        with source, contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                with self._lock:
                    self.passed += len(data) if counts else 0
                    if self.limit is not None and self.passed > self.limit:
                        self.break_()
                        return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@dataclass(frozen=True, kw_only=True)
class Server:
    """url: of a DVC remote on it. settings, secrets: of that remote, to be written to .dvc/config and to .dvc/config.local. wire: to it."""

    url: str
    settings: dict[str, str]
    secrets: dict[str, str]
    wire: Wire | None = None


@contextmanager
def ssh(directory: Path) -> Iterator[Server]:
    """OpenSSH with keys and a configuration of its own; the remote is directory/remote."""
    keys, port = directory / "ssh", _free_port()
    keys.mkdir()
    (directory / "remote").mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    (keys / "sshd").write_text(SSHD_CONFIGURATION.format(port=port, directory=keys))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where OpenSSH gives up its rights; Debian's service makes it
    with _running(port, str(SSHD), "-D", "-e", "-f", str(keys / "sshd")), contextlib.closing(Wire(port)) as wire:
        url = f"ssh://{getpass.getuser()}@{HOST}:{wire.port}{directory / 'remote'}"
        yield Server(url=url, settings={}, secrets={"keyfile": str(keys / "user")}, wire=wire)


@contextmanager
def s3() -> Iterator[Server]:
    """moto, which keeps everything in memory; the remote is in the bucket "team"."""
    port = _free_port()
    with _running(port, sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)), contextlib.closing(Wire(port)) as wire:
        endpoint = f"http://{HOST}:{wire.port}"
        with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/team", method="PUT")):
            pass
        keys = {"access_key_id": token_hex(), "secret_access_key": token_hex()}
        yield Server(url="s3://team/store", settings={"endpointurl": endpoint}, secrets=keys, wire=wire)


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextmanager
def _running(port: int, *command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, f"{process.args} exited with {process.returncode}"
        try:
            with socket.create_connection((HOST, port)):
                return
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError(f"{process.args} does not listen on port {port}")
