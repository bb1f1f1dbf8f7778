"""Every figure of the README comes out of one command."""

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.evidence import HERE, STEPS, main


def test_every_step_is_a_command_that_is_there() -> None:
    for step in STEPS:
        program = shlex.split(step.command)[0]
        assert program == "dpn" or (HERE / program).is_file()
    assert len({step.name for step in STEPS}) == len(STEPS)


@pytest.mark.slow
def test_all_steps_run_on_a_handful_of_samples_and_only_once(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["--small", "--output", str(tmp_path)])
    assert found.exit_code == 0, found.output
    texts = {step.name: (tmp_path / f"{step.name}.txt").read_text(encoding="utf-8") for step in STEPS}
    assert all("versions: dpn-cli" in text and str(tmp_path) not in text for text in texts.values())
    assert "dpn beside the best baselines" in texts["frontier"] and (tmp_path / "frontier.png").is_file()
    again = CliRunner().invoke(main, ["--small", "--output", str(tmp_path)])
    assert again.exit_code == 0 and "frontier.py" not in again.output, "what is there is not made again"
