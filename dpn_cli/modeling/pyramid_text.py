"""The pyramid: a mixin that runs a Llama-type decoder segment by segment and reduces visual tokens between.

The forward is a loop, `run_segment` → `choose` → `apply`, over a `PyramidState`. Calibration walks the same three
steps as a tree, so that routes with a common prefix share its work; what a site does to a batch is one method,
`reduce`, in `decisions.py`.

Shapes: B batch, L original sequence, S current sequence, D hidden.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs
from typing_extensions import override

from dpn_cli.families.text import TEXT_MODELS, TextModel
from dpn_cli.modeling.cache import PyramidCache
from dpn_cli.modeling.call import change_call, current_call
from dpn_cli.modeling.decisions import DecisionsMixin
from dpn_cli.modeling.experts.pool import Kernels
from dpn_cli.modeling.packing import KERNEL, Group, Packing
from dpn_cli.modeling.predictors import new_predictors
from dpn_cli.modeling.renamed import CACHE, WITH_MASK
from dpn_cli.modeling.routers import RouterHead, RouterLinear, RouterNorm, new_routers
from dpn_cli.modeling.sized import with_sizes
from dpn_cli.modeling.state import HIDDEN_IN_PART, PACKED, PyramidState, take_columns, visible_tokens
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.shape import DecoderShape


class PyramidTextMixin(DecisionsMixin):
    """Makes a text model of the Llama family a pyramid; with `pyramid.sites` empty it is the original."""

    # What the text model that stands beside the mixin brings.
    config: PreTrainedConfig
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    _from_config: Callable[..., "PyramidTextMixin"]

    def __init__(self, config: PreTrainedConfig, pyramid: PyramidConfig) -> None:
        _refuse_sliding_window(config)
        super().__init__(config)  # type: ignore[call-arg]
        self.pyramid = pyramid
        self.shape = DecoderShape.from_config(config.to_dict())
        self.default_routes: tuple[Route, ...] = pyramid.own_routes
        if pyramid.has_routers:
            self.routers = new_routers(config.hidden_size, pyramid)
        self.predictors = new_predictors(config.hidden_size, pyramid)
        if pyramid.pooling == "conv":
            self.poolers = nn.ModuleList(Kernels(config.hidden_size, site.experts) for site in pyramid.sites)
        self.freeze_choices()

    @property
    def segments(self) -> list[range]:
        """The decoder layers between sites."""
        return self.pyramid.segments(self.config.num_hidden_layers)

    @override
    def _init_weights(self, module: nn.Module) -> None:  # type: ignore[misc]  # of the text model beside the mixin
        """Initialise new parameters; a new pyramid changes nothing (its routers take 1×1) until calibrated."""
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, RouterHead):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RouterNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RouterLinear):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, Kernels):
            for kernel in module.parameters():
                init.constant_(kernel, 1 / (kernel.shape[1] * kernel.shape[2]))

    @override
    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        visual_coords: torch.Tensor | None = None,
        salience: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
        router_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the pyramid; the arguments that are not listed are those of the original text model.

        Args:
            past_key_values: the name of `cache` before transformers 5.24.
            visual_coords: [B, L, 3] (grid, row, col) of the visual tokens, -1 elsewhere; None without images.
            salience: [B, L] how much the vision tower attends to the visual tokens, where `reads_salience` asks for it.
            instruction: [B] or [1], the column of the last instruction token; by default the last valid one.
            router_tokens: [B, R] the columns of the tokens that the routers read, -1 where a sample has fewer; by
                default `instruction`.

        Returns:
            `last_hidden_state` [B, L, D]: a token that was merged away has the state of what it was merged into.

        Raises:
            ValueError: for a cache or a mask that a pyramid cannot use.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = self.new_cache()
        past = 0 if cache is None else cache.get_seq_length()
        packed = position_ids if attention_mask is None and cache is None and _starts_anew(position_ids) else None
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past

        state = self.start(
            inputs_embeds, attention_mask, position_ids, visual_coords, salience, instruction, router_tokens
        )
        if packed is not None:
            state = replace(state, packed=packed, refusal=PACKED)
        if state.coords is not None:
            _refuse_unfit(cache, attention_mask)
        state = self.run(state, cache, attention_mask, use_cache=use_cache, **kwargs)
        if state.coords is not None or past == 0:
            change_call(
                self,
                last_routes=state.routes or (self.pyramid.full_route,) * len(inputs_embeds),
                last_grids=state.image_grids or ((),) * len(inputs_embeds),
            )
        return BaseModelOutputWithPast(last_hidden_state=self.finish(state), **{CACHE: cache})

    def rebuild(self, pyramid: PyramidConfig) -> None:
        """Take another pyramid, with fresh routers where it has any, and of the predictors those that it needs."""
        self.pyramid = pyramid
        self.default_routes = pyramid.own_routes
        if pyramid.has_routers:
            self.routers = new_routers(self.config.hidden_size, pyramid).to(self.norm.get_parameter("weight").device)
            self.routers.apply(self._init_weights)
        self.predictors = nn.ModuleDict({name: self.predictors[name] for name in pyramid.predictors})
        self.freeze_choices()

    def freeze_choices(self) -> None:
        """Keep from training what no loss reaches, since it only chooses: predictors, and routers without a gate."""
        self.predictors.requires_grad_(False)
        if self.pyramid.has_routers:
            self.routers.requires_grad_(self.pyramid.gate != "none")

    def new_cache(self, offloading: bool = False) -> DynamicCache:
        """Return an empty cache that fits this pyramid."""
        return PyramidCache(self.config, len(self.segments), offloading)

    def start(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        visual_coords: torch.Tensor | None = None,
        salience: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
        router_tokens: torch.Tensor | None = None,
    ) -> PyramidState:
        """Describe a batch before the first layer; the arguments are `forward`'s."""
        batch, length = inputs_embeds.shape[:2]
        valid = None
        if attention_mask is not None and attention_mask.ndim == 2:
            valid = attention_mask[:, -length:].to(inputs_embeds.device, torch.bool)
        if not current_call(self).pools or not self.pyramid.sites or visual_coords is None:
            return PyramidState(inputs_embeds, positions, None if valid is None or valid.all() else valid)
        if self.pyramid.router.token_id is not None and router_tokens is None:
            raise ValueError("the routers of this model read a special token: router_tokens must say where it is")
        index = torch.arange(length, device=inputs_embeds.device).expand(batch, -1)
        if instruction is None:
            instruction = index[:, -1] if valid is None else torch.where(valid, index, 0).amax(1)
        instruction = instruction.to(index.device).expand(batch)
        seen = visible_tokens(visual_coords, valid, index <= instruction[:, None])
        valid = valid if seen.is_padded else None
        if not any(seen.grids):
            return PyramidState(inputs_embeds, positions, valid)
        return PyramidState(
            hidden_states=inputs_embeds,
            positions=positions.expand(batch, -1).float(),
            valid=valid,
            coords=seen.coords,
            salience=salience,
            instruction=instruction,
            router_tokens=instruction[:, None] if router_tokens is None else router_tokens,
            grids=seen.grids,
            coord_grids=seen.grids,
            text_tokens=seen.text_tokens,
            lengths=seen.lengths,
            image_grids=seen.grids,
            routes=((),) * batch,
            refusal=HIDDEN_IN_PART if seen.in_part else "",
        )

    def run(
        self,
        state: PyramidState,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PyramidState:
        """Run all segments, and `reduce` between them where the batch has images; see `run_segment`."""
        reduce = current_call(self).reduce or self.reduce
        for segment in range(len(self.segments)):
            if segment > 0 and state.coords is not None:
                state = reduce(state, segment - 1)
            state = self.run_segment(state, segment, cache, attention_mask, **kwargs)
        return state

    def run_segment(
        self,
        state: PyramidState,
        segment: int,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PyramidState:
        """Run the decoder layers between two sites, if there are any; rows of unlike lengths packed.

        `attention_mask` is only looked at where the chunk has no pyramid of its own: with a cache that is not a
        `PyramidCache`, or when it is a ready 4-D mask.
        """
        layers = self.segments[segment]
        packing = self._packing(state, segment, cache, kwargs)
        positions = self._positions(state, segment, cache)
        if isinstance(cache, PyramidCache):
            mask = cache.extend(segment, state.mask, *state.hidden_states.shape[:2])
        else:
            mask = state.mask if cache is None else attention_mask
        if attention_mask is not None and attention_mask.ndim == 4:
            mask = attention_mask
        if not layers:
            return state
        if packing is not None:
            return self._run_packed(state, layers, packing, positions, cache, **kwargs)
        angles, device = state.angles, state.hidden_states.device
        if angles is None or positions is not state.positions or angles[0].device != device:
            angles = self.rotary_emb(state.hidden_states, position_ids=positions)
        causal_mask = self._causal_mask(state, mask, cache, layers.start)
        hidden_states = self._run_layers(
            layers, state.hidden_states, causal_mask, angles, cache, state.packed, **kwargs
        )
        return replace(state.after(hidden_states), angles=angles if positions is state.positions else None)

    def _run_packed(
        self,
        state: PyramidState,
        layers: range,
        packing: Packing,
        positions: torch.Tensor,
        cache: Cache | None,
        **kwargs: Any,
    ) -> PyramidState:
        """Run some layers on the rows of a batch one after another, and lay the results out as the batch was."""
        row = packing.pack(state.hidden_states)
        angles = self.rotary_emb(row, position_ids=packing.pack(positions))
        mask = packing.mask(partial(self._group_mask, state, layers.start))
        with cache.laying_out(packing) if isinstance(cache, PyramidCache) else nullcontext():
            row = self._run_layers(layers, row, mask, angles, cache, **kwargs)
        return state.after(packing.lay_out(row))

    def _run_layers(
        self,
        layers: range,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run some decoder layers."""
        for decoder_layer in self.layers[layers.start : layers.stop]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=angles,
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
        return hidden_states

    def _causal_mask(
        self, state: PyramidState, mask: torch.Tensor | None, cache: Cache | None, layer_idx: int
    ) -> torch.Tensor | None:
        """Return the mask of a segment's layers, from that of their keys [B, K].

        The positions of merged tokens must not reach it or the layers: gaps would read as packed samples.
        """
        length, dtype = state.hidden_states.shape[1], state.hidden_states.dtype
        if mask is None and length == 1:  # a single token sees all before it
            return None
        sizes = mask if mask is not None and mask.ndim == 2 and mask.is_floating_point() else None
        if sizes is not None:
            _refuse_kernel(self.config._attn_implementation)
            if length == 1:
                return with_sizes((sizes > 0)[:, None, None], sizes, length, dtype)
        causal = create_causal_mask(
            config=self.config,
            inputs_embeds=state.hidden_states,
            attention_mask=mask,
            layer_idx=layer_idx,
            position_ids=state.packed,
            **{CACHE: cache},
            **({} if mask is None else WITH_MASK),
        )
        return causal if sizes is None else with_sizes(causal, sizes, length, dtype)

    def _group_mask(self, state: PyramidState, layer_idx: int, group: Group) -> torch.Tensor | None:
        """Return the mask of the attention of some rows, laid out for themselves."""
        mask = None if group.places is None and state.sizes is None else state.mask
        part = replace(state, hidden_states=state.hidden_states.new_empty(group.count, group.longest, 0))
        return self._causal_mask(part, None if mask is None else group.of_batch(mask), None, layer_idx)

    def _packing(
        self, state: PyramidState, segment: int, cache: Cache | None, kwargs: dict[str, Any]
    ) -> Packing | None:
        """Return how to pack the rows of a first chunk where pooling has left them with unlike lengths."""
        is_first = cache is None or (isinstance(cache, PyramidCache) and cache.lengths[segment] == 0)
        if state.valid is None or state.columns is None or not is_first or self._records(kwargs):
            return None
        layers = self.segments[segment]
        if not layers or self.config._attn_implementation != KERNEL or _is_compiled(self.layers[layers.start]):
            return None
        rows = (state.lengths, state.valid.shape[1], state.valid.device)
        return Packing.of(*rows) if Packing.pays(*rows) else None

    def _records(self, kwargs: dict[str, Any]) -> bool:
        """Say whether the outputs of every layer are wanted, which come from one call per layer."""
        return any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )

    def _positions(self, state: PyramidState, segment: int, cache: Cache | None) -> torch.Tensor:
        """Return the rotary positions [B, S] of a segment."""
        if self.pyramid.positions == "persistent" or segment == 0 or not current_call(self).pools:
            return state.positions
        past = cache.num_valid(segment) if isinstance(cache, PyramidCache) else 0
        if state.valid is not None:
            return (state.valid.cumsum(1) - 1).clamp(min=0) + past
        return torch.arange(state.hidden_states.shape[1], device=state.hidden_states.device)[None] + past

    def finish(self, state: PyramidState) -> torch.Tensor:
        """Apply the final norm and lay the states out as the original tokens were: [B, L, D]."""
        state = state.after(self.norm(state.hidden_states))
        hidden_states = state.hidden_states
        if state.columns is None:
            return hidden_states
        return take_columns(hidden_states, state.columns)


def _with_pyramid(text: TextModel) -> type[PyramidTextMixin]:
    """Make transformers' class of a text model one with a pyramid, and a name of this module, as pickle needs it."""
    name, stock = f"Pyramid{text.class_name}", getattr(transformers, text.class_name)
    globals()[name] = made = type(name, (PyramidTextMixin, stock), {"__module__": __name__})
    return made


PYRAMID_TEXT_MODELS = {model_type: _with_pyramid(record) for model_type, record in TEXT_MODELS.items()}


def _is_compiled(layer: nn.Module) -> bool:
    """Say whether a layer is compiled by itself: it would be again for every packing, which is part of the graph."""
    return layer._compiled_call_impl is not None or hasattr(layer, "_orig_mod")


def _starts_anew(position_ids: torch.Tensor | None) -> bool:
    """Say whether position ids [B, L] do not rise one by one: rows are packed."""
    return position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())


def _refuse_sliding_window(config: PreTrainedConfig) -> None:
    if TEXT_MODELS[config.model_type].has_window(config.to_dict()):
        raise ValueError(
            f"this {config.model_type} model uses sliding-window attention, whose window would count pooled tokens; "
            "a pyramid needs full attention in every layer (set sliding_window to null if the context allows it)"
        )


def _refuse_kernel(name: str) -> None:
    if name not in ("sdpa", "eager"):
        raise ValueError(
            "pyramid.attention: sized needs attn_implementation sdpa or eager, which take a mask of numbers, not "
            f"{name}; or convert with --set pyramid.attention=plain"
        )


def _refuse_unfit(cache: Cache | None, attention_mask: torch.Tensor | None) -> None:
    if cache is not None and not isinstance(cache, PyramidCache):
        raise ValueError(
            f"a pyramid holds a different number of tokens in every segment, which {type(cache).__name__} cannot; "
            "pass one from model.new_cache(), or none and let the model make it"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("a pyramid needs the 2-D attention mask [batch, tokens], not a ready-made 4-D one")
