"""Where what is unfinished is made: a hidden folder beside what is written, which is the lock on it too.

So what a killed run left is known to be dpn's own, and the next run that holds the lock removes it.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpn_cli.checkpoint.locks import acquire
from dpn_cli.errors import DpnError

OLD = "old"  # the target, while another one takes its place
_LOCK = "lock"
_TRIES = 100
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP}


class NotWritableError(DpnError):
    """Nothing can be written at a place."""


@contextmanager
def workplace(target: Path, refusal: str, advice: str, patience_s: float = 0.0) -> Iterator[Path]:
    """Keep other runs from writing something, and yield a folder for what is unfinished, on the same disk.

    It is empty but for the lock, is called `.NAME.dpn`, and is there for as long as the lock is held. A target that a
    killed run was replacing is brought back.

    Args:
        target: File or folder to be written; its parents are made.
        refusal: the sentence for a second run, in which `{holder}` stands for the first one.
        advice: Advice for the user if nothing can be written.
        patience_s: seconds to wait for another run.

    Raises:
        UsageError: if another run holds the lock.
        NotWritableError: if nothing can be written there.
        DpnError: if the place is taken by something that is not dpn's.
    """
    folder = target.with_name(f".{target.name}.dpn")
    try:
        descriptor = acquire(folder / _LOCK, _open_lock, fcntl.LOCK_EX, refusal, patience_s)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise NotWritableError(f"{target.parent} cannot be written ({error.strerror}): {advice}") from error
    try:
        _tidy(folder, target)
        yield folder
    finally:
        try:
            with suppress(OSError):
                _tidy(folder, target)
                (folder / _LOCK).unlink()
                folder.rmdir()
        finally:
            os.close(descriptor)


def _tidy(folder: Path, target: Path) -> None:
    """Bring back a target caught between two names, and remove all else but the lock."""
    old = folder / OLD
    if old.is_dir() and not old.is_symlink() and not os.path.lexists(target):
        old.rename(target)
    for path in folder.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _open_lock(path: Path) -> int:
    """Open the lock file of a workplace, or make both."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # a run that held it has left in between
            return _open(path)
    return _open(path)


def _open(path: Path) -> int:
    """Open a lock file or make it, never through a link, and only in a folder that is dpn's or new."""
    folder = path.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir()
    for each in (folder, path):
        if each.is_symlink():
            raise DpnError(f"{each} is a symbolic link, through which dpn does not write: remove it")
    try:
        names = {each.name for each in folder.iterdir()}
    except NotADirectoryError:
        raise _not_ours(folder) from None
    if names and path.name not in names:
        raise _not_ours(folder)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        with suppress(OSError):
            folder.rmdir()  # if it is empty
        raise
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and not found.st_size:
        return descriptor
    os.close(descriptor)
    raise _not_ours(folder)


def _not_ours(folder: Path) -> DpnError:
    return DpnError(f"{folder} was not made by dpn, but has the name of one of dpn's folders: move it elsewhere")
