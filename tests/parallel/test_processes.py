"""Several processes calibrate as one, end as one, and leave the writing and the speaking to the first."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from PIL import Image
from torch.distributed import TCPStore

from dpn_cli import cli
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import UsageError
from dpn_cli.parallel import child
from dpn_cli.parallel.launch import end_with_launcher, place
from dpn_cli.parallel.processes import ALONE, Processes
from tests.runs import DEADLOCK_S, FEW, digests, measured, noise_pictures, options, start, wait_for

LAUNCHED = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip
HEAL = ("heal.method=lora", "heal.steps=4", "heal.batch_size=2", "heal.gradient_accumulation=2", "heal.save_every=1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_pictures(tmp_path_factory.mktemp("pictures"), 20)


@pytest.fixture(scope="module")
def converted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(tiny_llava), output=tmp_path_factory.mktemp("converted") / "tiny-dpn").output


@pytest.fixture(scope="module")
def alone(converted: Path, pictures: Path) -> dict[str, str]:
    """What one process leaves."""
    folder = Path(shutil.copytree(converted, converted.with_name("alone")))
    run(arguments(folder, pictures))
    return digests(folder)


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(converted, tmp_path / name / "tiny-dpn"))


def arguments(folder: Path, data: Path | str, *settings: str) -> list[str]:
    line = ["calibrate", "--model", str(folder), "--data", str(data), "--budget", "0.6"]
    words = [word for each in settings for word in ("--set", f"calibration.{each}")]
    return [*line, *options({**FEW, "samples": 20, "batch_size": 2}), *words]


def run(line: list[str], expected: int = 0, **environment: str) -> tuple[str, str]:
    process = start(line, **environment)
    output, errors = process.communicate(timeout=DEADLOCK_S)
    assert process.returncode == expected, errors
    return output, errors


def machines(count: int) -> list[dict[str, str]]:
    """The environments of a process each on machines that share nothing."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    port = str(20_000 + os.getpid() % 10_000)
    return [{**shared, "MASTER_PORT": port, "RANK": str(i)} for i in range(count)]


def test_kept_pieces_are_taken_and_only_the_others_are_made() -> None:
    class Shelf(dict[int, str]):
        load, save = dict.get, dict.__setitem__

    shelf, made, taken = Shelf({1: "kept"}), [], {}

    def work(piece: int) -> str:
        made.append(piece)
        return f"made {piece}"

    ALONE.share(3, work, taken.__setitem__, shelf)
    assert made == [0, 2]
    assert taken == shelf == {0: "made 0", 1: "kept", 2: "made 2"}


def test_a_sharding_launcher_is_refused_with_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"asks for FSDP.*choose multi-GPU or multi-CPU"):
        Processes.join(print)


OTHERS_RANKS = {
    "a rank alone": {"RANK": "1"},
    "a rank of two": {"RANK": "1", "WORLD_SIZE": "2"},
    "a pod of a cluster": {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    "no meeting place": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    "a rank beyond the size": {**LAUNCHED, "RANK": "2"},
    "a rank that is no number": {**LAUNCHED, "RANK": "one"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    "another mpirun": {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"},
}


@pytest.mark.parametrize("environment", OTHERS_RANKS.values(), ids=OTHERS_RANKS)
def test_a_rank_that_no_launcher_of_ours_gave_is_nothing_to_us(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place() == (0, 1)
    assert Processes.join(print) == ALONE


def test_a_launchers_place_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert place() == (1, 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert place() == (0, 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # as of `accelerate launch --mpirun_hostfile`
    for name, value in OTHERS_RANKS["mpirun"].items():
        monkeypatch.setenv(name, value)
    assert place() == (1, 2)


def finding(folder: Path) -> dict[str, str]:
    """An environment in which the modules of a folder are found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """A kill -9 of the parent, too, which can tell nobody."""
    (tmp_path / "endless.py").write_text("import time; print('begun', flush=True); time.sleep(1000)")
    script = (
        "import subprocess, time; from dpn_cli.parallel import child\n"
        "subprocess.Popen(child.command('endless'), start_new_session=True); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=finding(tmp_path))
    assert parent.stdout is not None
    assert parent.stdout.readline() == "begun\n"
    parent.kill()
    assert parent.stdout.read() == "", "the child, which has this pipe too, is gone"


def test_a_child_whose_parent_is_gone_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("print('begun')")
    line = child.command("module")
    line[line.index(str(os.getpid()))] = "1"
    done = subprocess.run(line, capture_output=True, check=False, env=finding(tmp_path))
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def test_only_launchers_that_wait_for_their_processes_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was placed by hand may outlive its shell."""
    ended: list[int] = []
    monkeypatch.setattr(child, "end_with", ended.append)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    end_with_launcher()
    assert ended == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    end_with_launcher()
    assert ended == [os.getppid()]
    monkeypatch.delenv("RANK")
    end_with_launcher()
    assert ended == [os.getppid()], "alone, there is nobody to end with"


def test_waiting_for_others_answers_signals_and_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ended: list[str] = []

    def meet() -> None:
        """Wait inside of C++, where Python handles no signal."""
        try:
            TCPStore("127.0.0.1", 0, world_size=2, is_master=True, timeout=timedelta(seconds=3))
        finally:
            ended.append("too late")

    def say(message: str) -> None:
        said.append(message)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("dpn_cli.parallel.processes.EXCHANGE_NOTICE_S", 0.1)
    with pytest.raises(KeyboardInterrupt):
        Processes(0, 2, say)._exchange(meet)
    assert said == ["Waiting: process 0 of 2 has done its share, and waits for those of the others."]
    assert ended == []


@pytest.mark.parametrize("line", [["convert", "nowhere"], ["export", "--model", "nowhere"]])
def test_commands_that_share_no_work_speak_in_every_process(line: list[str]) -> None:
    assert run(line, 3, **LAUNCHED)[1].startswith("Error: nowhere")


@pytest.mark.parametrize("environment", [OTHERS_RANKS["a rank alone"], pytest.param(LAUNCHED, marks=pytest.mark.slow)])
def test_an_error_that_no_other_process_says_is_said(environment: dict[str, str]) -> None:
    """The others cannot know of it: the processes have not met yet."""
    assert "0<x<=1" in run(["calibrate", "--data", "demo", "--budget", "2"], 2, **environment)[1]
    impossible = {**environment, "ACCELERATE_USE_FSDP": "true"}
    if environment is LAUNCHED:
        assert "asks for FSDP" in run(["calibrate", "--data", "demo", "--model", "nowhere"], 2, **impossible)[1]


def test_an_error_that_all_processes_have_is_said_once() -> None:
    output, errors = run(["calibrate", "--data", "demo", "--model", "nowhere", "--num-processes", "2"], 3)
    assert output == "" and errors.count("Error") == 1 and errors.startswith("Error: nowhere"), errors


def test_more_processes_than_forward_passes_are_refused(
    copy: Callable[[str], Path], pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Processes, "join", lambda say: Processes(0, 3))
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value])
    assert cli.main(arguments(copy("one"), pictures, *HEAL)) == 2
    assert "3 processes cannot share the 2 forward passes of a training step" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_calibrate_the_demo_as_one_does(tmp_path: Path) -> None:
    one = convert("demo", output=tmp_path / "one").output
    two = Path(shutil.copytree(one, tmp_path / "two"))
    few = ("samples=24", "routes=6", "batch_size=4", "epochs=20")
    run(arguments(one, "demo", *few))
    output, errors = run([*arguments(two, "demo", *few), "--num-processes", "2", "--json"])
    assert "; 2 processes" in errors and errors.count("measuring routes") == 1
    assert output.startswith("{")
    assert digests(one) == digests(two)


@pytest.mark.slow
def test_two_processes_heal_as_one_does(copy: Callable[[str], Path], pictures: Path) -> None:
    one, two = copy("one"), copy("two")
    run(arguments(one, pictures, *HEAL))
    run([*arguments(two, pictures, *HEAL), "--num-processes", "2"])
    assert len(list((one / "calibration" / "generations").glob("*/adapter"))) == 1
    assert digests(one) == digests(two)


@pytest.mark.slow
def test_two_machines_need_not_share_a_disk(copy: Callable[[str], Path], pictures: Path, alone: dict[str, str]) -> None:
    folders = [copy("first"), copy("second")]
    before = digests(folders[1])
    processes = [start(arguments(folder, pictures), **each) for folder, each in zip(folders, machines(2), strict=True)]
    assert [process.wait(DEADLOCK_S) for process in processes] == [0, 0]
    assert digests(folders[0]) == alone
    assert digests(folders[1]) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "code", "sentence"),
    [
        (lambda path: path.write_bytes(b"no image"), 4, "process 1: {data}: 1 of 20 rows read are bad: row 4: image "),
        (lambda path: Image.new("RGB", (48, 48)).save(path), 2, "process 1 has other values of data than the main "),
    ],
)
def test_an_error_of_one_machine_ends_all_with_one_sentence(
    copy: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    code: int,
    sentence: str,
) -> None:
    spoilt = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    spoil(spoilt / "03.png")
    processes = [
        start(arguments(copy(f"machine {i}"), data), **each)
        for i, (data, each) in enumerate(zip([pictures, spoilt], machines(2), strict=True))
    ]
    (_, errors), nothing = (process.communicate(timeout=DEADLOCK_S) for process in processes)
    assert [process.returncode for process in processes] == [code, code]
    assert nothing == ("", "")
    [error] = [line for line in errors.splitlines() if line.startswith("Error")]
    assert error.startswith("Error: " + sentence.format(data=spoilt)) and "Traceback" not in errors


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that a launcher has started, the main one first."""
    return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_process_goes_on_where_two_were_killed(
    copy: Callable[[str], Path], pictures: Path, alone: dict[str, str], killed: int
) -> None:
    folder = copy("killed")
    process = start([*arguments(folder, pictures), "--num-processes", "2"])
    wait_for(process, lambda: measured(folder, 2))
    everyone = children(process)
    os.kill(everyone[killed], signal.SIGKILL)
    _, errors = process.communicate(timeout=DEADLOCK_S)
    assert process.returncode == 1
    [error] = [line for line in errors.splitlines() if line.startswith("Error")]
    assert "run the same command" in error and "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in everyone)
    assert measured(folder, 2)
    run(arguments(folder, pictures))
    assert digests(folder) == alone


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_for_others_to_start_can_be_ended(
    copy: Callable[[str], Path], pictures: Path, number: int, index: int
) -> None:
    process = start(arguments(copy("waiting"), pictures), **machines(2)[index])
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith(f"Waiting: process {index} of 2 waits for the others to start, which meet at 127.0.0.1:")
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors.strip() == ("" if index else "Interrupted."), "the first one says it"


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_its_processes_along(
    copy: Callable[[str], Path], pictures: Path, alone: dict[str, str]
) -> None:
    folder = copy("orphans")
    process = start([*arguments(folder, pictures), "--num-processes", "2"])
    wait_for(process, lambda: measured(folder, 2))
    process.kill()
    process.communicate(timeout=10)  # to the end of the pipes, which are the children's too
    run(arguments(folder, pictures))
    assert digests(folder) == alone


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_all_processes(copy: Callable[[str], Path], pictures: Path, number: int) -> None:
    folder = copy("interrupted")
    process = start([*arguments(folder, pictures), "--num-processes", "2"])
    wait_for(process, lambda: measured(folder, 2))
    everyone = children(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLOCK_S)
    assert process.returncode == 130
    assert [line for line in errors.splitlines() if line][-2:] == [
        "Nothing that was measured is lost: run the same command line again to go on.",
        "Interrupted.",
    ]
    assert not any(Path(f"/proc/{pid}").exists() for pid in everyone)
