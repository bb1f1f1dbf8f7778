"""The subject of the second teacher: posters, a SigLIP tower without a class token, and a Qwen2 decoder."""

from pathlib import Path

from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from tools.second_teacher.drawing import draw
from tools.second_teacher.labels import CLASSES, patch_labels
from tools.second_teacher.questions import GRAINS, ask, corpus
from tools.second_teacher.scene import GRID, PATCH, SIZE, posters
from tools.teacher.assembly import CHAT_TEMPLATE, MEAN, STD, assembled, build_tokenizer, special_ids
from tools.teacher.subject import Subject

WIDTH = 96
WEIGHTS = {"paper": 0.3, "count": 0.8, "colour": 0.5, "side": 2.0, "word": 0.8, "ink": 1.2, "corner": 1.2, "badge": 2.0}


def build_processor() -> LlavaProcessor:
    """Build the processor: image normalisation, tokenizer and chat template."""
    image_processor = SiglipImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(corpus()),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Build the untrained teacher."""
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.06,
        **special_ids(tokenizer),
    )
    return assembled(tokenizer, vision, text, "full")


SECOND = Subject(
    grid=GRID,
    grains=GRAINS,
    weights=WEIGHTS,
    classes=CLASSES,
    written="letter",
    after_projector=True,
    text=96,
    answers=22,
    scenes=posters,
    draw=draw,
    labels=patch_labels,
    ask=ask,
    ask_on=None,
    card=Path(__file__).parent,
    build_processor=build_processor,
    build_model=build_model,
)
