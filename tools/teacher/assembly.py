"""The parts of the teacher before training: tokenizer, processor, and a LLaVA of the right shape."""

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from dpn_cli.demo.pictures import PATCH, SIZE, corpus

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
MEAN, STD = 0.5, 0.5
WIDTH, TOWER_WIDTH = 128, 160
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}"
    "{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}"
    "{% endfor %}"
    "{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def prompt(question: str) -> str:
    """Phrase a question as the teacher expects it."""
    return f"USER: {IMAGE}\n{question} ASSISTANT:"


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: a word in small letters is one token, a capital or digit one of its own."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(
        Regex(r" ?(?:USER|ASSISTANT):| ?[A-Z]?[a-z]+| ?[A-Z]| ?[0-9]| ?[^\sA-Za-z0-9]|\s"), behavior="isolated"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *["USER: ASSISTANT:", " ASSISTANT:"] * 9], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Build the processor: image normalisation, tokenizer and chat template."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(corpus()),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Build the untrained teacher: CLIP vision tower, projector and Llama decoder."""
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=3 * TOWER_WIDTH,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=TOWER_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.06,
        **special_ids(tokenizer),
    )
    return assembled(tokenizer, vision, text, "default")


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the ids of the special tokens, as configs name them."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def assembled(
    tokenizer: PreTrainedTokenizerFast, vision: PreTrainedConfig, text: PreTrainedConfig, strategy: str
) -> LlavaForConditionalGeneration:
    """Build an untrained LLaVA of a tower and a decoder.

    Args:
        tokenizer: Tokenizer of the teacher.
        vision: Config of the vision tower.
        text: Config of the decoder.
        strategy: `default` leaves the tower's class token out, `full` takes all that it gives.
    """
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)  # about the size of what the projector puts beside them
    model.generation_config = GenerationConfig(**special_ids(tokenizer))
    return model
