"""What a user says about an export, apart from the checkpoint and the output."""

from dataclasses import dataclass

from dpn_cli.exporting.quantise import Scheme

DEFAULT_SHARD_SIZE = "2GB"


@dataclass(frozen=True)
class ExportOptions:
    """What an export holds, and what is checked.

    Attributes:
        dtype: `bf16`, `fp16` or `fp32` for all floating-point tensors but the routers', which stay float32; None
            leaves every tensor as it is, byte for byte.
        max_shard_size: the largest size of a file, as `2GB` or `500MB`, or in bytes.
        budget: mean fraction of the original's prefill FLOPs to spend; None keeps what calibration chose.
        quantize: `int8` or `nf4` for the decoder's linear layers (bitsandbytes).
        static: a fixed route for every sample, in place of the routers (which stay for a gate, where there is one):
            an expert or its index per site, such as `keep,pool:1x2,exit` or `0,1,2`; or a method of the literature with
            its settings, such as `pyramiddrop:0.5`, which runs on the original's weights.
        drop_unused: whether to leave out the vision layers after the one whose features are used.
        check_values: whether to stop at NaN and infinite values.
        verify: whether to read the tensors that no option changes back from the disk and compare them with the source.
        uncalibrated: whether to export even if the routers are not calibrated, and so all tokens are kept.
    """

    dtype: str | None = None
    max_shard_size: str = DEFAULT_SHARD_SIZE
    budget: float | None = None
    quantize: Scheme | None = None
    static: str | None = None
    drop_unused: bool = False
    check_values: bool = True
    verify: bool = False
    uncalibrated: bool = False


DEFAULTS = ExportOptions()
