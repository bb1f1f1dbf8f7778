"""Writing a calibration into its checkpoint's folder: each file whole or not at all, the base weights untouched."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from dpn_cli.calibration.html import render
from dpn_cli.calibration.report import Report
from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.layout import DPE_FILE
from dpn_cli.checkpoint.writer import replace_file, write_json
from dpn_cli.errors import CheckpointError
from dpn_cli.modeling.pyramid_config import PyramidConfig

REPORT_FILE = Path("calibration", "report.json")
PAGE_FILE = Path("calibration", "report.html")


def save_calibration(folder: Path, routers: nn.ModuleList | None, pyramid: PyramidConfig, report: Report) -> None:
    """Store fitted routers, the pyramid's new settings and the report.

    A reader finds the old routers with the old settings, or the new routers: the settings follow last.

    Args:
        folder: of the checkpoint.
        routers: None where they stay as they are.
        pyramid: with the new settings.
        report: on them.

    Raises:
        CheckpointError: if the folder's DPE tensors are not those of these routers.
    """
    tensors = {} if routers is None else _with_routers(folder, routers)
    config = {**read_json(folder / "config.json"), "pyramid": pyramid.to_dict()}
    page = render(report)
    (folder / REPORT_FILE).parent.mkdir(exist_ok=True)
    if tensors:
        replace_file(folder / DPE_FILE, lambda path: path.write_bytes(save(tensors, metadata={"format": "pt"})))
    replace_file(folder / REPORT_FILE, lambda path: write_json(path, report.to_dict()))
    replace_file(folder / PAGE_FILE, lambda path: path.write_text(page, encoding="utf-8"))
    replace_file(folder / "config.json", lambda path: write_json(path, config))


def _with_routers(folder: Path, routers: nn.ModuleList) -> dict[str, torch.Tensor]:
    """Return the folder's DPE tensors with those of these routers."""
    tensors = load_file(folder / DPE_FILE)
    for name, parameter in routers.state_dict(prefix="routers.").items():
        [stored] = [key for key in tensors if key.endswith(f".{name}")] or [None]
        if stored is None or tensors[stored].shape != parameter.shape:
            raise CheckpointError(f"{folder / DPE_FILE} does not hold {name} of these routers: convert the model again")
        tensors[stored] = parameter.detach().to("cpu", tensors[stored].dtype).contiguous()
    return tensors
