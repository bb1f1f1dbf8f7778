"""The tensors that a LLaVA has: what they are named, and which ones a config asks for. No torch."""

from typing import Any

from dpn_cli.checkpoint.family import Family
from dpn_cli.pyramid.cost import DecoderShape

HR_TOWER = "llava_hr_vision"  # the model type of LLaVA-HR's

Shapes = dict[str, tuple[int, ...]]

# Tensor names of checkpoints on the hub → those of transformers 5 in memory; the first match counts.
RENAMES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("model.language_model.", "model.language_model."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.", "model.vision_tower."),
    ("model.multi_modal_projector.", "model.multi_modal_projector."),
    ("lm_head.", "lm_head."),
    ("image_newline", "model.image_newline"),
    ("model.image_newline", "model.image_newline"),
)


def memory_name(name: str) -> str | None:
    """Return a stored tensor's name as transformers 5 has it in memory; None if no LLaVA has such a tensor."""
    for old, new in RENAMES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def is_tied(config: dict[str, Any]) -> bool:
    """Say whether a LLaVA's head is its embedding."""
    return bool(config["text_config"].get("tie_word_embeddings") or config.get("tie_word_embeddings"))


def llava_tensors(config: dict[str, Any]) -> Shapes:
    """Return the hub's name and the shape of every tensor, from a complete config.json in Hugging Face's layout."""
    text, vision = config["text_config"], config["vision_config"]
    decoder = DecoderShape.from_config(text)
    layers = config.get("vision_feature_layer", -2)
    features = vision["hidden_size"] * (len(layers) if isinstance(layers, list) else 1)
    shapes = {f"language_model.model.{name}": shape for name, shape in decoder_tensors(decoder, text).items()}
    shapes |= projector_tensors(features, decoder.hidden_size, config.get("multimodal_projector_bias", True))
    if not is_tied(config):
        shapes["language_model.lm_head.weight"] = (decoder.vocab_size, decoder.hidden_size)
    if Family.of(config).cuts_images:
        shapes["image_newline"] = (decoder.hidden_size,)
    if vision["model_type"] == HR_TOWER:
        return shapes | {f"vision_tower.{name}": shape for name, shape in hr_tensors(vision).items()}
    tower = {"clip_vision_model": clip_tensors, "siglip_vision_model": siglip_tensors}[vision["model_type"]]
    return shapes | {f"vision_tower.vision_model.{name}": shape for name, shape in tower(vision).items()}


def decoder_tensors(shape: DecoderShape, text: dict[str, Any]) -> Shapes:
    """Return what a Llama, Mistral or Qwen2 model has."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    layer: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    layer |= {f"self_attn.{name}.weight": size for name, size in attention.items()}
    layer |= {f"mlp.{name}.weight": size for name, size in mlp.items()}
    if text.get("attention_bias") or text.get("model_type") == "qwen2":
        biased = [name for name in attention if text.get("model_type") != "qwen2" or name != "o_proj"]
        layer |= {f"self_attn.{name}.bias": attention[name][:1] for name in biased}
    if text.get("mlp_bias"):
        layer |= {f"mlp.{name}.bias": size[:1] for name, size in mlp.items()}
    shapes: Shapes = {"embed_tokens.weight": (shape.vocab_size, hidden), "norm.weight": (hidden,)}
    return shapes | {f"layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()}


def projector_tensors(vision_hidden: int, text_hidden: int, bias: bool = True) -> Shapes:
    """Return what the projector between tower and decoder has."""
    shapes: Shapes = {
        "multi_modal_projector.linear_1.weight": (text_hidden, vision_hidden),
        "multi_modal_projector.linear_2.weight": (text_hidden, text_hidden),
    }
    if bias:
        shapes |= {f"multi_modal_projector.linear_{i}.bias": (text_hidden,) for i in (1, 2)}
    return shapes


def clip_tensors(vision: dict[str, Any]) -> Shapes:
    """Return what a CLIP vision transformer has."""
    hidden, patch = vision["hidden_size"], vision["patch_size"]
    shapes: Shapes = {
        "embeddings.class_embedding": (hidden,),
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2 + 1, hidden),
    }
    return shapes | _norm("pre_layrnorm", hidden) | _norm("post_layernorm", hidden) | _vision_layers(vision)


def siglip_tensors(vision: dict[str, Any]) -> Shapes:
    """Return what a SigLIP vision transformer has."""
    hidden, patch = vision["hidden_size"], vision["patch_size"]
    shapes: Shapes = {
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, hidden),
    }
    shapes |= _norm("post_layernorm", hidden) | _vision_layers(vision)
    if vision.get("vision_use_head", True):
        shapes |= {"head.probe": (1, 1, hidden), "head.attention.in_proj_weight": (3 * hidden, hidden)}
        shapes |= {"head.attention.in_proj_bias": (3 * hidden,)} | _linear("head.attention.out_proj", hidden, hidden)
        shapes |= _norm("head.layernorm", hidden) | _mlp("head.mlp", vision)
    return shapes


def hr_tensors(vision: dict[str, Any]) -> Shapes:
    """Return what LLaVA-HR's tower has: CLIP, ConvNeXt, the adapters between them and the final alignment."""
    fast, slow = vision["fast_config"]["hidden_size"], vision["slow_config"]["hidden_sizes"][-1]
    shapes = {f"fast.{name}": shape for name, shape in clip_tensors(vision["fast_config"]).items()}
    shapes |= {f"slow.{name}": shape for name, shape in convnext_tensors(vision["slow_config"]).items()}
    shapes |= _linear("alignment.fast_proj", fast, fast) | _linear("alignment.slow_proj", slow, fast)
    for i in range(3 if vision["has_adapters"] else 0):
        adapter = _conv("slow_conv", slow, slow, 1) | _conv("slow_proj", slow, fast, 1)
        adapter |= _conv("fast_conv", 1, fast, 7) | _conv("fast_proj", fast, fast, 1)
        adapter |= _linear("gate.0", 2 * fast, fast // 2) | _linear("gate.2", fast // 2, 1)
        shapes |= {f"adapters.{i}.{name}": shape for name, shape in adapter.items()}
    return shapes


def convnext_tensors(slow: dict[str, Any]) -> Shapes:
    """Return what a ConvNeXt has without its head, each block with a layer scale."""
    shapes: Shapes = {}
    before = 3  # channels of a picture
    for i, (depth, width) in enumerate(zip(slow["depths"], slow["hidden_sizes"], strict=True)):
        down = f"{i}.downsample_layers"
        if i == 0:
            shapes |= _conv(f"{down}.0", before, width, 4) | _norm(f"{down}.1", width)
        else:
            shapes |= _norm(f"{down}.0", before) | _conv(f"{down}.1", before, width, 2)
        for block in (f"{i}.layers.{j}" for j in range(depth)):
            shapes |= _conv(f"{block}.depthwise_conv", 1, width, 7) | _norm(f"{block}.layer_norm", width)
            shapes |= _linear(f"{block}.pointwise_conv1", width, 4 * width)
            shapes |= _linear(f"{block}.pointwise_conv2", 4 * width, width) | {f"{block}.gamma": (width,)}
        before = width
    return shapes


def _vision_layers(vision: dict[str, Any]) -> Shapes:
    hidden = vision["hidden_size"]
    layer = _norm("layer_norm1", hidden) | _norm("layer_norm2", hidden) | _mlp("mlp", vision)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= _linear(f"self_attn.{name}", hidden, hidden)
    layers = range(vision["num_hidden_layers"])
    return {f"encoder.layers.{i}.{name}": size for i in layers for name, size in layer.items()}


def _mlp(name: str, vision: dict[str, Any]) -> Shapes:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    return _linear(f"{name}.fc1", hidden, inner) | _linear(f"{name}.fc2", inner, hidden)


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}
