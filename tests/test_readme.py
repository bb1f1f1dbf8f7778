"""The README's first screen, and its code: blocks without a `# needs:` line run as printed on the embedded teacher."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dpn_cli.cli import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
NEEDS = "# needs: "
SCREEN = 40  # lines
LIMIT_S = 3600


def command_lines() -> list[str]:
    """Return every `dpn …` line, of blocks and of running text, as printed."""
    found = []
    for language, block in BLOCKS:
        if language == "sh":
            found += [line for line in block.replace("\\\n", " ").splitlines() if "dpn " in line.partition("#")[0]]
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    return found + [quoted for quoted in re.findall(r"`([^`]+)`", text) if quoted.startswith("dpn ")]


def test_the_first_screen_says_what_a_new_user_asks() -> None:
    screen, _, rest = README.partition("\n## ")
    assert len(screen.splitlines()) <= SCREEN and rest
    for answer in ("You get", "It costs", "GB of memory", "dpn data", "Not supported", "Serve", "Go back"):
        assert answer in screen
    assert "|---|" not in screen, "tables come later"


def test_every_block_says_what_it_is_and_needs() -> None:
    assert README.count("\n```") == 2 * len(BLOCKS)
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}
    assert not re.search(r"^ {4}(dpn|python|make|import|from) ", README, flags=re.MULTILINE), "in a block of its own"
    outside = re.compile(r"\b(make|pip|benchmarks/|llava-|--device cuda)")
    for language, block in BLOCKS:
        if language != "text" and not block.startswith(NEEDS):
            assert not outside.search(re.sub(r"#.*", "", block)), block


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_one_that_dpn_takes(line: str) -> None:
    words = shlex.split(line.replace("…", ""), comments=True)
    words = words[words.index("dpn") + 1 :]
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is None or verb.isupper():
        return
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None, verb
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


@pytest.mark.slow
def test_the_blocks_run_as_printed(tmp_path: Path) -> None:
    ran = 0
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "dpn").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dpn_cli "$@"\n')
    (bin_folder / "dpn").chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    for language, block in BLOCKS:
        if language == "text" or block.startswith(NEEDS):
            continue
        how = ["sh", "-e", "-c"] if language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*how, block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        ran += 1
    assert ran >= 3
