"""What an evaluation has found so far, on disk: a killed run goes on where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpn_cli import workspace
from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.workplace import NotWritableError, workplace
from dpn_cli.checkpoint.writer import replace_file, write_json
from dpn_cli.errors import CheckpointError
from dpn_cli.parallel.fingerprint import differences
from dpn_cli.parallel.kept import KeptFiles

FOLDER = workspace.FOLDER / "evaluation"


class KeptResults:
    """Batches of plain data, each in a file of its own that is there whole or not at all.

    The folder is named by what the results depend on, so that another evaluation finds none of them.
    """

    def __init__(self, depends_on: dict[str, Any], say: Callable[[str], None]) -> None:
        """Find the results of an earlier run.

        Args:
            depends_on: Plain data that the results depend on, as for `keeping`.
            say: Function that is called with a message if no more can be kept.

        Raises:
            UsageError: if .dpn leads elsewhere.
        """
        workspace.check_state_folder()
        self.depends_on = depends_on
        self.say = say
        self.folder = FOLDER / _digest(json.dumps(depends_on, sort_keys=True))
        self.is_lost = False

    def of(self, what: str) -> "KeptBatches":
        """Return the batches of one kind of result."""
        files = KeptFiles[list[Any]](
            self.folder,
            f"{_digest(what)}-{{:06d}}.json",
            read=lambda path: list(read_json(path)["results"]),
            write=lambda path, results: write_json(path, {"results": results}),
        )
        return KeptBatches(self, files)

    def save(self, files: KeptFiles[list[Any]], batch: int, results: list[Any]) -> None:
        """Keep a batch, unless that has failed before: an evaluation goes on without."""
        if self.is_lost:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._record.exists():
                replace_file(self._record, lambda path: write_json(path, self.depends_on), self.folder)
            files.save(batch, results)
        except OSError as error:
            self.is_lost = True
            self.say(f"Note: {self.folder} cannot be written ({error.strerror}): a killed run cannot be resumed.")

    def unused(self) -> str | None:
        """Say which unfinished results of the same weights and data are not used, and why; None if there are none."""
        for record in () if self._record.exists() else sorted(FOLDER.glob("*.json")):
            with suppress(CheckpointError, OSError):
                found = read_json(record)
                if all(found.get(key) == self.depends_on.get(key) for key in ("weights", "data")):
                    where, changed = record.with_suffix(""), differences(found, self.depends_on)
                    return f"Starting over: the unfinished evaluation in {where} had other values of {changed}."
        return None

    def drop(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self._record.unlink()

    @property
    def _record(self) -> Path:
        """Where it is written down what the results depend on, beside their folder."""
        return self.folder.with_suffix(".json")


@dataclass(frozen=True)
class KeptBatches:
    """The batches of one kind of result."""

    results: KeptResults
    files: KeptFiles[list[Any]]

    def load(self, batch: int) -> list[Any] | None:
        """Return a batch, or None if it was not kept or cannot be read."""
        return self.files.load(batch)

    def save(self, batch: int, results: list[Any]) -> None:
        """Keep a batch if that is possible."""
        self.results.save(self.files, batch, results)


@contextmanager
def keeping(depends_on: dict[str, Any], say: Callable[[str], None]) -> Iterator[KeptResults | None]:
    """Keep results until the block ends well, and other runs of the same evaluation away.

    Args:
        depends_on: plain data that changes with the results.
        say: Function for messages: that another evaluation's results are not used, or that none can be kept.

    Yields:
        The results; None if nothing can be written.

    Raises:
        UsageError: if another run is doing the same evaluation.
    """
    kept = KeptResults(depends_on, say)
    refusal = (
        f"this evaluation is being run by {{holder}}, which keeps its results in {kept.folder}: wait for it, or stop it"
    )
    try:
        with ExitStack() as held:
            try:
                held.enter_context(workplace(kept.folder, refusal, "no results are kept, so a killed run starts over"))
            except NotWritableError as error:
                say(f"Note: {error}.")
                yield None
                return
            if unused := kept.unused():
                say(unused)
            yield kept
            kept.drop()
    finally:
        for parent in FOLDER, FOLDER.parent:
            with suppress(OSError):
                parent.rmdir()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
