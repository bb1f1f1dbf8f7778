"""What the generating models of every family share: routing, budgets, the teacher and generation.

A family (LLaVA and its kin) gives its two classes two mixins: `PyramidModelMixin` for the inner one, and the one here.

Shapes: B batch, L sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from typing_extensions import override

from dpn_cli.modeling.adapters import adapted_layers, make_switchable
from dpn_cli.modeling.cache import PyramidCache
from dpn_cli.modeling.call import changed_call, current_call
from dpn_cli.modeling.instruction import cue_ends, instruction_ends, unlabelled_ends
from dpn_cli.modeling.pyramid_text import PyramidTextMixin
from dpn_cli.modeling.renamed import CACHE
from dpn_cli.modeling.state import PyramidState
from dpn_cli.modeling.visual import PyramidModelMixin, brings_images
from dpn_cli.pyramid.config import ADAPTER_KEY, FITTED_PARTS, PyramidConfig, Route
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.route import parse_route

OURS = ("visual_coords", "salience", "prompt_length")  # what `generate` hands to a pyramid, and to no other model
HEALED = (
    "This checkpoint was healed, and its adapter is not loaded, so its routers would choose for another model: load it "
    "with dpn_cli.load, or load what `dpn export` makes of it."
)
LOGGER = logging.get_logger("transformers.dpn")  # heeds the verbosity of transformers
NO_CONTINUOUS_BATCHING = "continuous batching uses a paged cache with one length for all layers; use generate"


class PyramidGenerationMixin(PreTrainedModel, GenerationMixin):
    """Makes a family's model for conditional generation one with a pyramid, routed per sample."""

    _keep_in_fp32_modules_strict = list(FITTED_PARTS)
    _can_compile_fullgraph = False  # lengths depend on the data
    inner_class: type[PyramidModelMixin]  # the family's

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # the original's would build the original's inner model
        self.model = self.inner_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @override
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
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
        salience: torch.Tensor | None = None,
        prompt_length: int | None = None,
        instruction: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the original's forward, routed.

        The routers read each sample's last instruction token: that of a prompt in `generate`, and elsewhere what
        `instruction_ends` finds with labels, and `unlabelled_ends` without them. The arguments are written out because
        `generate` looks them up.

        Args:
            past_key_values: the name of `cache` before transformers 5.24.
            visual_coords: Coordinates of the prompt's visual tokens; by default they are looked up.
            salience: how much the vision tower attends to these, where an expert reads it; likewise.
            prompt_length: columns before the first generated token, cached ones included; by default all of them.
            instruction: [B] the columns of the last instruction tokens, where the caller knows them.
        """
        cache = past_key_values if cache is None else cache
        if instruction is None and labels is None and prompt_length is not None:
            past = 0 if cache is None else cache.get_seq_length()
            instruction = torch.tensor([prompt_length - 1 - past])
        elif (
            instruction is None and self.text_model.reads_instruction and (visual_coords is None or labels is not None)
        ):
            instruction = self._instruction(input_ids, inputs_embeds, attention_mask, labels)
        if batch_num_images is not None:  # one family's alone
            kwargs["batch_num_images"] = batch_num_images
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            visual_coords=visual_coords,
            salience=salience,
            instruction=instruction,
            **{CACHE: cache},
            **kwargs,
        )

    def _instruction(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the columns of the last instruction tokens, [B]."""
        is_image = self.model.is_image(input_ids, inputs_embeds)
        cue = [self.model.is_token(token, input_ids, inputs_embeds) for token in self.pyramid.answer_cue]
        is_cue_end = cue_ends(is_image, cue)
        if labels is None:
            return unlabelled_ends(is_image, is_cue_end, attention_mask)
        return instruction_ends(labels, is_image, is_cue_end, attention_mask)

    @staticmethod
    @override
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the weights; files of the checkpoint's own folder first, those of a calibration in it last.

        For weights that stay on disk, transformers takes the folder of the first file for that of all.
        """
        if model.pyramid.calibration.get(ADAPTER_KEY):
            LOGGER.warning(HEALED)  # what loads the adapter, too, keeps transformers quiet meanwhile
        files = checkpoint_files and sorted(checkpoint_files, key=lambda file: len(Path(file).parts))
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, files, *args, **kwargs)
        model.text_model.freeze_choices()
        return loaded

    @override
    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: Any,
    ) -> dict[str, Any]:
        """Look the visual coordinates up while the sizes of the images are there: encoding takes them away."""
        known = generation_config.is_assistant or model_kwargs.get("visual_coords") is not None
        if brings_images(**model_kwargs) and not known:  # a draft model never sees images
            cache = model_kwargs.get(CACHE)
            past = 0 if cache is None else cache.get_seq_length()  # earlier turns have brought their images already
            skipped = past if inputs_tensor.shape[1] == _prompt_length(generation_config, model_kwargs) else 0
            inputs = {"input_ids": None, "inputs_embeds": None, str(model_input_name): inputs_tensor[:, skipped:]}
            model_kwargs["visual_coords"] = self.model.locate(**{**model_kwargs, **inputs})
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None and not known:
            model_kwargs["salience"] = self.model.salience(encoded, model_kwargs["visual_coords"])
        return model_kwargs

    @override
    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` a `PyramidCache`, and refuse what a shrinking sequence cannot do."""
        implementation = generation_config.cache_implementation
        given = model_kwargs.get(CACHE)
        if implementation not in (None, "dynamic", "offloaded") or getattr(given, "is_compileable", False):
            found = f"cache_implementation={implementation!r}" if given is None else f"a {type(given).__name__}"
            raise ValueError(
                f"{found} holds one length for all layers, a pyramid has several; leave it out, or use 'offloaded' to "
                "save GPU memory"
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size would cut an image apart before it is pooled; leave it out")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # The first forward may hold draft tokens (assisted decoding), and without a cache every forward is a prefill:
        # the routers must read the prompt's end all the same.
        model_kwargs["prompt_length"] = _prompt_length(generation_config, model_kwargs)
        if given is None and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = self.new_cache(offloading=implementation == "offloaded")
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()

    @override
    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Keep what only a pyramid knows from draft models."""
        known = {name: value for name, value in model_kwargs.items() if name not in OURS}
        return super()._get_candidate_generator(*args, model_kwargs=known, **kwargs)

    @override
    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching: its paged cache holds one length for all layers."""
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    @override
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save what the original would save.

        Raises:
            ValueError: of a healed model, whose weights stand in an adapter's layers, under other names.
        """
        if self.is_adapted and not self._hf_peft_config_loaded and kwargs.get("state_dict") is None:
            raise ValueError("this model carries the adapter of its healing: `dpn export` merges it into the weights")
        return super().save_pretrained(*args, **kwargs)

    @override
    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching."""
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    @property
    def text_model(self) -> PyramidTextMixin:
        """The language model, without its head."""
        return self.model.language_model

    @override
    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the language model."""
        self.model.set_decoder(decoder)

    @property
    def pyramid(self) -> PyramidConfig:
        """The pyramid of the language model, with the λ of `set_budget`; the config holds it as JSON."""
        return self.text_model.pyramid

    @pyramid.setter
    def pyramid(self, pyramid: PyramidConfig) -> None:
        self.text_model.pyramid = pyramid
        self.config.pyramid = pyramid.to_dict()

    @property
    def last_routes(self) -> list[Route]:
        """The route of every sample of this thread's (or task's) last prefill, as expert indices per site."""
        return list(current_call(self.text_model).last_routes)

    @property
    def last_grids(self) -> list[tuple[Grid, ...]]:
        """The visual grids of every sample of the last prefill, before any pooling; none while the pyramid is off."""
        return list(current_call(self.text_model).last_grids)

    def new_cache(self, offloading: bool = False) -> PyramidCache:
        """Return an empty KV cache for several turns on one conversation."""
        return self.text_model.new_cache(offloading)

    def set_route(self, route: str | Route | Sequence[str | Route] | None) -> None:
        """Force a route in place of the routers' choice, for all threads; see `on_route` for the argument."""
        self.text_model.default_routes = self._routes(route)

    def set_budget(self, budget: float | None) -> None:
        """Choose how much prefill compute to spend, for all threads; see `at_budget` for the argument."""
        self.pyramid = replace(self.pyramid, trade_off=self._trade_off(budget))

    @contextmanager
    def on_route(self, route: str | Route | Sequence[str | Route] | None) -> Iterator[Self]:
        """Force a route in place of the routers' choice for the duration, in this thread or task alone.

        A probability gate scales what the route pools all the same.

        Args:
            route: one route for all samples, by its experts' names ("keep,1x2,exit") or their indices ((0, 1, 2)); or
                a list with one route per sample; or None for the model's own way: its routers, or its static route.

        Raises:
            ValueError: if a route does not fit the sites or would break `min_visual_tokens`.
        """
        with changed_call(self.text_model, routes=self._routes(route)):
            yield self

    @contextmanager
    def at_budget(self, budget: float | None) -> Iterator[Self]:
        """Choose how much prefill compute to spend for the duration, in this thread or task alone.

        A forced route takes precedence over a budget.

        Args:
            budget: mean fraction of the original LLM's prefill FLOPs, e.g. 0.44; None for no limit (λ = 0).

        Raises:
            ValueError: if the model is not calibrated or the budget is below what it can reach.
        """
        with changed_call(self.text_model, trade_off=self._trade_off(budget)):
            yield self

    @contextmanager
    def as_pyramid(self, pyramid: PyramidConfig) -> Iterator[Self]:
        """Run as another pyramid without routers for the duration, in this thread or task alone.

        Args:
            pyramid: Pyramid with a static route, or with the same router tensors.
        """
        with changed_call(self.text_model, pyramid=pyramid, routes=pyramid.own_routes):
            yield self

    @contextmanager
    def reduced_by(self, reduce: Callable[[PyramidState, int], PyramidState]) -> Iterator[Self]:
        """Replace what the sites do for the duration, in this thread or task alone.

        Args:
            reduce: takes a batch with images and the number of a site, and returns it with fewer visual tokens.
        """
        with changed_call(self.text_model, reduce=reduce):
            yield self

    def rebuild(self, pyramid: PyramidConfig) -> None:
        """Become another pyramid for good, with fresh routers."""
        self.text_model.rebuild(pyramid)
        self.config.pyramid = pyramid.to_dict()

    def _routes(self, route: str | Route | Sequence[str | Route] | None) -> tuple[Route, ...]:
        """Return what `on_route` takes as routes that fit the sites."""
        if route is None:
            return self.pyramid.own_routes
        is_one = isinstance(route, str) or all(isinstance(each, int) for each in route)
        given: Any = [route] if is_one else route
        routes = [parse_route(each, self.pyramid.sites) if isinstance(each, str) else tuple(each) for each in given]
        for each in routes:
            self.pyramid.walk(each, [self.model.image_grid()])
        return tuple(routes)

    def _trade_off(self, budget: float | None) -> float:
        """Return the λ of a budget."""
        return 0.0 if budget is None else self.pyramid.trade_off_for(budget)

    @property
    def is_adapted(self) -> bool:
        """Whether layers carry an adapter (peft)."""
        return bool(adapted_layers(self))

    @contextmanager
    def without_adapter(self) -> Iterator[Self]:
        """Switch the adapter off for the duration, if there is one, in this thread or task alone."""
        make_switchable(self, self.text_model)
        with changed_call(self.text_model, adapts=False):
            yield self

    @contextmanager
    def teacher(self) -> Iterator[Self]:
        """Switch the pyramid and its adapter off for the duration, in this thread or task alone.

        The model is then the one that was converted.
        """
        with self.without_adapter(), changed_call(self.text_model, pools=False):
            yield self


def _prompt_length(generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Return the columns of a prompt, cached ones included; of a mask of ones `generate` keeps the length alone."""
    mask = model_kwargs.get("attention_mask")
    return int(generation_config._mask_length if mask is None else mask.shape[1])


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
