"""VisionZip: before the language model, keep the patches that the vision tower's class token attends to.

Shapes: I images, N patches of an image, C width of the tower, K kept patches, M merged ones.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from dpn_cli.evaluation.baselines.baseline import Fixed, Prompt, taken_over, validate_clip
from dpn_cli.modeling.engine import compact, keep_tokens
from dpn_cli.modeling.state import PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.experts import num_tokens
from dpn_cli.pyramid.shape import DecoderShape

CONTEXTUAL_SHARE = 10 / 64  # of the kept patches, as in the authors' settings


@dataclass
class _Seen:
    """What the tower's layer has shown of the images of the current batch.

    Attributes:
        attention: [I, N] from the class token, the sum over the heads.
        keys: [I, N, C / heads], the mean over the heads.
        kept: [I, N], 1 for the patches that go on.
    """

    attention: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    kept: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class VisionZip(Fixed):
    """Keeps the dominant patches of every image and merges the others into a few contextual ones.

    Source: Yang et al. 2024, https://arxiv.org/abs/2412.04467, section 3.2, training-free. Ours: a contextual patch
    becomes the mean of what is merged into it, where the authors add that mean to it; patches keep their order and
    positions, where the authors put the dominant first and number anew; the class token itself does not go on.

    Attributes:
        keep: the share of the patches of an image that goes on.
    """

    name: ClassVar[str] = "visionzip"
    keep: float = 1.0

    def kept(self, patches: int) -> int:
        """Return how many patches of an image go on: at least one."""
        return max(1, round(patches * self.keep))

    def settings(self, shape: DecoderShape, prompts: Collection[Prompt]) -> list[Self]:
        """Return the shares that are whole tokens of the largest prompt."""
        most = max(prompt.visual_tokens for prompt in prompts)
        return [replace(self, keep=count / most) for count in range(1, most + 1)]

    def layer_tokens(self, shape: DecoderShape, prompt: Prompt) -> list[int]:
        """Return the visual tokens of every layer: of every image the same share."""
        return [sum(self.kept(num_tokens([grid])) for grid in prompt.grids)] * shape.num_layers

    @contextmanager
    def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
        """Watch the tower, merge before the projector, and drop before the first layer, for the duration.

        Raises:
            UsageError: if the vision tower has no class token.
        """
        validate_clip(model, self.name)
        seen = _Seen()
        hooks = [
            _selected_attention(model).register_forward_pre_hook(_watch(seen), with_kwargs=True),
            model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: (self._merge(args[0], seen),)),
        ]
        try:
            with taken_over(model, (-1,), lambda state, site: self._drop(state, seen)):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _merge(self, features: torch.Tensor, seen: _Seen) -> torch.Tensor:
        """Note which patches are kept, and return features [I, N, C] with the rest merged into some of them."""
        kept = self.kept(seen.attention.shape[1])
        contextual = round(kept * CONTEXTUAL_SHARE)
        order = seen.attention.argsort(dim=1, descending=True, stable=True)
        rest = order[:, kept - contextual :].sort(dim=1).values  # [I, M], in the order of the image
        targets, merged = _spaced(rest, contextual)
        seen.kept = torch.zeros_like(seen.attention).scatter(1, order[:, : kept - contextual], 1.0)
        if contextual == 0:
            return features
        seen.kept = seen.kept.scatter(1, targets, 1.0)
        means = _means(features, seen.keys, targets, merged)
        return features.scatter(1, targets[..., None].expand(-1, -1, features.shape[-1]), means)

    def _drop(self, state: PyramidState, seen: _Seen) -> PyramidState:
        """Leave the kept patches, which are equally many of every image."""
        assert state.coords is not None
        is_visual = state.coords[..., 0] >= 0
        kept = torch.zeros_like(is_visual)
        kept[is_visual] = seen.kept.flatten() > 0
        return compact(state, keep_tokens(state, kept))


def _selected_attention(model: PyramidGenerationMixin) -> torch.nn.Module:
    """Return the attention of the layer whose output the projector takes; of several, the last."""
    layers = model.model.vision_tower.encoder.layers
    chosen = model.config.vision_feature_layer
    chosen = chosen if isinstance(chosen, int) else chosen[-1]
    return layers[chosen if chosen < 0 else chosen - 1].self_attn  # hidden state 0 is what goes into the first layer


def _watch(seen: _Seen) -> Any:
    """Return a hook that looks at what the class token attends to, without changing the layer."""

    def watch(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        keys = attention.k_proj(hidden_states).unflatten(-1, (attention.num_heads, -1))  # [I, 1 + N, heads, d]
        query = attention.q_proj(hidden_states[:, 0]).unflatten(-1, (attention.num_heads, -1))
        weights = (torch.einsum("ihd,inhd->ihn", query, keys).float() * attention.scale).softmax(-1)
        seen.attention, seen.keys = weights.sum(1)[:, 1:], keys.mean(2)[:, 1:]

    return watch


def _spaced(rest: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split patches [I, M] into `count` evenly spaced ones and the others."""
    step = max(1, rest.shape[1] // max(count, 1))
    is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
    is_target[torch.arange(count, device=rest.device) * step] = True
    return rest[:, is_target], rest[:, ~is_target]


def _means(patches: torch.Tensor, keys: torch.Tensor, targets: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """Return the mean of every target and of the patches whose keys are most similar to its, [I, targets, C]."""
    keys = torch.nn.functional.normalize(keys.float(), dim=-1)
    similarity = _take(keys, merged) @ _take(keys, targets).transpose(1, 2)
    assigned = torch.nn.functional.one_hot(similarity.argmax(2), targets.shape[1]).transpose(1, 2).to(patches.dtype)
    total = _take(patches, targets) + assigned @ _take(patches, merged)
    return total / (1 + assigned.sum(2, keepdim=True))


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return [I, K, C] of [I, N, C]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
