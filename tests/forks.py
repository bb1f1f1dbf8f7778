"""Work in a fork of the tests' process: hooks of the interpreter, which cannot be removed, end with it."""

import os
import traceback
from collections.abc import Callable


def in_a_fork(work: Callable[[], object]) -> None:
    """Do something in a child of this process, and fail as it fails."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it is, the parent says it
            with os.fdopen(writing, "w") as said:
                said.write(traceback.format_exc())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as said:
        errors = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, errors
