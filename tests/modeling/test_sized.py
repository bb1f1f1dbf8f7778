"""A token that others were merged into is attended to as if they were all there."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dpn_cli.modeling.sized import with_sizes
from dpn_cli.pyramid.config import Site
from dpn_cli.pyramid.experts import KEEP, Expert
from tests.pyramids import collate, prompt, ragged_batch


@pytest.mark.parametrize("is_bool", [True, False])
def test_a_key_of_size_n_is_n_equal_keys(is_bool: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 8, generator=generator).double() for length in (3, 6, 6))
    sizes = torch.tensor([0, 1, 3, 2, 1, 1])  # the first is padding; the queries are the last three tokens
    causal = torch.ones(3, 6, dtype=torch.bool).tril(3) & (sizes > 0)
    mask = causal if is_bool else torch.where(causal, 0.0, -torch.inf).double()
    found = F.scaled_dot_product_attention(
        query, key, value, attn_mask=with_sizes(mask[None, None], sizes[None].float(), 3, torch.float64)
    )
    repeated = [each.repeat_interleave(sizes, dim=2) for each in (key, value)]
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=causal.repeat_interleave(sizes, dim=1))
    assert (found - expected).abs().max() < 1e-6, "logarithms are of float32"


def test_padding_that_sees_nothing_has_no_gradient() -> None:
    """A label of the first token of a left-padded row reads the padding before it."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    mask[..., :30, :] = False
    gradients = []
    for given in (mask, with_sizes(mask, torch.ones(1, 40), 40, torch.float32)):
        generator.manual_seed(0)
        states = [torch.randn(1, 2, 40, 8, generator=generator, requires_grad=True) for _ in range(3)]
        F.scaled_dot_product_attention(*states, attn_mask=given).sum().backward()
        gradients.append(torch.stack([each.grad for each in states]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6


def test_without_padding_the_mask_is_the_causal_one() -> None:
    sizes = torch.tensor([[1.0, 4.0, 1.0]])
    mask = with_sizes(None, sizes, 2, torch.float32)
    assert mask.shape == (1, 1, 2, 3)
    assert torch.equal(mask[0, 0, 1], sizes[0].log()) and mask[0, 0, 0, 2] < -1e30


def settings(attention: str, name: str, layer: int = 2) -> dict[str, Any]:
    """Return the settings of a static pyramid with one site."""
    sites = (Site(layer, (KEEP, Expert.parse(name))),)
    return {"sites": sites, "static_route": (1,), "attention": attention, "min_visual_tokens": 1}


@pytest.mark.parametrize(("name", "differs"), [("1x2", True), ("attended:0.25+4x4", True), ("pick:2x2", False)])
def test_only_merged_tokens_change_anything(make_pair: Any, name: str, differs: bool) -> None:
    plain, sized = (make_pair(**settings(attention, name))[1] for attention in ("plain", "sized"))
    with torch.no_grad():
        logits = [model(**collate(ragged_batch())).logits for model in (plain, sized)]
    assert torch.equal(*logits) != differs


def test_kernels_are_the_same(make_pair: Any) -> None:
    """Eager attention, which is told of padding by numbers, and SDPA, which is told by yes and no."""
    batch = collate(ragged_batch())
    with torch.no_grad():
        logits = [make_pair(attn=attn, **settings("sized", "2x2"))[1](**batch).logits for attn in ("eager", "sdpa")]
    shown = batch["attention_mask"].bool()
    assert (logits[0] - logits[1])[shown].abs().max() < 1e-4


def test_kernels_without_a_mask_are_refused(make_pair: Any) -> None:
    _, model = make_pair(**settings("sized", "2x2", layer=-1))
    model.text_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"needs attn_implementation sdpa or eager.*flash_attention_2"):
        model(**prompt(1, 3, 5, seed=0))
