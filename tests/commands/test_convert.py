import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dpn_cli.cli import main
from dpn_cli.conversion import convert as conversion
from tests.originals import Original


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_result_is_current_and_described(tiny_llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_llava, "model")
    assert main(["convert", "model", "--set", "pyramid.sites.0={after: 0, rates: [[1, 1], [4, 4]]}"]) == 0
    captured = capsys.readouterr()
    assert "model-dpn" in captured.out
    assert "keep, pool:4x4" in captured.out and "before the first" in captured.out
    assert "Next: dpn calibrate" in captured.err
    assert json.loads(Path(".dpn/current.json").read_text()) == {"checkpoint": str(Path("model-dpn").resolve())}


def test_a_dry_run_leaves_no_trace(tiny_llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tiny_llava), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_exit_codes(tiny_llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tiny_llava), "-o", "out"]) == 0
    Path("empty").mkdir()
    Path("llama").mkdir()
    Path("llama/config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    for args, code, message in [
        (["missing"], 3, "missing does not exist"),
        (["empty"], 3, "no config.json"),
        (["llama"], 3, "expected a LLaVA"),
        (["out", "-o", "again"], 3, "already a pyramid"),
        ([str(tiny_llava), "-o", "out"], 2, "out exists"),
        ([str(tiny_llava), "--recipe", "nothing"], 2, "no recipe named 'nothing'"),
    ]:
        assert main(["convert", *args]) == code
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert main(["convert", str(tiny_llava), "-o", "out", "--force"]) == 0
    assert "Wrote out in place of an earlier one. Next:" in capsys.readouterr().err


def test_a_current_folder_that_cannot_remember_costs_no_results(
    tiny_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".dpn").write_text("mine")
    assert main(["convert", str(tiny_llava), "-o", "out"]) == 1
    captured = capsys.readouterr()
    assert "before the first" in captured.out and Path("out/config.json").is_file()
    error = "Error: the results are complete, but .dpn cannot be written here, so pass  --model out: File exists"
    assert captured.err.splitlines()[-1] == error
    assert Path(".dpn").read_text() == "mine"


def test_a_current_folder_that_is_gone_is_refused_before_the_work(
    tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["convert", str(tiny_llava), "-o", str(tmp_path / "out")]) == 2
    assert "Error: the current folder was removed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_how_the_weights_came_is_said(tiny_llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tiny_llava), "-o", "linked", "--link", "--check-values", "--verify"]) == 0
    assert "shared with the source" in capsys.readouterr().err


def test_a_link_that_cannot_be_is_a_copy_and_said(
    make_original: Callable[..., Original], capsys: pytest.CaptureFixture[str]
) -> None:
    original = make_original()
    assert main(["convert", str(original.folder), "--vision-tower", str(original.clip), "--link"]) == 0
    assert "--link: nothing could be linked" in capsys.readouterr().err


def test_a_killed_run_is_swept_by_the_next(tiny_llava: Path) -> None:
    if (child := os.fork()) == 0:
        try:
            conversion.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            main(["convert", str(tiny_llava), "-o", "out"])
        finally:
            os._exit(1)  # it was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {path.name for path in Path().iterdir()} == {".out.dpn"}
    assert main(["convert", str(tiny_llava), "-o", "out"]) == 0
    assert {path.name for path in Path().iterdir()} == {".dpn", "out"}


def test_the_original_layout_is_converted_with_its_vision_tower(
    make_original: Callable[..., Original], capsys: pytest.CaptureFixture[str]
) -> None:
    original = make_original()
    assert main(["convert", str(original.folder), "--vision-tower", str(original.clip)]) == 0
    assert "written in Hugging Face's layout" in capsys.readouterr().err
    assert Path("llava-v1.5-tiny-dpn/config.json").is_file()
    for source, option, code, message in [
        (original.folder, str(original.clip / "nowhere"), 3, "does not exist"),
        (original.folder, str(original.folder), 3, "expected a CLIP model"),
        ("llava-v1.5-tiny-dpn", str(original.clip), 3, "already a pyramid"),
    ]:
        assert main(["convert", str(source), "--vision-tower", option, "-o", "other"]) == code
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and "Traceback" not in captured.err
        assert not Path("other").exists()


def test_a_vision_tower_for_a_model_that_has_one_is_refused(
    tiny_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tiny_llava), "--vision-tower", "x", "-o", "out"]) == 2
    assert "leave --vision-tower out" in capsys.readouterr().err
