"""A LoRA adapter beside a checkpoint, and how its matrices go into the weights: W + scale · B·A. No model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_cli.checkpoint.headers import is_inside, read_header, read_json
from dpn_cli.errors import CheckpointError
from dpn_cli.pyramid.config import ADAPTER_KEY, PyramidConfig

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."  # what peft puts before the names of the model
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """An adapter in peft's format.

    Attributes:
        folder: the adapter's folder.
        rank: width of the matrices between.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: the names of the weights that it changes, as transformers 5 has them in memory.
    """

    folder: Path
    rank: int
    alpha: float
    targets: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Path, pyramid: PyramidConfig) -> "Lora | None":
        """Open the adapter that a converted checkpoint was healed with, or return None if it was not.

        Raises:
            CheckpointError: if the adapter is not there, not in the folder or not one of LoRA's.
        """
        if ADAPTER_KEY not in pyramid.calibration:
            return None
        named = pyramid.calibration[ADAPTER_KEY]
        if not is_inside(named):
            raise CheckpointError(f"{checkpoint} names {named!r} as its adapter: expected a folder inside it")
        return cls.open(checkpoint / named)

    @classmethod
    def open(cls, folder: Path) -> "Lora":
        """Read an adapter's header.

        Raises:
            CheckpointError: if it is not there or not one of LoRA's.
        """
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder / file} is missing, yet the checkpoint was healed: calibrate it again")
        config = read_json(folder / CONFIG_FILE)
        if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("use_rslora"):
            raise CheckpointError(f"{folder} holds an adapter that is not plain LoRA: calibrate the checkpoint again")
        down = {name: t.shape for name, t in read_header(folder / WEIGHTS_FILE).items() if name.endswith(_DOWN)}
        targets = frozenset(f"{name.removeprefix(_PREFIX).removesuffix(_DOWN)}.weight" for name in down)
        alpha, rank = config.get("lora_alpha"), config.get("r")
        if not isinstance(alpha, int | float) or type(rank) is not int or rank < 1:
            raise CheckpointError(f"{folder / CONFIG_FILE} has no lora_alpha and r: calibrate the checkpoint again")
        if any(shape[:1] != (rank,) for shape in down.values()):
            raise CheckpointError(f"{folder} has matrices whose rank is not its r, {rank}: calibrate again")
        return cls(folder, rank, alpha, targets)

    def merged(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """Return one of the target weights [out, in] with the adapter in it, in float32.

        Raises:
            CheckpointError: if the adapter has NaN or infinite values for it.
        """
        from safetensors import safe_open

        stem = _PREFIX + name.removesuffix(".weight")
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            down, up = (file.get_tensor(stem + part).float() for part in (_DOWN, _UP))
        if not (down.isfinite().all() and up.isfinite().all()):
            raise CheckpointError(
                f"{self.folder} has NaN or infinite values for {name}: calibrate the checkpoint again"
            )
        return weight.float().addmm(up, down, alpha=self.alpha / self.rank)


def without_adapter(calibration: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a calibration for a checkpoint whose weights hold the adapter."""
    return {key: value for key, value in calibration.items() if key != ADAPTER_KEY}
