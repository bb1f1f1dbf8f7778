"""A quantised export is what quantising on loading gives, byte for byte and logit for logit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpn_cli.checkpoint.headers import Checkpoint, read_json
from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.checkpoint.quantisation import SKIPPED
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.exporting.quantise import SCHEMES
from dpn_cli.families.tensors import memory_name
from dpn_cli.inference.loading import load_model
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from tests.exporting.test_export import in_fresh_process
from tests.exports import question, stored


def quantised_on_loading(folder: Path, scheme: str, dtype: str) -> DpnLlavaForConditionalGeneration:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=scheme == "nf4", load_in_8bit=scheme == "int8", bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=SKIPPED,
    )  # fmt: skip
    return DpnLlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("nf4", "bf16"),
        ("int8", None),
        pytest.param("nf4", None, marks=pytest.mark.slow),
        pytest.param("int8", "bf16", marks=pytest.mark.slow),
    ],
)
def test_it_equals_quantising_on_loading(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path, scheme: Any, dtype: str | None
) -> None:
    folder = make_converted()
    done = export(
        folder, tmp_path / "out", ExportOptions(quantize=scheme, dtype=dtype, max_shard_size="300KB", verify=True)
    )
    assert done.num_verified and len(done.files) > 1
    expected = quantised_on_loading(folder, scheme, "bfloat16" if dtype else "float32")
    expected.save_pretrained(tmp_path / "saved")
    saved = {memory_name(name): content for name, content in stored(tmp_path / "saved").items()}
    assert stored(tmp_path / "out") == saved
    inputs = question(folder, picture)
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (expected, load_model(tmp_path / "out"))]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [("nf4", "bfloat16"), pytest.param("int8", "bfloat16", marks=pytest.mark.slow), ("int8", "float16")],
)
def test_it_runs_in_another_dtype_than_it_is_stored_in(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path, scheme: Any, dtype: str
) -> None:
    folder = make_converted()
    export(folder, tmp_path / "out", ExportOptions(quantize=scheme))
    inputs = question(folder, picture)
    model = load_model(tmp_path / "out", dtype=dtype)
    assert {str(p.dtype) for p in model.parameters() if p.is_floating_point()} == {f"torch.{dtype}", "torch.float32"}
    with torch.no_grad():
        expected, found = (each(**inputs).logits.float() for each in (load_model(tmp_path / "out"), model))
    assert (found.softmax(-1) - expected.softmax(-1)).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_it_loads_where_dpn_is_not_installed(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path, scheme: Any
) -> None:
    export(make_converted(), tmp_path / "out", ExportOptions(quantize=scheme))
    found = in_fresh_process(tmp_path / "out", picture, tmp_path)
    assert found["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert found["piped"].strip() == found["text"]


def test_only_the_decoder_is_quantised_and_inspected_as_what_it_is(
    make_converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_converted("qwen2", "new")
    export(folder, tmp_path / "out", ExportOptions(quantize="nf4"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stored in 4 bits (nf4)" in card and "pip install bitsandbytes" in card
    tensors = Checkpoint.open(tmp_path / "out").tensors
    packed = {name for name, tensor in tensors.items() if tensor.dtype == "U8" and name.endswith(".weight")}
    assert len(packed) == 8 * 7 and all(".layers." in name and "language_model" in name for name in packed)
    before, after = inspect_checkpoint(folder), inspect_checkpoint(tmp_path / "out")
    assert [(part.name, part.parameters) for part in after.parts] == [(p.name, p.parameters) for p in before.parts]
    assert after.routes == before.routes
    sizes = {part.name: (part.nbytes, full.nbytes) for part, full in zip(after.parts, before.parts, strict=True)}
    assert sizes["language_model"][0] < 0.5 * sizes["language_model"][1]
    assert all(new == old for name, (new, old) in sizes.items() if name != "language_model")


def test_what_4_bits_cannot_take_is_left_and_named(tiny_llava: Path, picture: Path, tmp_path: Path) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(tiny_llava)
    config.text_config.num_key_value_heads = 1  # k_proj and v_proj are [16, 64]
    source = tmp_path / "source"
    LlavaForConditionalGeneration(config).save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        (source / file).write_bytes((tiny_llava / file).read_bytes())
    folder = convert(str(source), output=tmp_path / "source-dpn").output
    export(folder, tmp_path / "out", ExportOptions(quantize="nf4", uncalibrated=True))
    tensors = Checkpoint.open(tmp_path / "out").tensors
    skipped = read_json(tmp_path / "out" / "config.json")["quantization_config"]["llm_int8_skip_modules"]
    for i in range(8):
        for layer, dtype in (("k_proj", "F32"), ("v_proj", "F32"), ("q_proj", "U8")):
            module = f"model.language_model.layers.{i}.self_attn.{layer}"
            assert tensors[f"{module}.weight"].dtype == dtype
            assert (module in skipped) == (dtype == "F32")
    with torch.no_grad():
        assert load_model(tmp_path / "out")(**question(folder, picture)).logits.isfinite().all()


@pytest.mark.parametrize("shape", [(32, 64), (96, 80), (32, 65)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pieces_quantise_as_the_whole(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    made: dict[str, list[torch.Tensor]] = {}
    for name, tensor in SCHEMES["nf4"].quantised("w", shape, weight.flatten().split(640)):
        made.setdefault(name, []).append(tensor)
    expected = {"w": packed} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert made.keys() == expected.keys()
    assert all(torch.equal(torch.cat(parts), expected[name]) for name, parts in made.items())
    planned = SCHEMES["nf4"].stored("w", str(dtype).removeprefix("torch."), shape)
    assert {name: shape for name, (_, shape) in planned.items()} == {n: tuple(t.shape) for n, t in expected.items()}


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_an_adapter_is_merged_before(make_converted: Callable[..., Path], tmp_path: Path, scheme: Any) -> None:
    folder = make_converted()
    module = "base_model.model.model.language_model.layers.2.mlp.down_proj"
    random = torch.Generator().manual_seed(0)
    down, up = (torch.randn(size, generator=random) for size in ((4, 128), (64, 4)))
    adapter = folder / "calibration" / "adapter"
    adapter.mkdir()
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 8, "r": 4})
    config = read_json(folder / "config.json")
    config["pyramid"]["calibration"]["adapter"] = "calibration/adapter"
    write_json(folder / "config.json", config)
    export(folder, tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "twice", ExportOptions(quantize=scheme))
    export(folder, tmp_path / "once", ExportOptions(quantize=scheme))
    assert stored(tmp_path / "once") == stored(tmp_path / "twice")
    up[5, 1] = torch.nan
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter has NaN or infinite values for .*layers\.2\.mlp\.down_proj"):
        export(folder, tmp_path / "broken", ExportOptions(quantize=scheme))


def test_a_quantised_export_is_no_source(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_converted()
    export(folder, tmp_path / "out", ExportOptions(quantize="int8"))
    with pytest.raises(CheckpointError, match="is a quantised export: start from the folder"):
        export(tmp_path / "out", tmp_path / "again")


def test_a_value_that_8_bits_scales_cannot_hold_is_refused(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = make_converted()
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"][0, 0] = 70_000
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has values above 65504.*nf4"):
        export(folder, tmp_path / "out", ExportOptions(quantize="int8"))
