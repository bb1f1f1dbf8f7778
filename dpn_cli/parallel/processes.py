"""Several processes that calibrate or evaluate together, on one machine or more: each its share, the first one writes.

They are started by `accelerate launch`, `torchrun` or the option `--num-processes` (launch.py). A process that was
started by none of them is alone, and nothing here makes a difference to it.
"""

import os
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from threading import Thread
from typing import Protocol, TypeVar

import torch
from torch import nn

from dpn_cli.errors import DpnError, RelayedError, UsageError
from dpn_cli.parallel.launch import on_this_machine, place

PATIENCE = timedelta(hours=2)  # for the slowest process; one that ends is noticed at once
MEETING_NOTICE_S, EXCHANGE_NOTICE_S = 5.0, 60.0  # of waiting, after which it is said what for
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # as `accelerate launch` tells it

T = TypeVar("T")


class Kept(Protocol[T]):
    """Pieces of work that outlive the process."""

    def load(self, piece: int) -> T | None:
        """Return a piece, or None if there is none yet."""

    def save(self, piece: int, value: T) -> None:
        """Keep a piece."""


@dataclass(frozen=True)
class _Failure:
    """An exception on its way to other processes, in which it may not be picklable."""

    sentence: str
    exit_code: int
    trace: str

    @classmethod
    def of(cls, error: Exception, process: int) -> "_Failure":
        what = str(error) if isinstance(error, DpnError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, DpnError) else DpnError.exit_code
        return cls(f"process {process}: {what}", code, "".join(traceback.format_exception(error)))

    def error(self, kind: type[DpnError]) -> DpnError:
        error = kind(self.sentence)
        error.exit_code = self.exit_code
        error.add_note(self.trace)
        return error


@dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    Attributes:
        index: number of this process; the first, 0, is the main one.
        count: number of all processes.
        say: Function for messages about long waits.
    """

    index: int = 0
    count: int = 1
    say: Callable[[str], None] = field(default=lambda message: None, compare=False)

    @classmethod
    def join(cls, say: Callable[[str], None]) -> "Processes":
        """Meet the other processes that a launcher has started, if there are any.

        Args:
            say: see `Processes`.

        Raises:
            UsageError: if the launcher is to shard the model with FSDP or DeepSpeed, or there are GPUs, but fewer than
                processes on this machine.
        """
        for variable, name in SHARDED.items():
            if os.environ.get(variable, "").lower() == "true":
                raise UsageError(
                    f"the configuration of accelerate asks for {name}, which dpn cannot use: every process "
                    "holds the whole frozen model and training averages gradients; choose multi-GPU or multi-CPU "
                    "(dpn calibrate --num-processes), and --load-in 4bit if the model is too large"
                )
        index, count = place()
        if count == 1:
            return cls()
        here, gpus = on_this_machine(), torch.cuda.device_count()
        if 0 < gpus < here:
            raise UsageError(f"{here} processes need a GPU each, but this machine has {gpus}: start at most {gpus}")
        from accelerate import PartialState

        me = cls(index, count, say)
        where = f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        state = me._wait(
            lambda: PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE),
            f"process {index} of {count} waits for the others to start, which meet {where}",
            MEETING_NOTICE_S,
        )
        if state.device.type == "cuda":
            torch.cuda.set_device(state.device)  # which is a thread's own
        return me

    @property
    def is_main(self) -> bool:
        """Whether this process writes, fits and speaks."""
        return self.index == 0

    @property
    def _error(self) -> type[DpnError]:
        """The kind of an error that all processes have: the main one says it."""
        return DpnError if self.is_main else RelayedError

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of the processes."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return self._exchange(lambda: gather_object([value]))

    def agree(self, value: T) -> T:
        """Return the main process's value."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return self._exchange(lambda: broadcast_object_list([value])[0])

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Make a failure of one process within the block a failure of all; nothing is exchanged inside of it."""
        failure: _Failure | None = None
        try:
            yield
        except Exception as error:
            failure, told = _Failure.of(error, self.index), False
            with suppress(DpnError):  # another one may be gone by now
                self.gather(failure)
                told = not self.is_main
            if told:
                raise failure.error(RelayedError) from error
            raise
        for other in self.gather(failure):
            if other:
                raise other.error(self._error)

    def share(
        self,
        count: int,
        work: Callable[[int], T],
        take: Callable[[int, T], None],
        kept: Kept[T] | None = None,
    ) -> None:
        """Do pieces of work, each in one process, as many at a time as there are processes.

        Args:
            count: number of pieces.
            work: makes a piece, from its number alone.
            take: called once with every piece, in the main process only.
            kept: brings back the pieces of an earlier run and keeps new ones as they are made; the main process's.
        """
        missing: list[int] = []
        with self.as_one():
            for piece in range(count) if self.is_main else ():
                value = kept.load(piece) if kept else None
                missing.append(piece) if value is None else take(piece, value)
        missing = self.agree(missing)
        for start in range(0, len(missing), self.count):
            pieces = missing[start : start + self.count]
            with self.as_one():
                mine = [work(piece) for piece in pieces[self.index : self.index + 1]]
            values = self.gather(mine)
            with self.as_one():
                for piece, value in zip(pieces, chain(*values), strict=True) if self.is_main else ():
                    if kept:
                        kept.save(piece, value)
                    take(piece, value)

    def sum_gradients(self, parameters: Collection[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place; what none of them has a gradient of stays without."""
        if self.count == 1:
            return
        wanted = [any(each) for each in zip(*self.gather([p.grad is not None for p in parameters]), strict=True)]
        gradients = []
        for parameter in (p for p, is_wanted in zip(parameters, wanted, strict=True) if is_wanted):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._exchange(lambda: [torch.distributed.all_reduce(gradient) for gradient in gradients])

    def _exchange(self, call: Callable[[], T]) -> T:
        """Let all processes exchange something; say that one is gone where torch says that a connection is."""
        try:
            what = f"process {self.index} of {self.count} has done its share, and waits for those of the others"
            return self._wait(call, what, EXCHANGE_NOTICE_S)
        except RuntimeError as error:
            raise self._loss() from error

    def _wait(self, call: Callable[[], T], what: str, notice_s: float) -> T:
        """Let a thread of its own wait for other processes: in this one, Python would answer no signal meanwhile."""
        future: Future[T] = Future()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
                future.set_exception(error)

        Thread(target=run, daemon=True).start()
        with suppress(TimeoutError):
            future.exception(notice_s)
        if not future.done():
            self.say(f"Waiting: {what}.")
        return future.result()

    def _loss(self) -> DpnError:
        """Return the error; in a function, since a signal that came to this process too is handled before one is run.

        The main process says it, or where that one is lost, it has said why, or its launcher does.
        """
        return self._error(
            "another process of this run ended, as when memory runs out: run the same command line again"
        )


ALONE = Processes()
