"""Growing the decoder keeps its function to the last bit."""

import torch

from tools.teacher.assembly import build_model, build_tokenizer
from tools.teacher.grow import FRONT_BLOCKS, grow


def test_grown_model_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    model = build_model(build_tokenizer()).eval()
    grown = grow(model)
    ids = torch.tensor([[1, *[model.config.image_token_id] * model.config.image_seq_length, 7, 8, 9]])
    pixels = torch.randn(1, 3, 96, 96)
    before, after = (each(input_ids=ids, pixel_values=pixels).logits for each in (model, grown))
    assert torch.equal(before, after)
    layers = grown.config.text_config.num_hidden_layers
    assert layers == model.config.text_config.num_hidden_layers + FRONT_BLOCKS == len(grown.model.language_model.layers)
