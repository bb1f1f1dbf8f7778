import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import click
import pytest
from click.shell_completion import ShellComplete

from dpn_cli import __version__, cli, console
from dpn_cli.errors import CheckpointError, DataError, DpnError, MissingExtraError, RecipeError, UsageError

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "accelerate",
    "bitsandbytes",
    "peft",
    "PIL",
    "datasets",
    "safetensors",
}


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `dpn demo` raise."""

    @click.command()
    def command() -> NoReturn:
        raise error

    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(command=command))


def run_apart(*lines: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run `dpn` in a process of its own, which writes to stderr what heavy packages are imported after every line."""
    script = (
        "import sys; from dpn_cli.cli import main\n"
        f"for line in {lines!r}:\n"
        "    code = main(line)\n"
        f"    print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
        "    if code: sys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy() -> None:
    lines = [["--help"], *([command, "--help"] for command in cli.COMMANDS)]
    done = run_apart(*lines)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["[]"] * len(lines)
    assert done.stdout.startswith("Usage: dpn [OPTIONS]")
    assert all(f"Usage: dpn {command} " in done.stdout for command in cli.COMMANDS)


def test_inspect_imports_nothing_heavy(tiny_llava: Path) -> None:
    done = run_apart(["inspect", "--model", str(tiny_llava), "--json"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["model_type"] == "llava"


def test_the_group_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in cli.COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "-V"):
        assert cli.main([option]) == 0
        assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DpnError("it went wrong"), 1, "Error: it went wrong"),
        (UsageError("no"), 2, "Error: no"),
        (RecipeError("no"), 2, "Error: no"),
        (CheckpointError("no"), 3, "Error: no"),
        (DataError("no"), 4, "Error: no"),
        (MissingExtraError("Healing", "peft", "heal"), 1, "pip install 'dpn-cli[heal]'"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "the disk is full (/x)"),
        (OSError(errno.EFBIG, "File too large"), 1, "larger than is allowed here (ulimit -f): make room"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "/x"),
            2,
            "a file name is longer than this file system allows: /x",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "Error: Permission denied: /x"),
        (ValueError("first\nsecond"), 1, "Error: unexpected ValueError: first (--debug"),
        (ValueError(), 1, "Error: unexpected ValueError: no message"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (click.BadParameter("bad"), 2, "bad"),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    fail_with(error, monkeypatch)
    assert cli.main(["demo"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("line", [["--debug", "demo"], ["demo", "--debug"]])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: list[str]
) -> None:
    fail_with(CheckpointError("no"), monkeypatch)
    assert cli.main(line) == 3
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("\nError: no\n")


@pytest.mark.parametrize("verb", [*cli.COMMANDS, "recipes show"])
def test_global_options_stand_after_every_verb_too(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert cli.main([*verb.split(), "-q", "-v", "--debug", "--help"]) == 0
    output = capsys.readouterr().out
    assert all(output.count(f" {option}") == 1 for option in ("--quiet", "--verbose", "--debug ", "--log-file"))


@pytest.mark.parametrize("first", [True, False])
def test_what_is_said_is_logged_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first: bool
) -> None:
    @click.command()
    def command() -> NoReturn:
        console.note("working on [it]")
        logging.getLogger("library").info("a detail")
        raise DataError("no such row")

    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(command=command))
    options = ["--log-file", str(tmp_path / "log"), "-q"]
    for _ in range(2):
        assert cli.main([*options, "demo"] if first else ["demo", *options]) == 4
    assert capsys.readouterr().err == "Error: no such row\n" * 2
    said = [line.split(" ", 3)[2:] for line in (tmp_path / "log").read_text().splitlines()]
    once = [["INFO", "dpn: working on [it]"], ["INFO", "library: a detail"], ["ERROR", "dpn: Error: no such row"]]
    assert said == once * 2
    assert cli.main(["demo", "-v"]) == 4
    assert "INFO library: a detail" in (err := capsys.readouterr().err) and err.count("working on") == 1
    assert cli.main(["demo", "--log-file", str(tmp_path / "none" / "log")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_a_log_file_that_cannot_be_written_any_more_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        for step in ("one", "two"):
            console.note(step)

    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(command=command))
    assert cli.main(["--log-file", "/dev/full", "demo"]) == 0
    said = "Note: the log file /dev/full cannot be written (No space left on device), so it ends here."
    assert sorted(capsys.readouterr().err.splitlines()) == [said, "one", "two"]


def test_a_shell_completes_what_dpn_knows() -> None:
    def offered(line: str) -> set[str]:
        *words, incomplete = line.split(" ")
        found = ShellComplete(cli.cli, {}, "dpn", "_DPN_COMPLETE").get_completions(words, incomplete)
        return {item.value for item in found if item.type == "plain"}

    assert offered("convert llava-hr") == {"llava-hr-7b", "llava-hr-x-13b"}
    assert offered("convert --recipe d") == offered("recipes show d") == {"demo"}
    assert offered("recipes ") >= {"show", "demo", "llava-1.5-7b"}
    assert offered("eval --against fastv,p") == {"fastv,prepool", "fastv,pyramiddrop"}
    assert offered("bench --against al") == {"all"}
    assert offered("calibrate --experts pool,pi") == {"pool,pick"}
    assert offered("calibrate --heal ") == {"none", "lora"}
    assert offered("calibrate --set calibration.survey.") >= {"calibration.survey.samples="}
    assert offered("convert --set pyramid.router.") >= {"pyramid.router.hidden_ratio=", "pyramid.router.input="}
    assert "demo" in offered("eval --data ")
    assert "--log-file" in offered("inspect --l")


ESCAPE = "\x1b]52;c;eA==\x07\u202e"


@pytest.mark.parametrize(
    "error",
    [CheckpointError(ESCAPE), ValueError(ESCAPE), OSError(errno.EACCES, "no", ESCAPE), click.UsageError(ESCAPE)],
)
def test_an_error_tells_a_terminal_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_with(error, monkeypatch)
    assert cli.main(["demo"]) == getattr(error, "exit_code", 1)
    assert r"\u001b]52;c;eA==\u0007\u202e" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["inspect", ESCAPE], ["inspect", "x", ESCAPE], [f"--{ESCAPE}"], [ESCAPE]])
def test_arguments_tell_a_terminal_nothing(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) in (2, 3)
    assert "\x1b" not in (err := capsys.readouterr().err) and "\u202e" not in err


def test_nothing_that_libraries_say_tells_a_terminal_anything() -> None:
    script = f"""
import logging, sys, warnings
from types import SimpleNamespace
import click
from dpn_cli import cli

@click.command()
def command():
    logging.getLogger("library").warning("a %s", {ESCAPE!r})
    warnings.warn("of " + {ESCAPE!r})
    raise ValueError({ESCAPE!r})

cli.import_module = lambda _: SimpleNamespace(command=command)
sys.exit(cli.main(["--debug", "demo"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert (
        r"a \u001b]52" in done.stderr
        and r"Warning: of \u001b]52" in done.stderr
        and r"ValueError: \u001b]52" in done.stderr
    )
    assert "\x1b" not in done.stderr and "\u202e" not in done.stderr


def test_an_unknown_command_suggests_a_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convrt"]) == 2
    assert "Did you mean 'convert'?" in capsys.readouterr().err


def test_sigterm_ends_like_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def command() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(command=command))
    try:
        assert cli.main(["demo"]) == 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_signal_does_not_wait_for_the_tidying(second: str) -> None:
    script = f"""
import os, signal, sys, time
from types import SimpleNamespace
import click
from dpn_cli import cli

@click.command()
def command():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        print("tidying", flush=True)
        os.kill(os.getpid(), signal.{second})
        time.sleep(60)

cli.import_module = lambda _: SimpleNamespace(command=command)
sys.exit(cli.main(["demo"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "tidying\n", "")


@pytest.mark.parametrize(
    "line",
    [
        "inspect {model}",
        pytest.param("inspect {model} --json", marks=pytest.mark.slow),
        "recipes",
        pytest.param("recipes llava-1.5-7b", marks=pytest.mark.slow),
        "--help",
        "eval --help",
    ],
)
def test_a_closed_stdout_is_quiet(tiny_llava: Path, line: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    args = [sys.executable, "-c", "import sys; from dpn_cli.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*args, *line.format(model=tiny_llava).split()], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_silences_messages_but_not_results(
    tiny_llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    flag = ["--quiet"] if quiet else []
    assert cli.main([*flag, "convert", str(tiny_llava), "--output", "out"]) == 0
    capsys.readouterr()
    assert cli.main([*flag, "inspect", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model_type"] == "dpn_llava"
    assert ("Checkpoint: " in captured.err) is not quiet


@pytest.mark.parametrize(
    ("variable", "expected"), [("OMP_WAIT_POLICY", "PASSIVE"), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")]
)
def test_torchs_libraries_neither_spin_nor_hoard_unless_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, variable: str, expected: str
) -> None:
    seen: list[str] = []

    def main() -> int:
        seen.append(os.environ[variable])
        return 0

    monkeypatch.setattr(cli, "main", main)
    for given in (None, "7"):
        monkeypatch.setenv(variable, given or "")
        if given is None:
            monkeypatch.delenv(variable)
        with pytest.raises(SystemExit):
            cli.run()
    assert seen == [expected, "7"]


def test_ctrl_c_while_the_command_line_is_imported_shows_no_traceback() -> None:
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "dpn_cli.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from dpn_cli.start import run
run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, ""), "130, as a shell sees it"


def test_no_line_of_a_help_ends_inside_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        ends = [line for line in capsys.readouterr().out.splitlines() if line.endswith("-")]
        assert ends == [], command
