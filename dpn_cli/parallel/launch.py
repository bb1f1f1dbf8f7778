"""One command line in several processes of this machine, as `accelerate launch` would start them, ending as one.

Ours rather than the launcher's: it ends with the exit code of the main process and without a traceback, and a signal
reaches that process first.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from dpn_cli.errors import DpnError
from dpn_cli.parallel import child

_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MPI_NUMBERS = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # what torchrun and `accelerate launch` always set
POLL_S = 0.1
GRACE_S = 20.0  # for the main process to say what went wrong elsewhere, or to tidy up


def place() -> tuple[int, int]:
    """Return this process's number and how many there are, as its launcher says; (0, 1) where there is none.

    `launch`, torchrun and `accelerate launch` tell every process its place among all and on its machine, and where
    they meet. Anything less, such as a RANK that a cluster sets or the variables of an mpirun, is not about dpn.
    """
    return _numbers()[:2]


def speaks() -> bool:
    """Say whether this process is the first of its machine, which says what it waits for."""
    return _numbers()[2] == 0


def _numbers() -> tuple[int, int, int]:
    """Return this process's number, how many there are, and its number on this machine."""
    alone = 0, 1, 0
    if not all(os.environ.get(name) for name in _MEETING):
        return alone
    accelerates = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    for names in (_NUMBERS, *(_MPI_NUMBERS if accelerates else ())):  # it leaves them to its --mpirun_hostfile
        numbers = [os.environ.get(name, "") for name in names]
        if all(number.isdecimal() for number in numbers):
            index, count, here = map(int, numbers)
            return (index, count, here) if here <= index < count else alone
    return alone


def is_launched() -> bool:
    """Say whether this process is already one of several."""
    return place()[1] > 1


def end_with_launcher() -> None:
    """Let this process end when torchrun or `accelerate launch`, which has started it, does; `launch` sees to its own.

    Processes that were placed by hand may outlive the shell that started them.
    """
    if is_launched() and any(name in os.environ for name in _LAUNCHERS):
        child.end_with(os.getppid())


def on_this_machine() -> int:
    """Return how many of the processes that a launcher has started run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a program that is to run by itself, whatever this process is part of."""
    left_out = {name for names in (_NUMBERS, *_MPI_NUMBERS) for name in names}
    return {name: value for name, value in environment.items() if name not in left_out}


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `dpn ARGUMENTS` in `count` processes, on the CPU or on one GPU each.

    Returns:
        The exit code of the main process.

    Raises:
        DpnError: if one of the processes ended without a word, as by a signal.
    """
    processes = [
        subprocess.Popen(child.command("dpn_cli", *arguments), env=environment, start_new_session=True)
        for environment in _environments(count)
    ]
    try:
        return _watch(*processes)
    except KeyboardInterrupt:
        processes[0].send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            code = processes[0].wait(GRACE_S)
            if code >= 0:
                return code
        raise
    finally:
        for process in processes:
            process.kill()  # what was done is on disk, whole
            process.wait()


def _environments(count: int) -> list[dict[str, str]]:
    """Return what every process finds in its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # free a moment ago
    shared = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count)),
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]


def _watch(main: "subprocess.Popen[bytes]", *others: "subprocess.Popen[bytes]") -> int:
    """Wait for the main process, or for another one to fail; return the main one's exit code."""
    while main.poll() is None and not any(process.poll() for process in others):
        time.sleep(POLL_S)
    with suppress(subprocess.TimeoutExpired):
        main.wait(GRACE_S)  # it notices that another one failed, and says so
    if main.returncode is not None and main.returncode >= 0:
        return main.returncode
    index, code = next((i, process.returncode) for i, process in enumerate([main, *others]) if process.returncode)
    how = f"by signal {-code}, as when memory runs out" if code < 0 else f"with exit code {code}"
    raise DpnError(f"process {index} of {1 + len(others)} ended {how}: run the same command line again to go on")
