"""What the wrappers of every family share: visual coordinates, routing, budgets, the teacher and generation.

A family of models (LLaVA and its kin) gives its two classes these mixins. Its inner model builds the vision tower and
the projector, and says which visual grids images have; all else is here.

Shapes: B batch, L sequence, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from dpn_cli.modeling.cache import PyramidCache
from dpn_cli.modeling.pyramid_config import Grid, PyramidConfig, Route
from dpn_cli.modeling.pyramid_text import PYRAMID_TEXT_MODELS, PyramidTextMixin

GRID_INPUTS = ("image_sizes", "batch_num_images")  # what processors return beside the pixels


def visual_coordinates(is_image: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """Return (grid, row, col) of every image token, -1 elsewhere.

    Args:
        is_image: [B, L] bool, the image placeholders, in the order of the images.
        grids: of all images of the batch, in their order; every sample's are counted from 0.

    Returns:
        [B, L, 3], long.

    Raises:
        ValueError: if there are not as many placeholders as tokens in the grids.
    """
    tokens = torch.cat([rows.flatten(0, 1) for rows in _rows(grids)]).to(is_image.device)
    if len(tokens) != is_image.sum():
        raise ValueError(
            f"the prompt has {int(is_image.sum())} image tokens, its images have {len(tokens)}: encode text and images "
            "together, with the checkpoint's own processor"
        )
    coords = torch.full((*is_image.shape, 3), -1, device=is_image.device)
    coords[is_image] = tokens
    first = torch.where(is_image, coords[..., 0], len(grids)).amin(1)
    coords[..., 0] -= first[:, None] * is_image
    return coords


def _rows(grids: Sequence[Grid]) -> list[torch.Tensor]:
    """Return (grid, row, col) of the tokens in their order: [H, W, 3], newlines at the ends of the rows before them."""
    rows: list[torch.Tensor] = []
    for number, (height, width) in enumerate(grids):
        axes = torch.tensor([number]), torch.arange(height), torch.arange(width)
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[0]
        if width == 1 and rows and len(rows[-1]) == height:
            rows[-1] = torch.cat([rows[-1], cells], dim=1)
        else:
            rows.append(cells)
    return rows


def _brings_images(
    pixel_values: torch.Tensor | None = None,
    mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
    **kwargs: Any,
) -> bool:
    """Say whether a model's inputs hold images, as pixels or encoded."""
    return pixel_values is not None or (mm_encoder_outputs or {}).get("image") is not None


class PyramidModelMixin(PreTrainedModel):
    """Makes the inner model of a family hand the place of each visual token in its image to a pyramid."""

    _keep_in_fp32_modules_strict = ["routers"]

    language_model: PyramidTextMixin

    def image_grid(self) -> Grid:
        """Return the visual tokens of a whole image, (H, W)."""
        raise NotImplementedError

    def image_grids(
        self,
        num_images: int,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
    ) -> tuple[Grid, ...]:
        """Return the visual grids of some images, in the order of their tokens: one per image, whatever its size.

        Args:
            num_images: how many images there are.
            image_sizes: [images, 2] their heights and widths in pixels, where the processor gives them.
            batch_num_images: how many images each sample with images has, likewise.
        """
        return (self.image_grid(),) * num_images

    def build_language_model(self) -> PyramidTextMixin:
        """Return the pyramid that the config describes, with fresh weights.

        Raises:
            ValueError: if there is none for the text model's type.
        """
        text_config = self.config.text_config
        if text_config.model_type not in PYRAMID_TEXT_MODELS:
            raise ValueError(
                f"text model type {text_config.model_type!r} has no pyramid; there is one for "
                f"{list(PYRAMID_TEXT_MODELS)}"
            )
        return PYRAMID_TEXT_MODELS[text_config.model_type]._from_config(
            text_config, pyramid=self.config.pyramid_config()
        )

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **sizes: torch.Tensor) -> tuple[Any, Any]:
        """Return embeddings [B, L, D] with the images in place, and visual coordinates [B, L, 3]."""
        embeds = self.get_input_embeddings()(input_ids)
        images = self.get_image_features(pixel_values=pixel_values, **sizes, return_dict=True).pooler_output
        is_image = self._is_image(input_ids, None)
        coords = visual_coordinates(is_image, self.image_grids(len(images), **sizes))
        features = torch.cat(list(images)).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(is_image[..., None], features), coords

    def locate(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the visual coordinates [B, L, 3] of a prompt; its images are pixels or encoded ones."""
        encoded = (mm_encoder_outputs or {}).get("image")
        num_images = len(pixel_values if encoded is None else encoded.pooler_output)  # type: ignore[arg-type]
        sizes = {name: kwargs[name] for name in GRID_INPUTS if kwargs.get(name) is not None}
        return visual_coordinates(self._is_image(input_ids, inputs_embeds), self.image_grids(num_images, **sizes))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        visual_coords: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the original's forward with the visual coordinates handed on to the language model.

        Args:
            visual_coords: of the prompt's images, which come along with it; by default they are looked up.
        """
        if _brings_images(pixel_values, mm_encoder_outputs):
            if visual_coords is None:
                visual_coords = self.locate(input_ids, inputs_embeds, pixel_values, mm_encoder_outputs, **kwargs)
            is_image = self._is_image(input_ids, inputs_embeds)
            drafted = is_image.shape[1] - visual_coords.shape[1]  # or generated, where there is no cache
            kwargs["visual_coords"] = F.pad(visual_coords, (0, 0, 0, drafted), value=-1)
            kwargs["router_tokens"] = self._router_tokens(is_image.any(1), input_ids, inputs_embeds)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
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


class PyramidGenerationMixin(PreTrainedModel, GenerationMixin):
    """Makes a family's model for conditional generation one with a pyramid, routed per sample."""

    _keep_in_fp32_modules_strict = ["routers"]
    inner_class: type[PyramidModelMixin]  # the family's

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # the original's would build the original's inner model
        self.model = self.inner_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        visual_coords: torch.Tensor | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the original's forward, routed.

        The routers read each sample's last instruction token: with labels the one before the first label, else the
        last of the prompt. The arguments are written out because `generate` looks them up.

        Args:
            visual_coords: of the prompt's images; by default they are looked up.
            prompt_length: columns before the first generated token, cached ones included; by default all of them.
        """
        if labels is not None:
            kwargs["instruction"] = _last_instruction(labels, attention_mask)
        elif prompt_length is not None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            kwargs["instruction"] = torch.tensor([prompt_length - 1 - past], device=self.device)
        if batch_num_images is not None:  # one family's alone
            kwargs["batch_num_images"] = batch_num_images
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
            visual_coords=visual_coords,
            **kwargs,
        )

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, *args: Any
    ) -> dict[str, Any]:
        """Look the visual coordinates up while the sizes of the images are there: encoding takes them away."""
        if _brings_images(**model_kwargs) and model_kwargs.get("visual_coords") is None:
            inputs = {"input_ids": None, "inputs_embeds": None, str(model_input_name): inputs_tensor}
            cache = model_kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()  # earlier turns have brought their images already
            new = {name: tensor if tensor is None else tensor[:, past:] for name, tensor in inputs.items()}
            model_kwargs["visual_coords"] = self.model.locate(**{**model_kwargs, **new})
        return super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, *args
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

    @property
    def last_grids(self) -> list[tuple[Grid, ...]]:
        """The visual grids of every sample of the last prefill, before any pooling; none while the pyramid is off."""
        return list(self._text_model.last_grids)

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
    def teacher(self) -> Iterator["PyramidGenerationMixin"]:
        """Switch the pyramid and its adapter off for the duration: the model is the one that was converted."""
        before = self._text_model.pooling_enabled
        self._text_model.pooling_enabled = False
        try:
            with self.without_adapter():
                yield self
        finally:
            self._text_model.pooling_enabled = before


def rename_keys_as(original: str, inner: type[PyramidModelMixin], outer: type[PyramidGenerationMixin]) -> None:
    """Let the keys of older checkpoint layouts be renamed for our classes as for the original's.

    transformers does so for its own classes only, and finds them by name.

    Args:
        original: model type of the family's original.
        inner: our inner model.
        outer: our model for conditional generation.
    """
    for ours, theirs in ((inner, "LlavaModel"), (outer, original)):
        mapping = get_checkpoint_conversion_mapping(theirs)
        register_checkpoint_conversion_mapping(ours.__name__, mapping, overwrite=True)
