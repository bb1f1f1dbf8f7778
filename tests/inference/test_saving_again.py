"""Models that are loaded, changed and saved with transformers: their code goes along."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dpn_cli.exporting.export import export
from dpn_cli.inference.loading import load_model
from tests.elsewhere import run_elsewhere
from tests.exports import question

ELSEWHERE = """
import sys
import torch
from transformers import AutoModelForImageTextToText
folder, again = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
model.save_pretrained(again)
inputs = torch.load("inputs.pt")
print(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist(), model.last_routes)
"""


@pytest.mark.parametrize("source", ["converted", pytest.param("exported", marks=pytest.mark.slow)])
def test_a_merged_adapter_loads_where_dpn_is_not_installed(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path, source: str
) -> None:
    import peft
    import torch

    folder = make_converted()
    if source == "exported":
        export(folder, tmp_path / "export")
    model = load_model(tmp_path / "export" if source == "exported" else folder)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=r".*layers\.7\..*_proj", init_lora_weights=False)
    )
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "saved")
    inputs = question(folder, picture)
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    expected = f"{merged.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()} {merged.last_routes}"
    for saved, again in (("saved", "saved there"), ("saved there", "last")):
        assert run_elsewhere(ELSEWHERE, saved, again, cwd=tmp_path).strip() == expected
