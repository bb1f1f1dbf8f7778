"""Odd values in a checkpoint's small files: convert refuses what could not run, with the file and the key."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpn_cli.checkpoint.headers import GENERATION_FILE, PROCESSOR_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from dpn_cli.cli import main
from tests.faults.damage import CONFIG, put

NAN, HUGE = float("nan"), 10**30
WRONG: tuple[Any, ...] = ("x", -1, 0, HUGE, NAN, None, [], {}, [3], 0.5, True)

# Where values are put, by file.
PLACES = {
    CONFIG: (
        "dtype", "projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer", "tie_word_embeddings",
        "pad_token_id", "eos_token_id", "return_dict", "is_encoder_decoder", "attn_implementation", "id2label",
        "num_labels", "image_seq_length", "architectures",
        *(
            f"text_config.{key}"
            for key in (
                "hidden_act", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
                "attention_dropout", "attention_bias", "head_dim", "pad_token_id", "eos_token_id", "dtype",
                "max_position_embeddings", "layer_types", "use_cache",
                "num_labels", "id2label", "initializer_range", "output_attentions",
            )
        ),
        *(
            f"vision_config.{key}"
            for key in (
                "hidden_act", "layer_norm_eps", "num_attention_heads", "num_channels", "attention_dropout", "dtype",
                "projection_dim", "image_size", "num_labels",
            )
        ),
    ),
    GENERATION_FILE: (
        "eos_token_id", "bos_token_id", "pad_token_id", "max_length", "min_length", "max_new_tokens", "temperature",
        "top_p", "num_beams", "num_return_sequences", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
        "suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "cache_implementation",
        "prefill_chunk_size", "stop_strings", "guidance_scale", "watermarking_config", "output_attentions",
        "return_dict_in_generate", "prompt_lookup_num_tokens", "max_time",
    ),
    TOKENIZER_CONFIG_FILE: (
        "tokenizer_class", "model_max_length", "padding_side", "bos_token", "eos_token", "pad_token", "unk_token",
        "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "backend", "model_input_names",
        "processor_class", "chat_template", "add_prefix_space",
    ),
    TOKENIZER_FILE: (
        "model", "model.type", "model.unk_token", "pre_tokenizer", "post_processor", "normalizer", "decoder",
        "added_tokens", "truncation", "padding",
    ),
    PROCESSOR_FILE: (
        "processor_class", "patch_size", "num_additional_image_tokens", "image_token", "vision_feature_select_strategy",
        "chat_template", "audio_tokenizer", "tokenizer", "image_processor",
        *(
            f"image_processor.{key}"
            for key in (
                "image_processor_type", "size", "crop_size", "do_resize", "do_pad", "resample", "rescale_factor",
                "image_mean", "image_std", "data_format", "input_data_format", "return_tensors", "device",
            )
        ),
    ),
}  # fmt: skip

REFUSED = [
    (CONFIG, "text_config.hidden_act", "foo"),
    (CONFIG, "text_config.rms_norm_eps", "1e-5"),
    (CONFIG, "text_config.rope_parameters", {"rope_type": "linear", "factor": "x", "rope_theta": 1e4}),
    (CONFIG, "text_config.eos_token_id", [2, "x"]),
    (CONFIG, "vision_config.layer_norm_eps", "x"),
    (CONFIG, "dtype", "int8"),
    pytest.param(CONFIG, "is_encoder_decoder", True, marks=pytest.mark.slow),  # seconds, for the search of the key
    (CONFIG, "return_dict", {}),
    (CONFIG, "multimodal_projector_bias", 0),
    (CONFIG, "vision_feature_layer", "x"),
    (CONFIG, "text_config.attention_bias", 0.5),
    (CONFIG, "text_config.head_dim", True),
    (CONFIG, "vision_config.num_channels", []),
    (CONFIG, "vision_config.image_size", "48"),
    (GENERATION_FILE, "eos_token_id", "x"),
    (GENERATION_FILE, "cache_implementation", "static"),
    (GENERATION_FILE, "min_length", "x"),
    (GENERATION_FILE, "output_hidden_states", [None]),
    (GENERATION_FILE, "num_beams", "many"),
    (GENERATION_FILE, "num_beams", 0),
    (GENERATION_FILE, "temperature", "hot"),
    (GENERATION_FILE, "return_dict_in_generate", 3),
    (TOKENIZER_CONFIG_FILE, "padding_side", "middle"),
]


@pytest.mark.parametrize(("file", "key", "value"), REFUSED)
def test_file_and_key_are_named(
    source: Path, capsys: pytest.CaptureFixture[str], file: str, key: str, value: object
) -> None:
    put(source / file, *key.split("."), value=value)
    assert main(["convert", str(source), "-o", "out"]) == 3
    message = capsys.readouterr().err
    assert re.match(rf"Error: {source / file} has the (impossible )?{key} ", message) and message.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"source"}


def cases() -> Iterator[tuple[str, str, object]]:
    """Yield every place with a few of the wrong values, in turn."""
    places = [(file, key) for file, keys in PLACES.items() for key in keys]
    for i, (file, key) in enumerate(places):
        for j in range(3):
            yield file, key, WRONG[(i + 4 * j) % len(WRONG)]


@pytest.mark.slow
@pytest.mark.parametrize("file", PLACES)
def test_what_is_converted_runs(source: Path, picture: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    good = (source / file).read_bytes()
    wrong = []
    for _, key, value in (case for case in cases() if case[0] == file):
        (source / file).write_bytes(good)
        put(source / file, *key.split("."), value=value)
        codes = {"convert": main(["convert", str(source), "-o", "out"])}
        if codes["convert"] == 0:
            ask = ["run", "--model", "out", "--image", str(picture), "what colour ?", "--max-new-tokens", "2"]
            codes["run"] = main(ask)
            codes["export"] = main(["export", "--model", "out", "-o", "exported", "--uncalibrated"])
            for name in ("out", "exported"):
                shutil.rmtree(name, ignore_errors=True)
        said = capsys.readouterr().err
        if codes["convert"] not in (0, 3) or any(list(codes.values())[1:]) or "unexpected" in said:
            wrong.append((key, value, codes, said[-300:]))
    assert wrong == []
