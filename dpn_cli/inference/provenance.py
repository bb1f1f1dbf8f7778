"""How figures came about: on what device, and with which versions."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from dpn_cli import __version__
from dpn_cli.modeling.wrapper import PyramidGenerationMixin

LIBRARIES = ("torch", "transformers")


def provenance(model: PyramidGenerationMixin, about: dict[str, str | None]) -> dict[str, str]:
    """Return what the head of a report says.

    Args:
        model: Model that was measured.
        about: What else is known, such as the data; what is not known is left out.
    """
    known = {"model": getattr(model.config, "base_model", None), **about}
    return {
        **{key: str(value) for key, value in known.items() if value is not None},
        "date": datetime.now(UTC).date().isoformat(),
        "device": in_words(model),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def in_words(model: PyramidGenerationMixin) -> str:
    """Return the device and the dtype of a model, for a reader."""
    threads = torch.get_num_threads()
    is_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if is_gpu else f"CPU, {threads} thread{'s' * (threads > 1)}"
    return f"{device}, {str(model.dtype).removeprefix('torch.')}"


def versions() -> dict[str, str]:
    """Return the versions of the packages that figures depend on."""
    return {"dpn-cli": __version__, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
