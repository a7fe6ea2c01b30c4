"""Servers on the loopback interface: OpenSSH's, and one that speaks S3; each ends with the block that it is for."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
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


@dataclass(frozen=True, kw_only=True)
class Server:
    """url: of a DVC remote on it. settings, secrets: of that remote, to be written to .dvc/config and to .dvc/config.local."""

    url: str
    settings: dict[str, str]
    secrets: dict[str, str]


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
    with _running(port, str(SSHD), "-D", "-e", "-f", str(keys / "sshd")):
        url = f"ssh://{getpass.getuser()}@{HOST}:{port}{directory / 'remote'}"
        yield Server(url=url, settings={}, secrets={"keyfile": str(keys / "user")})


@contextmanager
def s3() -> Iterator[Server]:
    """moto, which keeps everything in memory; the remote is in the bucket "team"."""
    port = _free_port()
    with _running(port, sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)):
        endpoint = f"http://{HOST}:{port}"
        with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/team", method="PUT")):
            pass
        keys = {"access_key_id": token_hex(), "secret_access_key": token_hex()}
        yield Server(url="s3://team/store", settings={"endpointurl": endpoint}, secrets=keys)


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
