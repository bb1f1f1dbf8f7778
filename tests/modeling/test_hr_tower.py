"""LLaVA-HR's vision tower gives what the description of the authors' code gives."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpn_cli.conversion.hr import HrTower
from dpn_cli.families.vision import hr_tensors
from dpn_cli.modeling.hr_tower import LlavaHrVisionConfig, LlavaHrVisionModel
from dpn_cli.modeling.salience import patch_salience
from tests.hr import features, random_tower


def loaded(tensors: dict[str, torch.Tensor], **config: Any) -> LlavaHrVisionModel:
    """Return the tower with tensors of the original layout."""
    weights: Any = SimpleNamespace(folder=Path("llava-hr"), tensors=tensors)
    tower = HrTower.of(weights, {"mm_vision_tower": "openai/clip-vit-large-patch14-336", **config}, None)
    model = LlavaHrVisionModel(LlavaHrVisionConfig(**tower.config)).eval()
    renamed = {tower.renamed(name): tensor for name, tensor in tensors.items() if name not in tower.unused}
    state = {str(name).removeprefix("vision_tower."): tensor for name, tensor in renamed.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == hr_tensors(tower.config)
    model.load_state_dict(state)
    return model


def pictures(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize(("size", "visual_tokens"), [(384, 576), (768, 576), (1024, 1024)])
@torch.inference_mode()
def test_its_features_are_those_of_the_description(size: int, visual_tokens: int) -> None:
    tensors = random_tower(patch=14, clip_size=336)
    model = loaded(tensors, input_image_size=size, vision_tower_slow="convnext_large_mlp.clip_laion2b_ft_320")
    found = model(pictures(size)).last_hidden_state
    assert found.shape[1] == visual_tokens
    torch.testing.assert_close(found, features(tensors, pictures(size)), rtol=1e-5, atol=1e-5)
    assert found.std() > 0.1  # they say something


@torch.inference_mode()
def test_its_salience_is_the_attention_that_every_patch_gets() -> None:
    tower = loaded(random_tower(), input_image_size=256, vision_tower_slow="convnext_large_mlp.clip_laion2b_ft_320")
    tower.fast.config._attn_implementation = "eager"
    last, maps = tower.encoder.layers[-1], []
    last.self_attn.register_forward_hook(lambda attention, args, output: maps.append(output[1]))
    states = tower(pictures(256)).hidden_states
    found = patch_salience(last, states[-2], has_class_token=False)
    torch.testing.assert_close(found[..., 0], maps[0].mean((1, 2)))


@pytest.mark.parametrize(
    ("options", "config", "eps"),
    [
        ({"frozen": True}, {"freeze_vision": True}, 1e-6),
        ({"scale": "gamma"}, {"vision_tower_slow": "convnext_xxlarge.clip_laion2b_soup"}, 1e-5),
    ],
    ids=["without adapters", "XXL"],
)
@torch.inference_mode()
def test_its_variants(options: dict[str, Any], config: dict[str, Any], eps: float) -> None:
    tensors = {name: tensor / 50 if "stem.0" in name else tensor for name, tensor in random_tower(**options).items()}
    found = loaded(tensors, input_image_size=256, **config)(pictures(256)).last_hidden_state
    torch.testing.assert_close(found, features(tensors, pictures(256), eps), rtol=1e-5, atol=1e-5)
    other = features(tensors, pictures(256), 1.1e-5 - eps)
    assert (found - other).abs().max() > 1e-4  # the norms' epsilon is seen


@torch.inference_mode()
def test_every_part_of_it_matters() -> None:
    tensors = random_tower()
    expected = loaded(tensors, input_image_size=256)(pictures(256)).last_hidden_state
    for part in ("stem.1", "stages.3.blocks.0.weight", "layers.7.mlp", "latent.0.gate", "latent.2.slow", "position"):
        changed = {name: tensor * 2 if part in name else tensor for name, tensor in tensors.items()}
        found = loaded(changed, input_image_size=256)(pictures(256)).last_hidden_state
        assert (found - expected).abs().max() > 1e-3, part


@pytest.mark.parametrize(
    ("depths", "widths", "millions"), [((3, 3, 27, 3), (192, 1536), 196.2), ((3, 4, 30, 3), (384, 3072), 843.4)]
)
def test_the_full_sizes_have_the_parameters_of_the_authors(
    depths: tuple[int, ...], widths: tuple[int, int], millions: float
) -> None:
    first, last = widths
    slow = {"depths": list(depths), "hidden_sizes": [first, 2 * first, 4 * first, last]}
    fast = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = LlavaHrVisionConfig(fast_config=fast | {"image_size": 336, "patch_size": 14}, slow_config=slow)
    with torch.device("meta"):
        model = LlavaHrVisionModel(config)
    assert sum(p.numel() for p in model.slow.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == hr_tensors(config.to_dict())


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(128, 256\) pixels, expected 256×256"):
        loaded(random_tower(), input_image_size=256)(torch.zeros(1, 3, 128, 256))


@torch.inference_mode()
def test_half_precision_stays_half_precision() -> None:
    tensors = random_tower()
    model = loaded(tensors, input_image_size=256)
    expected = model(pictures(256)).last_hidden_state
    found = model.to(torch.bfloat16)(pictures(256)).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.99
