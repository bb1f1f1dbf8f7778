"""The tensors that a LLaVA of the Llama kind with a CLIP tower has, in the hub's names. No torch."""

from typing import Any

from dpn_cli.cost import DecoderShape

Shapes = dict[str, tuple[int, ...]]


def llava_tensors(config: dict[str, Any]) -> Shapes:
    """Return name and shape of every tensor, from a complete config.json in Hugging Face's layout."""
    text, vision = config["text_config"], config["vision_config"]
    decoder = DecoderShape.from_config(text)
    shapes = {
        f"language_model.model.{name}": shape for name, shape in decoder_tensors(decoder).items()
    } | projector_tensors(vision["hidden_size"], decoder.hidden_size)
    if not text.get("tie_word_embeddings"):
        shapes["language_model.lm_head.weight"] = (decoder.vocab_size, decoder.hidden_size)
    return shapes | {f"vision_tower.vision_model.{name}": shape for name, shape in clip_tensors(vision).items()}


def decoder_tensors(shape: DecoderShape) -> Shapes:
    """Return what a Llama or Mistral model has."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: Shapes = {"embed_tokens.weight": (shape.vocab_size, hidden), "norm.weight": (hidden,)}
    return shapes | {f"layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()}


def projector_tensors(vision_hidden: int, text_hidden: int) -> Shapes:
    """Return what the projector between tower and decoder has."""
    return {
        "multi_modal_projector.linear_1.weight": (text_hidden, vision_hidden),
        "multi_modal_projector.linear_1.bias": (text_hidden,),
        "multi_modal_projector.linear_2.weight": (text_hidden, text_hidden),
        "multi_modal_projector.linear_2.bias": (text_hidden,),
    }


def clip_tensors(vision: dict[str, Any]) -> Shapes:
    """Return what a CLIP vision transformer has."""
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    norms = {f"{name}.{part}": (hidden,) for name in ("layer_norm1", "layer_norm2") for part in ("weight", "bias")}
    layer: Shapes = {**norms, "mlp.fc1.weight": (inner, hidden), "mlp.fc1.bias": (inner,)}
    layer |= {"mlp.fc2.weight": (hidden, inner), "mlp.fc2.bias": (hidden,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{name}.weight": (hidden, hidden), f"self_attn.{name}.bias": (hidden,)}
    shapes: Shapes = {
        "embeddings.class_embedding": (hidden,),
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2 + 1, hidden),
    }
    shapes |= {f"{n}.{part}": (hidden,) for n in ("pre_layrnorm", "post_layernorm") for part in ("weight", "bias")}
    layers = range(vision["num_hidden_layers"])
    return shapes | {f"encoder.layers.{i}.{name}": size for i in layers for name, size in layer.items()}
