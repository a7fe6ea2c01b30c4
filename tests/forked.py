"""Commands of stages and of DVC that begin with their libraries imported: each is a fork of a process that has done nothing else.

A point of the pipeline is some twelve processes, and most of a small one's time goes to importing torch, transformers, lm-eval and dvc.
The programs of project.commands() are `python` and `dvc` whose processes of MODULES are such forks; whatever else they are asked for,
and where a variable differs that imports have read, they are the real ones. The code of stages is imported by each fork from where it
stands. Not for tests of imports, of processes by their parents, or of memory; and all forks hash strings alike, so that of two runs
whose bytes are compared one is to have a PYTHONHASHSEED of its own, which makes it a real one.
"""

import array
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

HEAD, ANSWER = struct.Struct("!I"), struct.Struct("!?i")  # of a request: its length; whether it was taken, and the status of its end
LOST = 70  # exit code where nobody says how a fork ended
DVC = "dvc"
READ_BY_IMPORTS = ("PYTHON", "OMP_", "MKL_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "LD_", "CUDA_")  # prefixes of variables
PATHS = "PYTHONPATH"  # which a fork obeys
HARMLESS = (PATHS, "HF_HUB_DISABLE_PROGRESS_BARS", "TORCH_NCCL_ASYNC_ERROR_HANDLING")  # a library sets them for DVC, torchrun's processes
MODULES = ("stages.", "tests.", "torch.distributed.run")  # beginnings of those that are forks
PRELOADED = (
    "torch",
    "transformers",
    "transformers.conversion_mapping",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.gemma3.modeling_gemma3",
    "tokenizers",
    "safetensors.torch",
    "gguf",
    "datasets",
    "mwparserfromhell",
    "lm_eval",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
    "hydra",
    "hydra._internal.core_plugins.basic_launcher",
    "hydra._internal.core_plugins.basic_sweeper",
    "hydra._internal.core_plugins.file_config_source",
    "hydra._internal.core_plugins.importlib_resources_config_source",
    "hydra._internal.core_plugins.structured_config_source",
    "omegaconf",
    "antlr4.LL1Analyzer",
    "httpx2",
    "huggingface_hub",
    "scipy.io",
    "scipy.stats",
    "pandas",
    "jinja2",
    "rich.text",
    "dvc.api",
    "dvc.cachemgr",
    "dvc.cli",
    "dvc.cli.parser",
    "dvc.data_cloud",
    "dvc.dvcfile",
    "dvc.repo",
    "dvc.repo.artifacts",
    "dvc.repo.brancher",
    "dvc.repo.datasets",
    "dvc.repo.experiments",
    "dvc.repo.experiments.push",
    "dvc.repo.experiments.queue.celery",
    "dvc.repo.experiments.queue.tempdir",
    "dvc.repo.experiments.remove",
    "dvc.repo.experiments.run",
    "dvc.repo.graph",
    "dvc.repo.index",
    "dvc.repo.open_repo",
    "dvc.repo.plots",
    "dvc.repo.reproduce",
    "dvc.repo.stage",
    "dvc.repo.trie",
    "dvc.repo.worktree",
    "dvc.stage.run",
    "dvc.utils.hydra",
    "dvc.utils.strictyaml",
    "dvc_data.fs",
    "dvc_data.hashfile.db.local",
    "dvc_data.hashfile.status",
    "dvc_data.index",
    "dvc_data.index.fetch",
    "dvc_data.index.push",
    "dvc_objects.fs.local",
    "dvc_task.app.filesystem",
    "celery.app.amqp",
    "celery.loaders.app",
    "celery.worker",
    "networkx",
    "dulwich.gc",
    "dulwich.porcelain",
    "dulwich.worktree",
    "fsspec.implementations.memory",
    "git",
    "pygit2",
    "scmrepo.git",
    "ruamel.yaml",
)


def command(address: str, real: str, module: str | None) -> None:
    """Be a command: ask for a fork and end as it ends, or run as ever.

    Args:
        address: of the server's socket. real: the program. module: what it runs; None: python, which is told by its arguments.
    """
    arguments = sys.argv[1:]
    if module is None and len(arguments) > 1 and arguments[0] == "-m" and arguments[1].startswith(MODULES):
        module, arguments = arguments[1], arguments[2:]
    with socket.socket(socket.AF_UNIX) as server:
        try:
            if module is None:
                raise ConnectionError
            server.connect(address)
        except OSError:
            os.execv(real, [real, *sys.argv[1:]])
        first = str(Path.cwd()) if module != DVC else str(Path(real).parent)  # of sys.path
        facts = {"module": module, "arguments": arguments, "first": first, "cwd": str(Path.cwd()), "environment": dict(os.environ)}
        request = json.dumps(facts).encode()
        answer = b""
        with contextlib.suppress(OSError):
            server.sendmsg([HEAD.pack(len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
            server.sendall(request)
            answer = _received(server, ANSWER.size)
    if len(answer) < ANSWER.size:
        print("the process of this command was lost", file=sys.stderr)
        os._exit(LOST)
    taken, status = ANSWER.unpack(answer)
    if not taken:
        os.execv(real, [real, *sys.argv[1:]])
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _received(connection: socket.socket, count: int) -> bytes:
    """Bytes, fewer where the other side is gone."""
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def serve(address: str) -> None:
    """Import the libraries, then fork for every command until the process that asked for the server has ended."""
    import importlib

    sys.path.pop(0)  # the directory of this file
    imported = read_by_imports(os.environ)
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")  # builds those of all models
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while select.select([listener, sys.stdin], [], [])[0] == [listener]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _supervise(connection, imported)
            connection.close()


def read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that a fork cannot have otherwise than the server had."""
    return {name: value for name, value in environment.items() if name.startswith(READ_BY_IMPORTS) and name not in HARMLESS}


def _supervise(connection: socket.socket, imported: dict[str, str]) -> None:
    """Fork once more, answer with how that ended, and end it where nobody waits any more; does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, ancillary, _, _ = connection.recvmsg(HEAD.size, socket.CMSG_LEN(3 * 4))
    descriptors = array.array("i")
    descriptors.frombytes(ancillary[0][2])
    (count,) = HEAD.unpack(head)
    text = _received(connection, count)
    if len(text) < count:
        os._exit(1)
    request = json.loads(text)
    if read_by_imports(request["environment"]) != imported:
        connection.sendall(ANSWER.pack(False, 0))
        os._exit(0)
    child = os.fork()
    if child == 0:
        connection.close()
        os.setpgid(0, 0)
        _become(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        ended = os.pidfd_open(child)
        if ended not in select.select([ended, connection], [], [])[0]:
            os.killpg(child, signal.SIGKILL)  # and what it has started: nobody waits any more
        _, status = os.waitpid(child, 0)
    except OSError:
        os.kill(child, signal.SIGKILL)
        raise
    with contextlib.suppress(OSError):  # it was killed
        connection.sendall(ANSWER.pack(True, status))
    os._exit(0)


def _become(request: dict, descriptors: "array.array[int]") -> None:
    """Run the module as a process of its own would; does not return."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.argv = [request["module"], *request["arguments"]]
    sys.path[:0] = [request["first"], *filter(None, os.environ.get(PATHS, "").split(os.pathsep))]
    code: object = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        code = 1
    import atexit

    try:
        import threading

        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve(sys.argv[1])
