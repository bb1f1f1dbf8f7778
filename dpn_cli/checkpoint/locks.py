"""Locks that keep two runs apart: the kernel's, so that they die with their process, however that ends.

Where a file system has none, runs are not kept apart, and all else works.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpn_cli.errors import UsageError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what file systems without locks say
_PROGRAMS = {"dpn", "dpn_cli"}
_PAUSE_S = 0.02


class Use:
    """A folder that this run uses."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def is_alone(self) -> bool:
        """Say whether no other run uses the folder; from then on none begins to while this one goes on."""
        if self._descriptor is None:
            return True
        try:
            _flock(self._descriptor, fcntl.LOCK_EX)
        except BlockingIOError:
            with suppress(BlockingIOError):  # the kernel has dropped the lock
                _flock(self._descriptor, fcntl.LOCK_SH)
            return False
        return True


@contextmanager
def in_use(folder: Path) -> Iterator[Use]:
    """Keep others from replacing a folder while it is read. Any number of runs may; nothing is written for it.

    A folder that cannot be opened is not locked: whoever reads it says why.

    Raises:
        UsageError: if another run is replacing it; names that run.
    """
    with _holding(
        folder, fcntl.LOCK_SH, "is being replaced by {holder}: wait for it to finish, or stop it"
    ) as descriptor:
        yield Use(descriptor)


@contextmanager
def to_be_replaced(folder: Path) -> Iterator[None]:
    """Keep others from using a folder, if there is one, while another one is made that takes its place.

    Raises:
        UsageError: if another run uses it; names that run.
    """
    with _holding(folder, fcntl.LOCK_EX, "is in use by {holder}: wait for it to finish, or stop it"):
        yield


@contextmanager
def _holding(folder: Path, kind: int, refusal: str) -> Iterator[int | None]:
    """Lock a folder itself, which works where no file can be made, and goes along when the folder is renamed."""
    try:
        descriptor = acquire(folder, _open_folder, kind, f"{folder} {refusal}")
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def acquire(path: Path, open_it: Callable[[Path], int], kind: int, refusal: str, patience_s: float = 0.0) -> int:
    """Open and lock what is at a path.

    Args:
        path: File or folder to lock.
        open_it: opens it, or makes it.
        kind: Kind of lock, as in flock(2).
        refusal: the sentence for a second run, in which `{holder}` stands for the first one.
        patience_s: seconds to wait for another run that holds the lock.

    Returns:
        The descriptor; when it is closed, the lock is gone.

    Raises:
        UsageError: if another run holds the lock.
    """
    until = time.monotonic() + patience_s
    while True:
        descriptor = open_it(path)
        try:
            _flock(descriptor, kind)
            if _is_at(path, descriptor):
                return descriptor
            os.close(descriptor)  # the run that held the lock ended in between, and what was opened is gone
        except BlockingIOError:
            if time.monotonic() < until:
                os.close(descriptor)
                time.sleep(_PAUSE_S)
                continue
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UsageError(refusal.replace("{holder}", holder)) from None
        except BaseException:
            os.close(descriptor)
            raise


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def _flock(descriptor: int, kind: int) -> None:
    """Lock an open file, at once or with a BlockingIOError; where there are no locks, do nothing."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Name the process that holds the lock of an open file, as far as the kernel tells (proc_locks(5))."""
    inode = str(os.fstat(descriptor).st_ino)
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].split(":")[-1] == inode and fields[4] != str(os.getpid()):
                return _process(int(fields[4]))
    return "another run"


def _process(pid: int) -> str:
    """Describe a running process: its number, its command and when it began."""
    words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    names = [Path(word).name for word in words]
    program = next((i for i, name in enumerate(names) if name in _PROGRAMS), None)
    if program is None:
        command = names[0]
    else:
        command = " ".join(["dpn", *[word for word in words[program + 1 :] if word.isalpha()][:1]])
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    age_s = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    since = time.strftime("%H:%M", time.localtime(time.time() - age_s))
    return f"process {pid} ({command}, since {since})"
