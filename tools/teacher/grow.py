"""Last step: blocks that change nothing in front of the decoder, so that it reads the picture deeper in.

The questions are simple enough for the language model to answer from its first two blocks. In a large
LLaVA the picture is read all along the first half; without this step pooling could cost nothing.
"""

import copy

import torch
from transformers import LlavaForConditionalGeneration

FRONT_BLOCKS = 2


@torch.no_grad()
def grow(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Return the same function with ``FRONT_BLOCKS`` more decoder blocks, the first ones.

    Args:
        model: The trained teacher; left as it is.

    Returns:
        A teacher whose new blocks have zero output projections: bit for bit the same logits.

    Source: Wu et al. 2024, LLaMA Pro (block expansion with zero-initialised outputs).
    """
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers += FRONT_BLOCKS
    config.text_config.layer_types = None
    grown = LlavaForConditionalGeneration(config)
    grown.generation_config = model.generation_config
    language, trained = grown.model.language_model, model.model.language_model
    grown.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    grown.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    grown.lm_head.load_state_dict(model.lm_head.state_dict())
    language.embed_tokens.load_state_dict(trained.embed_tokens.state_dict())
    language.norm.load_state_dict(trained.norm.state_dict())
    for block in language.layers[:FRONT_BLOCKS]:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    language.layers[FRONT_BLOCKS:].load_state_dict(trained.layers.state_dict())
    return grown.eval()
