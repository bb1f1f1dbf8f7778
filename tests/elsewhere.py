"""A process in which dpn cannot be imported: what needs nothing but transformers is tried there.

It imports transformers once; every piece of code then runs in a fork of it, which knows of nothing that others did.
"""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

SERVER = """
import json, os, sys, traceback
sys.modules["dpn_cli"] = None
from transformers import (
    AutoModel, AutoModelForImageTextToText, AutoProcessor, dynamic_module_utils, masking_utils, pipeline,
)
from transformers.models.llava import modeling_llava, processing_llava

def run(job):
    for name, number in ("stdout", 1), ("stderr", 2):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
    os.chdir(job["cwd"])
    dynamic_module_utils.HF_MODULES_CACHE = os.path.join(job["cwd"], "modules")
    sys.argv, code = ["-c", *job["arguments"]], 1
    try:
        exec(job["code"], {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    child = os.fork() or run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_elsewhere(code: str, *arguments: object, cwd: Path) -> str:
    """Run code with arguments in a folder; return its stdout."""
    output = {name: str(cwd / f"elsewhere.{name}") for name in ("stdout", "stderr")}
    for path in output.values():
        Path(path).unlink(missing_ok=True)
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    job = {"code": code, "arguments": list(map(str, arguments)), "cwd": str(cwd), **output}
    print(json.dumps(job), file=server.stdin, flush=True)
    exit_code = server.stdout.readline()
    assert exit_code == "0\n", Path(output["stderr"]).read_text()
    return Path(output["stdout"]).read_text()


@cache
def _server() -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)
    return server
