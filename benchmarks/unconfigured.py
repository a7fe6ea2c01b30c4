"""The environment of commands in a project made for the purpose: without what a user may have configured for git, dvc, hydra or AWS."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

IDENTITY = {f"GIT_{who}_{what}": "nobody@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
CONFIGURED = ("DVC_", "GIT_", "HYDRA_", "AWS_")  # prefixes of variables
EMPTY = tempfile.mkdtemp(prefix="unconfigured-")
atexit.register(shutil.rmtree, EMPTY, ignore_errors=True)
NO_CONFIGURATION = {f"DVC_{scope}_CONFIG_DIR": EMPTY for scope in ("GLOBAL", "SYSTEM")} | {
    f"GIT_CONFIG_{scope}": os.devnull for scope in ("GLOBAL", "SYSTEM")
}
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(CONFIGURED)},
    **IDENTITY,
    **NO_CONFIGURATION,
    "DVC_NO_ANALYTICS": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
