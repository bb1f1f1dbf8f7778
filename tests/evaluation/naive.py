"""A naive reference for baselines: the stock model's layers over one sample, with eager attention maps."""

from typing import Any

import torch

from dpn_cli.evaluation.baselines.baseline import Baseline
from dpn_cli.pyramid.shape import DecoderShape
from tests.pyramids import IMAGE, collate, ragged_batch

SHAPE = DecoderShape(8, 64, 128, 4, 2, 16, 304)
"""Of the tiny model's decoder."""


class Naive:
    """A decoder that runs layer by layer over one sample, and forgets tokens in between."""

    def __init__(self, stock: Any, sample: dict[str, torch.Tensor], features: torch.Tensor | None = None) -> None:
        """Embed a prompt, with the features [N, D] of its visual tokens or those of the stock model."""
        self.stock = stock
        self.text = stock.model.language_model
        self.is_visual = sample["input_ids"][0] == IMAGE
        self.hidden = self.text.embed_tokens(sample["input_ids"])
        if features is None:
            features = torch.cat(list(stock.model.get_image_features(sample["pixel_values"]).pooler_output))
        self.hidden[0, self.is_visual] = features
        self.positions = torch.arange(self.hidden.shape[1])[None]

    def run(self, layers: range) -> torch.Tensor:
        """Return the attention map of the last of some layers, [heads, S, S]."""
        length = self.hidden.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        weights = torch.empty(0)
        for layer in self.text.layers[layers.start : layers.stop]:
            embeddings = self.text.rotary_emb(self.hidden, self.positions)
            residual = self.hidden
            mixed, weights = layer.self_attn(
                layer.input_layernorm(self.hidden), attention_mask=mask, position_embeddings=embeddings
            )
            self.hidden = residual + mixed
            self.hidden = self.hidden + layer.mlp(layer.post_attention_layernorm(self.hidden))
        return weights[0]

    def keep(self, scores: torch.Tensor, count: int) -> None:
        """Keep the text and the best visual tokens."""
        visual = self.is_visual.nonzero()[:, 0]
        best = visual[scores[visual].topk(count).indices]
        kept = torch.cat([(~self.is_visual).nonzero()[:, 0], best]).sort().values
        self.hidden, self.positions = self.hidden[:, kept], self.positions[:, kept]
        self.is_visual = self.is_visual[kept]

    def logits(self) -> torch.Tensor:
        return self.stock.lm_head(self.text.norm(self.hidden))[0, -1]


def assert_batch_equals_one_by_one(model: Any, baseline: Baseline) -> None:
    """Hold a ragged batch's generated logits against those without a cache, and those of its samples alone."""
    samples = ragged_batch()
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    settings |= {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE]}
    with baseline.applied(model):
        together = model.generate(**collate(samples), **settings)
        uncached = model.generate(**collate(samples), **settings, use_cache=False)
        alone = [model.generate(**sample, **settings) for sample in samples]
    batch, plain = torch.stack(together.logits, 1), torch.stack(uncached.logits, 1)
    assert (batch - plain).abs().max() < 1e-4
    for i, one in enumerate(alone):
        assert (torch.stack(one.logits, 1)[0] - batch[i]).abs().max() < 1e-4
