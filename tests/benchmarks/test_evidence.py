"""Every figure of the README comes out of one command."""

from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.evidence import HERE, STEPS, Step, main
from dpn_cli.cli import cli


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("is_small", [True, False])
def test_every_step_is_a_command_that_takes_its_options(
    step: Step, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE)  # as of a script: some import each other
    program, *words = step.words(is_small)
    if program == "dpn":
        verb, *words = words
        command = cli.get_command(click.Context(cli), verb)
    elif program == "python":
        _, module, *words = words
        command = import_module(module).main
    else:
        command = import_module(f"benchmarks.{program.removesuffix('.py')}").main
    assert command is not None
    command.make_context(program, words)


@pytest.mark.slow
def test_all_steps_run_on_a_handful_of_samples_and_only_once(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["--small", "--output", str(tmp_path)])
    assert found.exit_code == 0, found.output
    texts = {step.name: (tmp_path / f"{step.name}.txt").read_text(encoding="utf-8") for step in STEPS}
    assert all("versions: dpn-cli" in text and str(tmp_path) not in text for text in texts.values())
    assert "dpn beside the best baselines" in texts["frontier"] and (tmp_path / "frontier.png").is_file()
    again = CliRunner().invoke(main, ["--small", "--output", str(tmp_path)])
    assert again.exit_code == 0 and "frontier.py" not in again.output, "what is there is not made again"
