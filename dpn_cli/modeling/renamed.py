"""Names that transformers changed between the releases that are supported."""

import inspect

from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.utils import output_capturing

_MASK_OPTIONS = inspect.signature(create_causal_mask).parameters

CACHE = "cache" if "cache" in _MASK_OPTIONS else "past_key_values"
"""What arguments and outputs call the KV cache: `cache` since 5.24, `past_key_values` before."""

_OLD, _NEW = "gradient_checkpointing", "activation_checkpointing"
CHECKPOINTING = _NEW if hasattr(PreTrainedModel, f"{_NEW}_enable") else _OLD
"""What the names of the methods begin with that let layers recompute their activations, `_enable` and `_disable`."""

WITH_MASK = {"allow_is_causal_skip": False} if "allow_is_causal_skip" in _MASK_OPTIONS else {}
"""Options of `create_causal_mask` where there is padding: it need not wait for the device to find out (since 5.23)."""

SELECTS_STATES = hasattr(output_capturing, "select_hidden_states")
"""Whether `output_hidden_states` may name the states that are wanted, so that no others are kept."""
