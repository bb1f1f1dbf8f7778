"""Writing a calibration into its checkpoint's folder in one step; the base weights are not touched.

What a calibration makes is a generation: a folder of its own, named by its content, which config.json names. So a
reader, whatever moment it comes at, and whatever moment a writer is killed at, finds the old calibration or the new
one: config.json, which is replaced last, decides, and what it does not name is swept.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from dpn_cli.calibration.reporting.html import render
from dpn_cli.calibration.reporting.report import Report
from dpn_cli.checkpoint.headers import INDEX_FILE, WEIGHTS_KEY, Checkpoint, check_folder, read_config, read_header
from dpn_cli.checkpoint.layout import DPE_FILE
from dpn_cli.checkpoint.locks import Use, in_use, locked
from dpn_cli.checkpoint.lora import ADAPTER_KEY
from dpn_cli.checkpoint.staging import sync_entry, sync_folder
from dpn_cli.checkpoint.writer import replace_file, write_index, write_json
from dpn_cli.errors import CheckpointError
from dpn_cli.inference.adapter import save_adapter
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig

CALIBRATION = Path("calibration")
GENERATIONS = CALIBRATION / "generations"
REPORT_FILE = CALIBRATION / "report.json"
PAGE_FILE = CALIBRATION / "report.html"

_ADAPTER = "adapter"
_FIRST_FILES = (INDEX_FILE, DPE_FILE, CALIBRATION / _ADAPTER)  # of a conversion, or an earlier version's calibration


@contextmanager
def calibrating(folder: Path) -> Iterator[Use]:
    """Keep other calibrations of a checkpoint, and whoever would replace it, away; others may read it.

    Raises:
        UsageError: if another run calibrates or replaces it.
        DpnError: if it cannot be written.
        CheckpointError: if it is no checkpoint, or what calibration writes would follow a link.
    """
    check_folder(folder)
    refusal = f"{folder} is being calibrated by " + "{holder}: wait for it, or stop it"
    with in_use(folder) as use, locked(folder / CALIBRATION, refusal, "copy it to where it can"):
        yield use


def save_calibration(
    folder: Path, model: PyramidGenerationMixin, routers: nn.ModuleList | None, pyramid: PyramidConfig, report: Report
) -> None:
    """Store fitted routers, the adapter that the model has, the pyramid's new settings and the report.

    Args:
        folder: The checkpoint's folder.
        routers: None where they stay as they are.
        pyramid: Pyramid with the new settings.
        report: Report on the calibration.

    Raises:
        CheckpointError: if the folder has no DPE tensors.
    """
    page = render(report)
    config = read_config(folder)
    calibration = report.summary()
    if routers is not None:
        generation = _write_generation(Checkpoint.open(folder, config), model if model.is_adapted else None, routers)
        calibration |= {ADAPTER_KEY: (generation / _ADAPTER).as_posix()} if model.is_adapted else {}
        config |= {WEIGHTS_KEY: (generation / INDEX_FILE).as_posix()}
    config |= {"pyramid": replace(pyramid, calibration=calibration).to_dict()}
    (folder / GENERATIONS).mkdir(parents=True, exist_ok=True)
    _replace(folder, Path("config.json"), lambda path: write_json(path, config))
    _replace(folder, REPORT_FILE, lambda path: write_json(path, report.to_dict()))
    _replace(folder, PAGE_FILE, lambda path: path.write_text(page, encoding="utf-8"))


def sweep(folder: Path) -> None:
    """Remove what config.json does not name: earlier generations, and what killed calibrations left.

    What cannot be removed does no harm, and stays.
    """
    current = Path(read_config(folder).get(WEIGHTS_KEY, INDEX_FILE)).parent
    if current.parent != GENERATIONS:
        return
    stale = [path for path in (folder / GENERATIONS).iterdir() if path.name != current.name]
    for path in (*stale, *(folder / file for file in _FIRST_FILES)):
        with suppress(OSError):
            path.replace(_empty_stage(folder))  # at once: half a generation must not look like a whole one
    _empty_stage(folder)


def _write_generation(source: Checkpoint, adapted: PyramidGenerationMixin | None, routers: nn.ModuleList) -> Path:
    """Write routers, index and adapter; return where they are, inside the checkpoint's folder."""
    folder = source.path
    stage = _empty_stage(folder)
    stage.mkdir(parents=True)
    try:
        file, tensors = _with_routers(source, routers)
        (stage / DPE_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        if adapted is not None:
            save_adapter(adapted, stage / _ADAPTER)
        generation = GENERATIONS / _digest(stage)
        base = [tensor for tensor in source.tensors.values() if tensor.file != file]
        write_index(stage, [*base, *read_header(stage / DPE_FILE, (generation / DPE_FILE).as_posix()).values()])
        sync_folder(stage)
        if not (folder / generation).is_dir():  # else an earlier calibration had the very same result
            stage.rename(folder / generation)
        sync_entry(folder / GENERATIONS)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return generation


def _empty_stage(folder: Path) -> Path:
    """Return the path of what a generation is made in, or removed from, with nothing there."""
    stage = folder / GENERATIONS / "stage"
    if stage.is_dir() and not stage.is_symlink():
        shutil.rmtree(stage, ignore_errors=True)
    else:
        stage.unlink(missing_ok=True)
    return stage


def _with_routers(source: Checkpoint, routers: nn.ModuleList) -> tuple[str, dict[str, Any]]:
    """Return the shard that the pyramid's tensors are in, and its tensors with the routers' new values.

    Raises:
        CheckpointError: if there is no such shard.
    """
    [file] = {tensor.file for tensor in source.tensors.values() if Path(tensor.file).name == DPE_FILE} or [None]
    tensors = {} if file is None else load_file(source.path / file)
    stored = [name for name in tensors if ".routers." in name]
    if not stored:
        raise CheckpointError(f"{source.path} has no {DPE_FILE} with routers: convert it again")
    prefix, dtype = stored[0].partition("routers.")[0], tensors[stored[0]].dtype
    for name in stored:
        del tensors[name]
    for name, parameter in routers.state_dict(prefix=f"{prefix}routers.").items():
        tensors[name] = parameter.detach().to("cpu", dtype).contiguous()
    return str(file), tensors


def _digest(folder: Path) -> str:
    """Return a short digest of the files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()[:16]


def _replace(folder: Path, file: Path, write: Any) -> None:
    """Replace a file of the checkpoint; what a kill leaves of it is among the generations, which are swept."""
    replace_file(folder / file, write, folder / GENERATIONS)
    sync_entry((folder / file).parent)
