"""A process that ends when the one that started it does, however that ends: no orphan goes on and writes results.

Run as `python -P -m dpn_cli.parallel.child PARENT MODULE ARGUMENTS…`.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module in such a child of this process.

    No code of the current folder is imported (-P).
    """
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), module, *arguments]


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends; what it has done is on disk, whole.

    Args:
        parent: the parent's process id; if that has ended already, so does this process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _run(parent: str, module: str, *arguments: str) -> None:
    end_with(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the module has its own way: no traceback
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run(*sys.argv[1:])
