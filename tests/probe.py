"""A command that says how it was started and ends as it is told; started by test_forked.

python -m tests.probe EXIT_CODE|words|error|kill|wait DIRECTORY
"""

import os
import signal
import subprocess
import sys
from pathlib import Path


def main(end: str, *directory: str) -> None:
    print(Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode())
    print(os.environ.get("SOME"), Path.cwd(), sys.path[0], __name__, flush=True)
    match end:
        case "words":
            sys.exit("the end")
        case "error":
            raise ValueError("the end")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wait":
            child = subprocess.Popen(["sleep", "600"])
            written = Path(*directory) / "written"
            written.write_text(f"{os.getpid()} {child.pid}")
            written.rename(written.with_name("pids"))
            child.wait()
        case _:
            sys.exit(int(end))


if __name__ == "__main__":
    main(*sys.argv[1:])
