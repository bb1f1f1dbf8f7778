"""LLaVA with a pyramid: the wrappers that transformers loads, saves and generates with."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
)
from transformers.utils.generic import can_return_tuple

from dpn_cli.modeling.cache import PyramidCache
from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.pyramid_config import Grid, PyramidConfig, Route
from dpn_cli.modeling.pyramid_text import PYRAMID_TEXT_MODELS, PyramidTextMixin


def visual_coordinates(is_image: torch.Tensor, grid: Grid, has_class_token: bool = False) -> torch.Tensor:
    """Return (image, row, col) of every image token, -1 elsewhere.

    Args:
        is_image: [B, L] bool, the image placeholders, in the order of the images.
        grid: tokens of one image (H, W).
        has_class_token: whether an extra token stands before each image's grid; it counts as text.

    Returns:
        [B, L, 3], long.
    """
    height, width = grid
    skipped = int(has_class_token)
    per_image = height * width + skipped
    order = is_image.cumsum(1) - 1
    index = order % per_image - skipped
    coords = torch.stack([order // per_image, index // width, index % width], dim=-1)
    return torch.where((is_image & (index >= 0))[..., None], coords, -1)


class Prepooling(LlavaMultiModalProjector):
    """LLaVA's projector, on the averages of small squares of the vision tower's features."""

    def __init__(self, config: DpnLlavaConfig, side: int) -> None:
        super().__init__(config)
        self.side = side

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Project features [images, tokens, width]."""
        height = math.isqrt(image_features.shape[1])
        grids = image_features.transpose(1, 2).unflatten(2, (height, height))
        return super().forward(F.avg_pool2d(grids, self.side).flatten(2).transpose(1, 2))


class DpnLlavaModel(LlavaModel):
    """`LlavaModel` whose language model is a pyramid and is told where each visual token stands in its image."""

    config_class = DpnLlavaConfig
    _keep_in_fp32_modules_strict = ["routers"]

    def __init__(self, config: DpnLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        text_type = config.text_config.model_type
        if text_type not in PYRAMID_TEXT_MODELS:
            raise ValueError(
                f"text model type {text_type!r} has no pyramid; there is one for {list(PYRAMID_TEXT_MODELS)}"
            )
        self.vision_tower = AutoModel.from_config(config.vision_config)
        side = config.pyramid_config().prepooling
        self.multi_modal_projector = LlavaMultiModalProjector(config) if side == 1 else Prepooling(config, side)
        self.language_model = PYRAMID_TEXT_MODELS[text_type]._from_config(
            config.text_config, pyramid=config.pyramid_config()
        )
        self.post_init()

    def image_grid(self) -> Grid:
        """Return the visual tokens of one image, (H, W)."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.language_model.pyramid.prepooling
        return side, side

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings [B, L, D] with the images in place, and visual coordinates [B, L, 3]."""
        embeds = self.get_input_embeddings()(input_ids)
        features = torch.cat(self.get_image_features(pixel_values, return_dict=True).pooler_output)
        is_image = self.get_placeholder_mask(input_ids, embeds, features)
        embeds = embeds.masked_scatter(is_image, features.to(embeds.device, embeds.dtype))
        has_class_token = self.config.vision_feature_select_strategy == "full"
        return embeds, visual_coordinates(is_image[..., 0], self.image_grid(), has_class_token)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | LlavaModelOutputWithPast:
        """Run `LlavaModel.forward` with the visual coordinates handed on to the language model."""
        if pixel_values is not None or (mm_encoder_outputs or {}).get("image") is not None:
            strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
            is_image = self._is_image(input_ids, inputs_embeds)
            kwargs["visual_coords"] = visual_coordinates(is_image, self.image_grid(), strategy == "full")
            kwargs["router_tokens"] = self._router_tokens(is_image.any(1), input_ids, inputs_embeds)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _is_image(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Return the image placeholders, [B, L] bool."""
        return self._is_token(self.config.image_token_id, input_ids, inputs_embeds)

    def _router_tokens(
        self, has_image: torch.Tensor, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the columns [B, R] of the token that the routers read, -1 where a sample has fewer.

        None where they read no special token.

        Raises:
            ValueError: if a sample with an image, [B] bool, has none.
        """
        token_id = self.language_model.pyramid.router.token_id
        if token_id is None:
            return None
        is_read = self._is_token(token_id, input_ids, inputs_embeds)
        count = is_read.sum(1)
        if not count[has_image].all():
            raise ValueError(
                f"the routers of this model read the token {token_id}, which a prompt has not: put it at the end of "
                "the question, as the chat template does"
            )
        columns = is_read.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(count.max()))]
        return torch.where(torch.arange(columns.shape[1], device=columns.device) < count[:, None], columns, -1)

    def _is_token(
        self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Say where a token stands, [B, L] bool."""
        if input_ids is not None:
            return input_ids == token_id
        return (inputs_embeds == self.get_input_embeddings().weight[token_id]).all(-1)


def _last_instruction(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the column before each row's first label, [B]; the last valid one where there is no label."""
    answered = labels != -100
    index = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    last = (index if attention_mask is None else index * attention_mask).amax(1)
    return torch.where(answered.any(1), answered.int().argmax(1) - 1, last).clamp(min=0)


class DpnLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with a pyramid, routed per sample."""

    config_class = DpnLlavaConfig
    _keep_in_fp32_modules_strict = ["routers"]

    def __init__(self, config: DpnLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = DpnLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | LlavaCausalLMOutputWithPast:
        """Run `LlavaForConditionalGeneration.forward`, routed.

        The routers read each sample's last instruction token: with labels the one before the first label, else the
        last of the prompt.

        Args:
            prompt_length: columns before the first generated token, cached ones included; by default all of them.
        """
        if labels is not None:
            kwargs["instruction"] = _last_instruction(labels, attention_mask)
        elif prompt_length is not None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            kwargs["instruction"] = torch.tensor([prompt_length - 1 - past], device=self.device)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` a `PyramidCache`, and refuse what a shrinking sequence cannot do."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation={implementation!r} holds one length for all layers, a pyramid has several; "
                "leave it out, or use 'offloaded' to save GPU memory"
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size would cut an image apart before it is pooled; leave it out")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # The first forward may hold draft tokens (assisted decoding), and without a cache every forward is a prefill:
        # the routers must read the prompt's end all the same. An all-ones mask has been dropped by now.
        mask = model_kwargs["attention_mask"]
        model_kwargs["prompt_length"] = generation_config._mask_length if mask is None else mask.shape[1]
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not getattr(cache, "_is_user_defined", False):
            model_kwargs["past_key_values"] = self.new_cache(offloading=implementation == "offloaded")
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching: its paged cache holds one length for all layers."""
        raise NotImplementedError("generate_batch uses a paged cache with one length for all layers; use generate")

    @property
    def pyramid(self) -> PyramidConfig:
        """The pyramid of the language model."""
        return self._text_model.pyramid

    @property
    def _text_model(self) -> PyramidTextMixin:
        return self.model.language_model

    @property
    def last_routes(self) -> list[Route]:
        """The route of every sample of the last prefill, as expert indices per site."""
        return list(self._text_model.last_routes)

    def new_cache(self, offloading: bool = False) -> PyramidCache:
        """Return an empty KV cache for several turns on one conversation."""
        return self._text_model.new_cache(offloading)

    def set_route(self, route: Route | Sequence[Route] | None) -> None:
        """Force a route in place of the routers.

        Args:
            route: expert indices per site for all samples, e.g. (0, 1, 2); or a list with one route per sample; or
                None for the model's own way: its routers, or its static route.

        Raises:
            ValueError: if a route does not fit the sites or would break `min_visual_tokens`.
        """
        if route is None:
            static = self.pyramid.static_route
            self._text_model.forced_routes = None if static is None else [static]
            return
        routes: list[Route] = [each for each in route if not isinstance(each, int)] or [tuple(route)]  # type: ignore[arg-type]
        for each in routes:
            self.pyramid.walk(each, [self.model.image_grid()])
        self._text_model.forced_routes = routes

    def set_budget(self, budget: float | None) -> None:
        """Choose how much prefill compute to spend, on average.

        Args:
            budget: mean fraction of the unpooled LLM's prefill FLOPs, e.g. 0.44; None for no limit (λ = 0).

        Raises:
            ValueError: if the model is not calibrated or the budget is below what it can reach.
        """
        trade_off = 0.0 if budget is None else self.pyramid.trade_off_for(budget)
        self._text_model.trade_off = trade_off
        self._text_model.pyramid = replace(self.pyramid, trade_off=trade_off)
        self.config.pyramid = self.pyramid.to_dict()

    @property
    def is_adapted(self) -> bool:
        """Whether the weights carry an adapter (peft)."""
        return bool(self._hf_peft_config_loaded)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Switch the adapter off for the duration, if there is one."""
        if self.is_adapted:
            self.disable_adapters()
        try:
            yield
        finally:
            if self.is_adapted:
                self.enable_adapters()

    @contextmanager
    def teacher(self) -> Iterator["DpnLlavaForConditionalGeneration"]:
        """Switch the pyramid and its adapter off for the duration: the model is the one that was converted."""
        before = self._text_model.pooling_enabled
        self._text_model.pooling_enabled = False
        try:
            with self.without_adapter():
                yield self
        finally:
            self._text_model.pooling_enabled = before


# transformers renames the keys of older checkpoint layouts for its own classes only, and finds them by name.
for _ours, _theirs in ((DpnLlavaModel, "LlavaModel"), (DpnLlavaForConditionalGeneration, "llava")):
    register_checkpoint_conversion_mapping(_ours.__name__, get_checkpoint_conversion_mapping(_theirs), overwrite=True)
