"""Names that transformers changed between the releases that are supported."""

import inspect

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What arguments and outputs call the KV cache: `cache` since 5.24, `past_key_values` before."""
