"""Predictors learn which visual tokens the whole model attends to while it reads a question and answers it.

One forward pass of the model without its pyramid shows, for every visual token, the largest attention of any head and
any text token after it, the mean over the layers. A predictor is fitted to foresee these shares from what there is
before its site. Only some tokens of a sample are kept for that, so that memory does not grow with the images.
Source: ours.

Shapes: B batch, S sequence, V visual tokens that are kept, T text tokens, D hidden.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpn_cli.calibration.job import Job, start_afresh
from dpn_cli.calibration.passes import start_batch
from dpn_cli.data.encoding import Encoded, Example, collate
from dpn_cli.data.samples import Sample
from dpn_cli.inference.threads import one_thread
from dpn_cli.modeling.experts.attention import attention_from
from dpn_cli.modeling.predictors import last_columns, last_text, new_predictors
from dpn_cli.modeling.state import PyramidState, take_columns
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import Site
from dpn_cli.pyramid.experts import KEEP
from dpn_cli.pyramid.recipe import PredictorRecipe

TOKENS = 128  # visual tokens of a sample to learn from, at most
LEARNING_RATE, WIDTH = 4e-3, 128  # the rate for a hidden size; it falls with one over the size
WEIGHT_DECAY = 0.05
HELD_OUT = 8  # every so many batches, one judges

Watched = dict[str, torch.Tensor]
"""What `watch_attention` returns of a batch: up to 2 MB a sample at seven billion parameters, which stay on disk."""


def learn_predictors(job: Job, samples: Sequence[Sample]) -> None:
    """Give the model fitted predictors, where it, or a candidate of the survey, needs any."""
    model, recipe, settings = job.model, job.recipe, job.recipe.predictors or PredictorRecipe()
    pyramid = job.candidates or model.pyramid
    if not pyramid.predicted_layers:
        return
    with job.processes.as_one():
        examples = Encoded(samples[: settings.samples], job.processor, recipe.answer_tokens)
        pad, size = job.processor.tokenizer.pad_token_id, recipe.batch_size
        batches = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
    kept = job.state.attention if job.state else None

    def watch(i: int) -> Watched:
        return watch_attention(model, [examples[row] for row in batches[i]], pyramid.predicted_layers, pad)

    with job.reporter.progress("watching attention", len(examples)) as advance:
        job.processes.share(len(batches), watch, lambda i, watched: advance(len(batches[i])), kept)
    predictors = new_predictors(model.text_model.shape.hidden_size, pyramid)
    start_afresh(predictors)
    if kept is not None:
        predictors.to(model.device)
        with job.reporter.progress("fitting predictors", settings.epochs * len(predictors)) as advance:
            fit_predictors(
                predictors, len(batches), lambda i: kept.load(i) or watch(i), settings.epochs, recipe.seed, advance
            )
    predictors.load_state_dict(job.processes.agree(predictors.cpu().state_dict()))
    model.text_model.predictors = predictors.requires_grad_(False).to(model.device)


@torch.no_grad()
def watch_attention(
    model: PyramidGenerationMixin, examples: Sequence[Example], layers: Sequence[int], pad: int
) -> Watched:
    """Return what predictors before some layers read of a batch, and what they should foresee.

    Args:
        model: in eval mode; runs without its pyramid.
        examples: samples with images and answers.
        layers: the indices of the layers.
        pad: the token that fills up the shorter samples.

    Returns:
        For every layer l `l.tokens` [B, V, D], `l.text` [B, T, D] in float16 and `l.is_text` [B, T]; and
        `attention` [B, V], the share of every token, 0 where a sample has fewer of them.
    """
    text_model: Any = model.text_model
    sites = tuple(Site(layer - 1, (KEEP,)) for layer in range(len(text_model.layers)))
    watched: Watched = {}
    with model.as_pyramid(replace(model.pyramid.with_all_routes(), sites=sites, budgets=(), gate="none")):
        state = start_batch(model, collate(examples, pad, model.device))
        follows = _follows_image(state)
        readers, is_reader = last_columns(follows, int(follows.sum(1).max()))
        kept, is_kept = _some_visual(state)
        total = torch.zeros(kept.shape)
        for layer in range(len(text_model.layers)):
            state = text_model.run_segment(state, layer)  # up to the layer's input
            if layer in layers:
                text, is_text = last_text(state)
                parts = {
                    "tokens": _half(take_columns(state.hidden_states, kept)),
                    "text": _half(text),
                    "is_text": is_text,
                }
                watched |= {f"{layer}.{name}": values.cpu() for name, values in parts.items()}
            paid = attention_from(text_model, state, layer, readers)
            paid = paid.masked_fill(~is_reader[:, None, None, :, None], 0).amax((1, 2, 3))  # [B, S]
            total += paid.gather(1, kept).masked_fill(~is_kept, 0).float().cpu()
    return watched | {"attention": total / total.sum(1, keepdim=True).clamp(min=1e-9)}


def _half(values: torch.Tensor) -> torch.Tensor:
    """Return values in float16; what is beyond its range, as some activations of large models are, becomes its end."""
    end = torch.finfo(torch.float16).max
    return values.float().clamp(-end, end).half()


def _follows_image(state: PyramidState) -> torch.Tensor:
    """Return which tokens are text after the first visual token, answers included, [B, S] bool."""
    assert state.coords is not None
    is_visual = state.coords[..., 0] >= 0
    follows = is_visual.cumsum(1).gt(0) & ~is_visual
    return follows if state.valid is None else follows & state.valid


def _some_visual(state: PyramidState) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns of random visual tokens [B, V], and which of them there are."""
    assert state.coords is not None
    is_visual = state.coords[..., 0] >= 0
    order = torch.rand(is_visual.shape, generator=torch.Generator().manual_seed(0)).to(is_visual.device)
    places = order.masked_fill(~is_visual, -1).topk(min(TOKENS, is_visual.shape[1]), dim=1)
    return places.indices, places.values >= 0


@one_thread()
def fit_predictors(
    predictors: nn.ModuleDict,
    count: int,
    load: Callable[[int], Watched],
    epochs: int,
    seed: int,
    advance: Callable[[int], None] = lambda epochs: None,
) -> None:
    """Fit predictors in place, and leave each as it was where it did best on batches that it was not fitted to.

    The loss is the cross-entropy between the foreseen shares of attention and those that were paid.

    Args:
        predictors: by the index of the layer that they stand before.
        count: Number of batches.
        load: returns what was watched of one.
        epochs: passes over them.
        seed: Random seed for their order.
        advance: called after every epoch of every predictor.
    """
    held = range(0, count, HELD_OUT)
    learned = [i for i in range(count) if i not in held] or list(held)
    for layer, predictor in predictors.items():
        rate = LEARNING_RATE * WIDTH / load(0)[f"{layer}.tokens"].shape[-1]
        optimizer = torch.optim.AdamW(predictor.requires_grad_(True).parameters(), rate, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(learned))
        generator, best = torch.Generator().manual_seed(seed), (math.inf, deepcopy(predictor.state_dict()))
        for _ in range(epochs):
            for i in torch.randperm(len(learned), generator=generator).tolist():
                optimizer.zero_grad()
                _loss(predictor, layer, load(learned[i])).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                judged = sum(_loss(predictor, layer, load(i)).item() for i in held)
            best = min(best, (judged, deepcopy(predictor.state_dict())), key=lambda each: each[0])
            advance(1)
        predictor.load_state_dict(best[1])
        predictor.requires_grad_(False)


def _loss(predictor: nn.Module, layer: str, watched: Watched) -> torch.Tensor:
    device = next(predictor.parameters()).device
    tokens, text, is_text = (watched[f"{layer}.{name}"].to(device) for name in ("tokens", "text", "is_text"))
    attention = watched["attention"].to(device)
    scores = predictor(tokens, text, is_text).masked_fill(attention == 0, -torch.inf)
    foreseen = scores.log_softmax(-1).masked_fill(attention == 0, 0)
    return -(attention * foreseen).sum(-1).mean()
