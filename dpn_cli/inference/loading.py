"""Opening converted and exported checkpoints, with nothing left to chance."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoProcessor, ProcessorMixin
from transformers.utils import logging

from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.layout import LlavaLayout, open_converted, open_llava
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.checkpoint.panics import no_panic
from dpn_cli.checkpoint.processor import complete_processor
from dpn_cli.checkpoint.side_files import without_code
from dpn_cli.errors import CheckpointError
from dpn_cli.inference.adapter import hush_bitsandbytes, load_adapter
from dpn_cli.inference.onevision_processor import OnevisionImages
from dpn_cli.modeling.code import MODEL_CLASSES
from dpn_cli.modeling.configuration import DpnLlavaOnevisionConfig
from dpn_cli.modeling.families import MODELS
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import FITTED_PARTS, PyramidConfig


def register() -> None:
    """Teach transformers' Auto classes our model types."""
    for config, model in MODELS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model.inner_class, exist_ok=True)
        for name in MODEL_CLASSES:
            getattr(transformers, name).register(config, model, exist_ok=True)


def load_model(
    folder: Path, dtype: str | torch.dtype = "auto", healed: bool = True, **kwargs: Any
) -> PyramidGenerationMixin:
    """Load a converted or exported checkpoint, in eval mode.

    Args:
        folder: the checkpoint folder.
        dtype: `auto` for the checkpoint's own, or a torch dtype or its name; routers stay float32.
        healed: whether to load the adapter too, if the checkpoint was healed.
        **kwargs: arguments of `from_pretrained`, such as `device_map` and `attn_implementation`.

    Raises:
        CheckpointError: if it is missing, damaged or not converted, or its tensors are not exactly the model's.
        MissingExtraError: if it was healed and peft is not installed.
    """
    with in_use(folder):
        source, _, pyramid = open_converted(folder)
        return load_opened(source, pyramid, dtype, healed, **kwargs)


def load_opened(
    source: Checkpoint, pyramid: PyramidConfig, dtype: str | torch.dtype = "auto", healed: bool = True, **kwargs: Any
) -> PyramidGenerationMixin:
    """Load a checkpoint as it was when it was opened, whatever is calibrated meanwhile; see `load_model`."""
    folder, config = source.path, without_code(source.config)
    config_class, model_class = model_classes(source.config)
    if "quantization_config" in config:
        hush_bitsandbytes()
        if dtype != "auto":  # else 4-bit layers compute in the one that they were stored from
            compute = {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
            config = config | {"quantization_config": config["quantization_config"] | compute}
    with quietly():
        model, info = model_class.from_pretrained(
            folder,
            config=config_class.from_dict(config),
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are reported below
            output_loading_info=True,
            **kwargs,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[what])):
            raise CheckpointError(
                f"{folder} has {len(keys)} {what.replace('_', ' ')}, such as {keys[0]}: its tensors are not those of "
                "the model in config.json; convert it again"
            )
    if "quantization_config" in config and dtype != "auto":
        _cast_unquantised(model, dtype)
    if healed and (lora := Lora.of(folder, pyramid)):
        load_adapter(model, lora)
    return model.eval()


def _cast_unquantised(model: PyramidGenerationMixin, dtype: str | torch.dtype) -> None:
    """Give what is not quantised a dtype, which transformers leaves as it is stored beside quantised weights."""
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, parameter in model.named_parameters():
        is_fitted = any(part in name.split(".") for part in FITTED_PARTS)  # those stay in float32
        if parameter.is_floating_point() and not is_fitted:
            parameter.data = parameter.data.to(wanted)


def load_processor(folder: Path) -> Any:
    """Load the processor of a checkpoint, complete; code that it may bring along is never run.

    Raises:
        CheckpointError: if it is missing, damaged or another model's, or needs such code.
    """
    return load_opened_processor(*open_llava(folder))


def load_opened_processor(checkpoint: Checkpoint, layout: LlavaLayout) -> Any:
    """Load the processor of a checkpoint that is open already; see `load_processor`."""
    completion = complete_processor(checkpoint, layout)
    try:
        with completion.applied(checkpoint.path) as complete, no_panic():
            return build_processor(complete, checkpoint.config["model_type"])
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path} has no processor that transformers loads without foreign code "
            f"({type(error).__name__}): convert the model again from a folder that has its tokenizer and processor "
            "files"
        ) from error


def build_processor(folder: Path, model_type: str) -> Any:
    """Build the processor of a folder where nothing is missing; transformers raises what it likes."""
    onevision = model_type == DpnLlavaOnevisionConfig.model_type
    processor = (OnevisionImages if onevision else AutoProcessor).from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if not isinstance(processor, ProcessorMixin):  # of a class that it does not know, transformers loads a part
        raise TypeError(f"{type(processor).__name__} is not a processor")
    if processor.tokenizer.pad_token is None:  # where a vocabulary is read by its own library alone
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def max_positions(source: Checkpoint) -> int:
    """Return how many tokens the language model of a checkpoint takes, also where its config leaves it to a default."""
    config_class, _ = model_classes(source.config)
    return int(config_class.from_dict(source.config).get_text_config().max_position_embeddings)


def model_classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the classes of a converted checkpoint's config and model."""
    [classes] = [each for each in MODELS.items() if each[0].model_type == config["model_type"]]
    return classes


def default_device() -> str:
    """Return where a command runs a model: the first GPU, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def quietly() -> Iterator[None]:
    """Hold back transformers' load report and progress bar: what the report would say is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


register()
