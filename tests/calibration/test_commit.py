"""Saving a calibration is one step: whoever looks, and whenever it is killed, finds the old one or the new one."""

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpn_cli import cli
from dpn_cli.calibration import calibrate as calibration
from dpn_cli.calibration.store import GENERATIONS, calibrating, save_calibration, sweep
from dpn_cli.checkpoint.headers import WEIGHTS_KEY
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.checkpoint.streams import read_pieces
from dpn_cli.conversion.convert import convert
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import CheckpointError, DpnError, UsageError
from dpn_cli.exporting import export as exporting
from dpn_cli.exporting.export import export
from dpn_cli.inference.loading import load_model
from dpn_cli.parallel.processes import ALONE
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe, HealRecipe
from tests.forks import in_a_fork
from tests.runs import FEW, digests, noise_pictures

HEAL = HealRecipe(method="lora", rank=2, steps=1, batch_size=2, gradient_accumulation=1)
RECIPE = CalibrationRecipe.model_validate({**FEW, "budget": 0.7})
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"}

Save = Callable[[Path], None]


class Killed(BaseException):
    """The process has been killed: it does nothing more to any file."""


class Executioner:
    """Kills at a file event: from then on every change of a file under a folder fails, those of tidying up too."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.left = 0
        sys.addaudithook(self._see)  # there is no way to take it out again: make one in a fork

    @contextmanager
    def at(self, event: int, folder: Path) -> Iterator[None]:
        self.folder, self.left = folder, event
        try:
            yield
        finally:
            self.folder = None

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or (event not in EVENTS and event != "open"):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if str(arguments[0]).startswith(str(self.folder)):
            self.left -= 1
            if self.left < 0:
                raise Killed


@pytest.fixture(scope="module")
def folders(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Save]]:
    """Calibrations of one checkpoint, healed and not: what each leaves, and what saves it once more elsewhere."""
    root = tmp_path_factory.mktemp("calibrated")
    data, converted = noise_pictures(root, 16), convert(str(tiny_llava), output=root / "tiny-dpn").output
    found: dict[str, tuple[Path, Save]] = {}
    for name, recipe in {"healed": RECIPE.model_copy(update={"heal": HEAL}), "plain": RECIPE}.items():
        folder = Path(shutil.copytree(converted, root / name / "tiny-dpn"))
        saved: list[tuple[Any, ...]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "save_calibration", lambda *args, saved=saved: saved.append(args))
            calibration.calibrate(folder, DataOptions(str(data)), recipe)

        def save(where: Path, arguments: tuple[Any, ...] = saved[0][1:]) -> None:
            with calibration._in_charge(where, ALONE) as claim:
                assert claim is not None
                save_calibration(claim, *arguments)

        save(folder)
        found[name] = folder, save
    return found


def whole(folder: Path) -> tuple[Any, ...]:
    """What of a calibration can be mixed up: settings and budgets, routers, adapter."""
    checkpoint, _, pyramid = open_converted(folder)
    routers = [t for name, t in sorted(checkpoint.tensors.items()) if ".routers." in name]
    lora = Lora.of(folder, pyramid)
    adapter = {} if lora is None else digests(lora.folder)
    return pyramid, [b"".join(read_pieces(folder, tensor)) for tensor in routers], adapter


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        ("healed", "plain", 4),
        pytest.param("healed", "plain", 1, marks=pytest.mark.slow),
        pytest.param("plain", "healed", 1, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_file_events_leaves_the_old_or_the_new_calibration(
    folders: dict[str, tuple[Path, Save]], tmp_path: Path, before: str, after: str, step: int
) -> None:
    in_a_fork(lambda: kill_at_events(folders[before], folders[after], step, tmp_path))


def kill_at_events(before: tuple[Path, Save], after: tuple[Path, Save], step: int, tmp_path: Path) -> None:
    (source, save_again), (wanted, save) = before, after
    old, new = whole(source), whole(wanted)
    executioner, seen = Executioner(), []
    for event in range(0, 100, step):
        folder = Path(shutil.copytree(source, tmp_path / str(event) / "tiny-dpn"))
        try:
            with executioner.at(event, folder):
                save(folder)
        except Killed:
            state = whole(folder)
            assert state in (old, new)
            seen.append(state == new)
            back = Path(shutil.copytree(folder, tmp_path / str(event) / "back"))
            for where, rerun, undisturbed in (folder, save, wanted), (back, save_again, source):
                rerun(where)
                assert digests(where) == digests(undisturbed), "what a killed one left is swept, or made again"
                assert not list(where.rglob(".*"))
        else:
            break
    assert len(seen) > 15 / step and seen == sorted(seen), "old until one moment, new from it on"
    assert {False, True} == set(seen)


def test_an_export_in_the_middle_of_saving_is_whole(
    folders: dict[str, tuple[Path, Save]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source, _), (_, save) = folders["healed"], folders["plain"]
    folder = Path(shutil.copytree(source, tmp_path / "tiny-dpn"))
    expected = digests(export(folder, tmp_path / "expected" / "out").output)
    write = exporting.write_weights

    def late(*args: Any) -> None:
        save(folder)
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_weights", late)
        assert digests(export(folder, tmp_path / "out").output) == expected
    assert len(list((folder / GENERATIONS).iterdir())) == 2, "what is read is not swept"
    save(folder)
    assert len(list((folder / GENERATIONS).iterdir())) == 1


def test_a_calibration_of_an_earlier_version_is_replaced_whole(
    folders: dict[str, tuple[Path, Save]], tmp_path: Path
) -> None:
    """Its routers and its adapter are where conversion put the first, and in `calibration/adapter`."""
    (source, _), (wanted, save) = folders["healed"], folders["plain"]
    folder = Path(shutil.copytree(source, tmp_path / "tiny-dpn"))
    config = json.loads((folder / "config.json").read_text())
    generation = folder / Path(config.pop(WEIGHTS_KEY)).parent
    (generation / "adapter").rename(folder / "calibration" / "adapter")
    for name in ("dpe.safetensors", "model.safetensors.index.json"):
        text = (generation / name).read_bytes().replace(f"{generation.relative_to(folder)}/".encode(), b"")
        (folder / name).write_bytes(text)
    shutil.rmtree(generation.parent)
    config["pyramid"]["calibration"]["adapter"] = "calibration/adapter"
    (folder / "config.json").write_text(json.dumps(config))
    assert whole(folder)[1:] == whole(source)[1:]
    assert load_model(folder).is_adapted
    save(folder)
    assert digests(folder) == digests(wanted)


def test_a_sweep_leaves_what_is_not_calibrations(folders: dict[str, tuple[Path, Save]], tmp_path: Path) -> None:
    source, save = folders["plain"]
    folder = Path(shutil.copytree(source, tmp_path / "tiny-dpn"))
    for name in (
        "notes.txt", "calibration/notes.txt", "dpe-notes.safetensors", "calibration/state/notes.txt",
        "calibration/adapter/notes.txt", "calibration/generations/notes.txt", "calibration/generations/mine/notes.txt",
        ".config.json.1.tmp", "calibration/.report.json.1.tmp", ".calibration.lock",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    before = digests(folder)
    save(folder)
    assert digests(folder) == before


def test_links_are_not_followed(folders: dict[str, tuple[Path, Save]], tmp_path: Path) -> None:
    source, save = folders["plain"]
    mine = tmp_path / "mine"
    (mine / "generations" / "old").mkdir(parents=True)
    for link, target in {"calibration": mine, "calibration/generations": mine / "generations"}.items():
        folder = Path(shutil.copytree(source, tmp_path / link / "tiny-dpn"))
        shutil.rmtree(folder / link)
        (folder / link).symlink_to(target)
        with pytest.raises(CheckpointError, match="is a symbolic link out of its folder"):
            save(folder)
    folder = Path(shutil.copytree(source, tmp_path / "lock" / "tiny-dpn"))
    (tmp_path / "secret").write_text("mine")
    (folder / ".calibration.dpn").mkdir()
    (folder / ".calibration.dpn" / "lock").symlink_to(tmp_path / "secret")
    with pytest.raises(DpnError, match="is a symbolic link, through which dpn does not write"):
        save(folder)
    (folder / ".calibration.dpn" / "lock").unlink()
    (folder / ".calibration.dpn" / "notes.txt").write_text("mine")
    with pytest.raises(DpnError, match="move it elsewhere"):
        save(folder)
    assert (mine / "generations" / "old").is_dir() and (tmp_path / "secret").read_text() == "mine"
    assert (folder / ".calibration.dpn" / "notes.txt").read_text() == "mine"


def test_names_that_lead_out_of_the_folder_are_refused(folders: dict[str, tuple[Path, Save]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["healed"][0], tmp_path / "tiny-dpn"))
    config = json.loads((folder / "config.json").read_text())
    for name in ("../other/model.safetensors", "/etc/model.safetensors", "model.bin", 3):
        (folder / "config.json").write_text(json.dumps(config | {WEIGHTS_KEY: name}))
        with pytest.raises(CheckpointError, match=f"has the {WEIGHTS_KEY} .*expected a file in that folder"):
            open_converted(folder)
    config["pyramid"]["calibration"]["adapter"] = "../adapter"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"names '\.\./adapter' as its adapter"):
        load_model(folder)


@pytest.fixture
def busy(folders: dict[str, tuple[Path, Save]], tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A checkpoint that another process is calibrating, and its number."""
    folder = Path(shutil.copytree(folders["plain"][0], tmp_path / "tiny-dpn"))
    script = (
        "import sys; from pathlib import Path\n"
        "from dpn_cli.checkpoint.locks import in_use; from dpn_cli.checkpoint.workplace import workplace\n"
        "folder = Path(sys.argv[1])  # what `calibrating` does, which imports torch\n"
        "with in_use(folder), workplace(folder / 'calibration', '', ''):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), "dpn", "--quiet", "calibrate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield folder, process.pid
    process.communicate()


def test_a_checkpoint_that_is_being_calibrated_is_left_alone(
    busy: tuple[Path, int], tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pid = busy
    before = digests(folder)
    assert cli.main(["calibrate", "--model", str(folder), "--data", "demo", "--force"]) == 2
    by = rf"process {pid} \(dpn calibrate, since \d\d:\d\d\): "
    refusal = rf"Error: {folder} is being calibrated by {by}wait for it, or stop it"
    assert re.search(refusal, capsys.readouterr().err)
    for line in (["convert", str(tiny_llava)], ["export", "--model", str(folder.parent / "other-dpn")]):
        if line[0] == "export":
            shutil.copytree(folder, folder.parent / "other-dpn")
        assert cli.main([*line, "--force", "-o", str(folder)]) == 2
        assert re.search(f"Error: {folder} is in use by {by}wait for it to finish, or stop it", capsys.readouterr().err)
    assert digests(folder) == before
    assert cli.main(["export", "--model", str(folder), "-o", str(tmp_path / "out")]) == 0, "it may be read"


def test_a_folder_that_is_being_replaced_is_not_read(
    folders: dict[str, tuple[Path, Save]], tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpn_cli.conversion import convert as conversion

    folder = Path(shutil.copytree(folders["plain"][0], tmp_path / "tiny-dpn"))
    write = conversion._write

    def meanwhile(*args: Any) -> Any:
        for act in (load_model, lambda folder: export(folder, tmp_path / "out"), folders["plain"][1]):
            with pytest.raises(UsageError, match="is being replaced by another run"):
                act(folder)
        return write(*args)

    monkeypatch.setattr(conversion, "_write", meanwhile)
    convert(str(tiny_llava), output=folder, force=True)
    assert not open_converted(folder)[2].budgets


@pytest.mark.parametrize("fault", [errno.ENOLCK, errno.ENOSYS])
def test_where_there_are_no_locks_all_else_works(
    folders: dict[str, tuple[Path, Save]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    (source, _), (wanted, save) = folders["healed"], folders["plain"]
    folder = Path(shutil.copytree(source, tmp_path / "tiny-dpn"))

    def refuse(*_: Any) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with in_use(folder):
        export(folder, tmp_path / "out")
        save(folder)
    assert digests(folder) == digests(wanted)


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    folders: dict[str, tuple[Path, Save]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(folders["plain"][0], tmp_path / "tiny-dpn"))
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(DpnError, match=r"tiny-dpn cannot be written \(Read-only file system\)"), calibrating(folder):
        pass
    assert load_model(folder).pyramid.budgets, "reading needs no lock file"


def test_what_was_never_calibrated_is_not_swept(tiny_llava: Path, tmp_path: Path) -> None:
    folder = convert(str(tiny_llava), output=tmp_path / "tiny-dpn").output
    before = digests(folder)
    with calibrating(folder) as claim:
        sweep(claim)
    assert digests(folder) == before
