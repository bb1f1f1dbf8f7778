"""Writing a calibration into its checkpoint's folder in one step; the base weights are not touched.

What a calibration makes is a generation: a folder of its own, named by its content, which config.json names. So a
reader, whatever moment it comes at, and whatever moment a writer is killed at, finds the old calibration or the new
one: config.json, which is replaced last, decides, and what it does not name is swept.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from dpn_cli.calibration.reporting.html import render
from dpn_cli.calibration.reporting.report import Report
from dpn_cli.checkpoint.earlier import keep_earlier
from dpn_cli.checkpoint.headers import INDEX_FILE, WEIGHTS_KEY, Checkpoint, check_folder, read_config, read_header
from dpn_cli.checkpoint.layout import DPE_FILE
from dpn_cli.checkpoint.locks import Use, in_use
from dpn_cli.checkpoint.lora import CONFIG_FILE, WEIGHTS_FILE
from dpn_cli.checkpoint.staging import sync_entry, sync_folder
from dpn_cli.checkpoint.workplace import workplace
from dpn_cli.checkpoint.writer import replace_file, write_index, write_json
from dpn_cli.errors import CheckpointError
from dpn_cli.inference.adapter import save_adapter
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import ADAPTER_KEY, FITTED_PARTS, PyramidConfig

CALIBRATION = Path("calibration")
GENERATIONS = CALIBRATION / "generations"
REPORT_FILE = CALIBRATION / "report.json"
PAGE_FILE = CALIBRATION / "report.html"

_ADAPTER = "adapter"
_ADAPTER_FILES = {CONFIG_FILE, WEIGHTS_FILE}


@dataclass(frozen=True)
class Claim:
    """A checkpoint that this run alone calibrates.

    Attributes:
        folder: the checkpoint's folder.
        work: a folder for what is unfinished.
        use: the lock on the folder, which readers share.
    """

    folder: Path
    work: Path
    use: Use


@contextmanager
def calibrating(folder: Path) -> Iterator[Claim]:
    """Keep other calibrations of a checkpoint, and whoever would replace it, away; others may read it.

    Raises:
        UsageError: if another run calibrates or replaces it.
        DpnError: if it cannot be written.
        CheckpointError: if it is no checkpoint, or what calibration writes would follow a link.
    """
    check_folder(folder)
    refusal = f"{folder} is being calibrated by " + "{holder}: wait for it, or stop it"
    with in_use(folder) as use, workplace(folder / CALIBRATION, refusal, "copy it to where it can") as work:
        yield Claim(folder, work, use)


def save_calibration(claim: Claim, model: PyramidGenerationMixin, report: Report) -> None:
    """Store a model's routers, predictors and adapter, the settings of its pyramid, and the report.

    Raises:
        CheckpointError: if the folder has no DPE tensors.
    """
    page, config, calibration = render(report), read_config(claim.folder), report.summary()
    (claim.folder / GENERATIONS).mkdir(parents=True, exist_ok=True)
    generation = _write_generation(claim, config, model)
    calibration |= {ADAPTER_KEY: (generation / _ADAPTER).as_posix()} if model.is_adapted else {}
    config |= {WEIGHTS_KEY: (generation / INDEX_FILE).as_posix()}
    _commit(claim, config, replace(model.pyramid, calibration=calibration), report, page)


def save_budgets(claim: Claim, model: PyramidGenerationMixin, report: Report) -> None:
    """Store the settings of a model's pyramid, and the report; its weights stay.

    Copies of the files that change are kept, so that they can be put back.
    """
    folder, page = claim.folder, render(report)
    (folder / CALIBRATION).mkdir(exist_ok=True)
    replaced = (folder / name for name in ("config.json", REPORT_FILE, PAGE_FILE))
    keep_earlier(replaced, folder / CALIBRATION, claim.work)
    _commit(claim, read_config(folder), replace(model.pyramid, calibration=report.summary()), report, page)


def _commit(claim: Claim, config: dict[str, Any], pyramid: PyramidConfig, report: Report, page: str) -> None:
    """Replace config.json, and then the report."""
    config |= {"pyramid": pyramid.to_dict()}
    _replace(claim, Path("config.json"), lambda path: write_json(path, config))
    _replace(claim, REPORT_FILE, lambda path: write_json(path, report.to_dict()))
    _replace(claim, PAGE_FILE, lambda path: path.write_text(page, encoding="utf-8"))


def sweep(claim: Claim) -> None:
    """Remove what config.json does not name any more: earlier generations, and what came before the first.

    Nothing else is touched, whatever its name. What cannot be removed does no harm, and stays.
    """
    folder = claim.folder
    current = Path(read_config(folder).get(WEIGHTS_KEY, INDEX_FILE)).parent
    if current.parent != GENERATIONS:
        return
    generations = (path for path in (folder / GENERATIONS).iterdir() if path.name != current.name)
    stale = [path for path in generations if _holds_only(path, {INDEX_FILE, DPE_FILE}, _ADAPTER)]
    stale += [path for path in [folder / CALIBRATION / _ADAPTER] if _holds_only(path, _ADAPTER_FILES)]
    for path in (*stale, folder / INDEX_FILE, folder / DPE_FILE):
        with suppress(OSError):
            path.replace(claim.work / path.name)  # at once: half a generation must not look like a whole one


def _holds_only(folder: Path, files: set[str], adapter: str | None = None) -> bool:
    """Say whether a folder is there that holds no other files than these, but for those of an adapter in its folder."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    others = {path.name for path in folder.iterdir()} - files
    return not others or (others == {adapter} and _holds_only(folder / _ADAPTER, _ADAPTER_FILES))


def _write_generation(claim: Claim, config: dict[str, Any], model: PyramidGenerationMixin) -> Path:
    """Write routers, predictors, index and adapter; return where they are, inside the checkpoint's folder."""
    folder, stage = claim.folder, claim.work / "generation"
    source = Checkpoint.open(folder, config)
    stage.mkdir()
    file, tensors = _with_fitted(source, model.text_model.routers, model.text_model.predictors)
    (stage / DPE_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    if model.is_adapted:
        save_adapter(model, stage / _ADAPTER)
    generation = GENERATIONS / _digest(stage)
    base = [tensor for tensor in source.tensors.values() if tensor.file != file]
    write_index(stage, [*base, *read_header(stage / DPE_FILE, (generation / DPE_FILE).as_posix()).values()])
    sync_folder(stage)
    if not (folder / generation).is_dir():  # else an earlier calibration had the very same result
        stage.rename(folder / generation)
    sync_entry(folder / GENERATIONS)
    return generation


def _with_fitted(source: Checkpoint, routers: nn.ModuleList, predictors: nn.ModuleDict) -> tuple[str, dict[str, Any]]:
    """Return the shard that the pyramid's tensors are in, and its tensors with what calibration has fitted.

    Raises:
        CheckpointError: if there is no such shard.
    """
    [file] = {tensor.file for tensor in source.tensors.values() if Path(tensor.file).name == DPE_FILE} or [None]
    tensors = {} if file is None else load_file(source.path / file)
    stored = [name for name in tensors if ".routers." in name]
    if not stored:
        raise CheckpointError(f"{source.path} has no {DPE_FILE} with routers: convert it again")
    prefix, dtype = stored[0].partition("routers.")[0], tensors[stored[0]].dtype
    tensors = {name: tensor for name, tensor in tensors.items() if ".poolers." in name}
    for part, fitted in zip(FITTED_PARTS, (routers, predictors), strict=True):
        for name, parameter in fitted.state_dict(prefix=f"{prefix}{part}.").items():
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


def _replace(claim: Claim, file: Path, write: Any) -> None:
    """Replace a file of the checkpoint."""
    path = claim.folder / file
    replace_file(path, write, claim.work)
    sync_entry(path.parent)
