"""The command line: a lazy group of verbs, and the one place where errors become exit codes."""

import errno
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

from dpn_cli import __version__, channels, console, workspace
from dpn_cli.errors import DpnError, RelayedError, UsageError, did_you_mean
from dpn_cli.parallel.launch import end_with_launcher, is_launched

INTERRUPTED = 130
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAX_SENTENCE = 1000  # characters of an error message
SHOW_CURSOR = b"\x1b[?25h"
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f)",
}

COMMANDS = {
    "convert": "Turn a LLaVA's language model into a pyramid; lossless until calibrated.",
    "data": "Show how data are read, and what a calibration on them costs.",
    "calibrate": "Find the experts that fit the model, and fit the routers, on your data.",
    "export": "Write one compact folder that plain transformers can load.",
    "inspect": "Show sites, experts and budgets, and the cost of every route.",
    "run": "Answer a question about an image, and show the route taken.",
    "eval": "Compare the pyramid with the original and with other methods.",
    "bench": "Measure latency, memory and FLOPs, compared with the original.",
    "recipes": "List the recipes, or show one.",
    "demo": "Convert, calibrate, export and evaluate a small embedded LLaVA.",
}


class HelpFormatter(click.HelpFormatter):
    """Breaks the lines of a help text at blanks only, so that `llava-1.5-7b` stays whole."""

    _UNBROKEN = "\u2011"  # a hyphen that no line ends with

    def write_text(self, text: str) -> None:
        """Write a paragraph."""
        super().write_text(text.replace("-", self._UNBROKEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write a list of names and their meanings."""
        super().write_dl([(name, text.replace("-", self._UNBROKEN)) for name, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        """Return the help."""
        return super().getvalue().replace(self._UNBROKEN, "-")


class Context(click.Context):
    """A context whose helps are easy to read."""

    formatter_class = HelpFormatter


class LazyGroup(click.Group):
    """A group whose commands, `dpn_cli.commands.NAME.command`, are imported when they are called."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one verb."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"dpn_cli.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return with_global_options(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which one may have been meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs' one-line helps without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@dataclass
class Settings:
    """The global options, kept outside click's context so that they outlive a failed command."""

    debug: bool = False


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        console.set_quiet(True)


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        warnings.simplefilter("default")
        console.show_logs()


def _debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).debug = True
        _verbose(ctx, param, value)


def _log_file(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value:
        try:
            console.log_to(value)
        except OSError as error:
            raise click.BadParameter(f"{value!r} cannot be written: {error.strerror}", ctx, param) from None


GLOBAL_OPTIONS = [
    click.Option(
        ["-q", "--quiet"], is_flag=True, expose_value=False, callback=_quiet, help="Show results and errors only."
    ),
    click.Option(
        ["-v", "--verbose"], is_flag=True, expose_value=False, callback=_verbose,
        help="Show the logs and warnings of libraries, too.",
    ),
    click.Option(
        ["--debug"], is_flag=True, expose_value=False, callback=_debug,
        help="Show the traceback of an error; implies -v.",
    ),
    click.Option(
        ["--log-file"], type=click.Path(dir_okay=False), metavar="FILE", expose_value=False, callback=_log_file,
        help="Append all messages to FILE, with timestamps.",
    ),
]  # fmt: skip
"""Options that stand before or after the verb; they set what holds for the whole process."""


def with_global_options(command: click.Command) -> click.Command:
    """Return a copy of a command that takes the global options too, and so do its subcommands."""
    command = copy(command)
    command.params = [*command.params, *GLOBAL_OPTIONS]
    command.context_class = Context
    if isinstance(command, click.Group):
        command.commands = {name: with_global_options(each) for name, each in command.commands.items()}
    return command


@click.group(cls=LazyGroup, params=[*GLOBAL_OPTIONS], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="dpn")
def cli() -> None:
    """Give a trained LLaVA a dynamic pyramid: the same answers for a fraction of the compute.

    \b
    dpn convert llava-1.5-7b
    dpn calibrate --data mydata --budget 0.5
    dpn export
    """  # noqa: D301 - click takes \\b as "do not rewrap"
    workspace.check_current_folder()


def run() -> NoReturn:
    """Run the command line and end this process, which is a program of its own.

    Beside others that calibrate with it, it ends with their launcher, and leaves at once: gloo's threads could abort an
    interpreter that tidies up first, and the exit code would be lost.
    """
    end_with_launcher()
    set_up_libraries()
    code = main()
    if is_launched():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def set_up_libraries() -> None:
    """Set what torch's libraries read from the environment, where the user does not; call this before it is imported.

    OpenMP's threads would spin while they wait: beside other programs, that took ten times the CPU seconds. oneDNN
    would keep a thousand compiled kernels of half a megabyte, one per size of a matrix, and every batch has other
    sizes. Layers share their sizes, so that a few are enough.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 ok, 1 failure, 2 usage or recipe, 3 bad checkpoint, 4 bad data, 130 interrupted.
    """
    for each in STOPPING:
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:  # as nohup does
            signal.signal(each, _interrupt)
    channels.prepare()
    console.guard_libraries()
    console.set_quiet(False)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what a user must know is said in sentences of our own
    settings = Settings()
    try:
        result = cli.main(args, prog_name="dpn", obj=settings, standalone_mode=False)
        with channels.results():
            sys.stdout.flush()
    except RelayedError as error:
        return error.exit_code
    except click.ClickException as error:
        console.speak_up()
        said = io.StringIO()
        error.show(said)
        console.error(said.getvalue().rstrip("\n"))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        console.error("Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        channels.silence(channels.STDOUT)  # in the interpreter's last flush
        return 1
    except Exception as error:  # noqa: BLE001 - all of them become a sentence and an exit code
        console.speak_up()
        if settings.debug:
            console.error(traceback.format_exc().rstrip("\n"))
        console.error(f"Error: {_short(_sentence(error))}")
        return _exit_code(error)
    finally:
        console.end_logs()
    return result if isinstance(result, int) else 0


def _exit_code(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError.exit_code
    return error.exit_code if isinstance(error, DpnError) else 1


def _sentence(error: Exception) -> str:
    if isinstance(error, DpnError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"a file name is longer than this file system allows: {error.filename}"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f" ({error.filename})" if error.filename else ""
        return f"{NO_ROOM[error.errno]}{where}: make room and run the same command line again"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where} (--debug shows where)"
    first_line = next(iter(str(error).strip().splitlines()), "no message")
    return f"unexpected {type(error).__name__}: {first_line} (--debug shows the traceback)"


def _short(sentence: str) -> str:
    """Cut the middle out of a message that quotes something huge, such as a damaged file's values."""
    half = MAX_SENTENCE // 2
    return sentence if len(sentence) <= MAX_SENTENCE else f"{sentence[:half]} … (cut) … {sentence[-half:]}"


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Let the command tidy up and leave; a second signal ends it at once."""
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else _leave_at_once)  # a terminal hangs up twice
    if signum == signal.SIGHUP:
        channels.silence(*filter(os.isatty, (channels.STDOUT, channels.STDERR)))
    raise KeyboardInterrupt


def _leave_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    if os.isatty(channels.STDERR):
        os.write(channels.STDERR, SHOW_CURSOR)  # a progress bar hides it
    os._exit(INTERRUPTED)
