"""Predictors learn which visual tokens the whole model attends to while it reads a question and answers it.

One forward pass of the model without its pyramid shows, for every visual token, the largest attention of any head and
any of the last text tokens after it, the mean over the layers. A predictor is fitted to foresee these shares from what
there is before its site. Of a sample with more visual tokens than `TOKENS`, a run of neighbours is kept for that, so
that large images do not fill the disk.
Source: ours.

Shapes: B batch, S sequence, V visual tokens that are kept, T text tokens, D hidden.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from dpn_cli.calibration.job import Job
from dpn_cli.calibration.passes import start_batch
from dpn_cli.data.encoding import Encoded, Example, collate
from dpn_cli.data.samples import Sample
from dpn_cli.inference.threads import one_thread
from dpn_cli.modeling.experts.attention import attention_from
from dpn_cli.modeling.predictors import Predictor, last_columns, last_text, new_predictors
from dpn_cli.modeling.state import PyramidState, take_columns
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.calibration_recipe import PredictorRecipe
from dpn_cli.pyramid.config import Site
from dpn_cli.pyramid.experts import KEEP, num_tokens
from dpn_cli.pyramid.predictors import READ_TEXT

TOKENS = 576  # visual tokens of a sample to learn from, at most: those of a picture of LLaVA-1.5
LEARNING_RATE, BASE_SIZE = 6e-3, 128  # the rate for a hidden size; that of sums over it falls with one over the size
WEIGHT_DECAY = 0.05
LARGEST_STEP = 1.0  # norm of the gradient
HELD_OUT = 8  # every so many batches, one judges

Watched = dict[str, torch.Tensor]
"""What `watch_attention` returns of a batch: up to 6 MB a sample at seven billion parameters, which stay on disk."""


def learn_predictors(job: Job, samples: Sequence[Sample]) -> None:
    """Give the model fitted predictors, where it, or a candidate of the survey, needs any."""
    model, recipe, settings = job.model, job.recipe, job.recipe.predictors or PredictorRecipe()
    pyramid = job.candidates or model.pyramid
    if not pyramid.predictor_layers:
        return
    with job.processes.as_one():
        examples = Encoded(samples[: settings.samples], job.processor, recipe.answer_tokens)
        pad, size = job.processor.tokenizer.pad_token_id, recipe.batch_size
        batches = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
    kept = job.state.attention if job.state else None

    def watch(i: int) -> Watched:
        return watch_attention(model, [examples[row] for row in batches[i]], pyramid.predictor_layers, pad, seed=i)

    with job.reporter.progress("watching attention", len(examples)) as advance:
        job.processes.share(len(batches), watch, lambda i, watched: advance(len(batches[i])), kept)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        predictors = new_predictors(model.text_model.shape.hidden_size, pyramid)
    if kept is not None:
        predictors.to(model.device)
        with job.reporter.progress("fitting predictors", settings.epochs * len(predictors)) as advance:
            for name, (_, layer) in pyramid.predictors.items():
                fit_predictor(
                    cast("Predictor", predictors[name]),
                    layer,
                    len(batches),
                    lambda i: kept.load(i) or watch(i),
                    settings.epochs,
                    recipe.seed,
                    advance,
                )
    predictors.load_state_dict(job.processes.agree(predictors.cpu().state_dict()))
    model.text_model.predictors = predictors.requires_grad_(False).to(model.device)


@torch.no_grad()
def watch_attention(
    model: PyramidGenerationMixin, examples: Sequence[Example], layers: Sequence[int], pad: int, seed: int = 0
) -> Watched:
    """Return what predictors before some layers read of a batch, and what they should foresee.

    Args:
        model: in eval mode; runs without its pyramid.
        examples: samples with images and answers.
        layers: the indices of the layers.
        pad: the token that fills up the shorter samples.
        seed: Random seed for the runs of tokens that are kept.

    Returns:
        For every layer l `l.tokens` [B, V, D], `l.text` [B, T, D] in float16 and `l.is_text` [B, T]; `coords`
        [B, V, 3], -1 where a sample has fewer tokens; and `attention` [B, V], the share of each, 0 where there is none.
    """
    text_model: Any = model.text_model
    sites = tuple(Site(layer - 1, (KEEP,)) for layer in range(len(text_model.layers)))
    watched: Watched = {}
    with model.as_pyramid(replace(model.pyramid.with_all_routes(), sites=sites, budgets=(), gate="none")):
        state = start_batch(model, collate(examples, pad, model.device))
        follows = _follows_image(state)
        readers, is_reader = last_columns(follows, min(READ_TEXT, int(follows.sum(1).max())))
        kept, is_kept = _some_visual(state, seed)
        assert state.coords is not None
        coords = take_columns(state.coords, kept).masked_fill(~is_kept[..., None], -1)
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
    attention = total / total.sum(1, keepdim=True).clamp(min=1e-9)
    return watched | {"coords": coords.short().cpu(), "attention": attention}


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


def _some_visual(state: PyramidState, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns of visual tokens [B, V], and which of them there are: all, or a random run of neighbours."""
    assert state.coords is not None
    is_visual = state.coords[..., 0] >= 0
    number, count = is_visual.cumsum(1) - 1, is_visual.sum(1, keepdim=True)
    share = torch.rand(count.shape, generator=torch.Generator().manual_seed(seed)).to(count.device)
    first = (share * (count - TOKENS + 1).clamp(min=1)).long()
    kept = is_visual & (number >= first) & (number < first + TOKENS)
    return last_columns(kept, min(TOKENS, max(map(num_tokens, state.grids))))


@one_thread()
def fit_predictor(
    predictor: Predictor,
    layer: int,
    count: int,
    load: Callable[[int], Watched],
    epochs: int,
    seed: int,
    advance: Callable[[int], None] = lambda epochs: None,
) -> None:
    """Fit a predictor in place, and leave it as it was where it did best on batches that it was not fitted to.

    The loss is the cross-entropy between the foreseen shares of attention and those that were paid.

    Args:
        predictor: which is frozen afterwards.
        layer: the index of the layer after its site.
        count: Number of batches.
        load: returns what was watched of one.
        epochs: passes over them.
        seed: Random seed for their order.
        advance: called after every epoch.
    """
    held = range(0, count, HELD_OUT)
    learned = [i for i in range(count) if i not in held] or list(held)
    groups = _parameters(predictor.requires_grad_(True))
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, epochs * len(learned))
    generator, best = torch.Generator().manual_seed(seed), (math.inf, deepcopy(predictor.state_dict()))
    for _ in range(epochs):
        for i in torch.randperm(len(learned), generator=generator).tolist():
            optimizer.zero_grad()
            _loss(predictor, layer, load(learned[i])).backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), LARGEST_STEP)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            judged = sum(_loss(predictor, layer, load(i)).item() for i in held)
        best = min(best, (judged, deepcopy(predictor.state_dict())), key=lambda each: each[0])
        advance(1)
    predictor.load_state_dict(best[1])
    predictor.requires_grad_(False)


def _parameters(predictor: Predictor) -> list[dict[str, Any]]:
    """Return the parameters in two groups with a learning rate each: weights of sums over the hidden size, and others.

    The larger a sum is, the smaller are the steps of its weights.
    """
    over_hidden = {f"{name}.weight" for name in predictor.READS}
    wide = [each for name, each in predictor.named_parameters() if name in over_hidden]
    rest = [each for name, each in predictor.named_parameters() if name not in over_hidden]
    rate = LEARNING_RATE * BASE_SIZE / wide[0].shape[1]
    return [{"params": wide, "lr": rate}, {"params": rest, "lr": LEARNING_RATE}]


def _loss(predictor: Predictor, layer: int, watched: Watched) -> torch.Tensor:
    device = next(predictor.parameters()).device
    tokens, text, is_text = (watched[f"{layer}.{name}"].to(device) for name in ("tokens", "text", "is_text"))
    coords, attention = watched["coords"].to(device), watched["attention"].to(device)
    scores = predictor(tokens, coords, text, is_text).masked_fill(attention == 0, -torch.inf)
    foreseen = scores.log_softmax(-1).masked_fill(attention == 0, 0)
    return -(attention * foreseen).sum(-1).mean()
