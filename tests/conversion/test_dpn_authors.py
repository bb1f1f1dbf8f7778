"""An imported checkpoint of the authors gives what their evaluation gives.

The reference below is written from the description of their code: one sample, layer by layer, positions counted anew
in every layer, and while decoding from the length of that layer's own cache.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import dpn_cli
from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.cli import main
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError, RecipeError, UsageError
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.conftest import CHAT_TEMPLATE
from tests.originals import Original

ROUTER, IMAGE, PAD = "<ROUTER>", 340, 341
OLD_ROUTER, NEW_ROUTER = 340, 342
KERNELS = [[1, 1], [1, 2], [2, 2]]
HIDDEN = 64


class Reference:
    """The authors' evaluation forward of one sample, in the tensors of the original layout."""

    def __init__(self, original: Original, pooling: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.model: Any = LlavaForConditionalGeneration(original.config).eval()
        self.model.load_state_dict(original.tensors)
        self.text = self.model.model.language_model
        self.pooling, self.tensors = pooling, tensors
        self.sites = {layer["index"]: layer for layer in pooling["pooling_layers"]}
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.route: list[int] = []

    def visual(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the projected tokens [V, D] of an image."""
        features = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        if self.pooling["prepooling"]:
            side = int(features.shape[1] ** 0.5)
            grid = features.view(1, side, side, -1).permute(0, 3, 1, 2)
            features = F.avg_pool2d(grid, 2).permute(0, 2, 3, 1).flatten(1, 2)
        return self.model.model.multi_modal_projector(features)[0]

    def prefill(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        """Run a prompt in which -1 stands for the image; return the last logits [V]."""
        place = ids.index(-1)
        visual = self.visual(pixels)
        embed = self.model.get_input_embeddings()
        before, after = (embed(torch.tensor(part)) for part in (ids[:place], ids[place + 1 :]))
        hidden = torch.cat([before, visual, after])
        side = int(len(visual) ** 0.5)
        self.grid, self.place = (side, side), place
        self.routers = [i for i, token in enumerate(ids) if token == OLD_ROUTER]
        for i, layer in enumerate(self.text.layers):
            site = self.sites.get(i)
            if site and self.pooling["pooling_location"] == "pre":
                hidden = self.pool(hidden, i, site)
            hidden = self.layer(layer, hidden, past=0)
            if site and self.pooling["pooling_location"] == "post":
                hidden = self.pool(hidden, i, site)
        return self.logits(hidden)

    def decode(self, token: int) -> torch.Tensor:
        """Run one more token; return its logits [V]."""
        hidden = self.model.get_input_embeddings()(torch.tensor([token]))
        for i, layer in enumerate(self.text.layers):
            hidden = self.layer(layer, hidden, past=self.keys[i].shape[1], index=i)
        return self.logits(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.text.norm(hidden[-1]))

    def layer(self, layer: Any, hidden: torch.Tensor, past: int, index: int | None = None) -> torch.Tensor:
        """Run a decoder layer on [S, D]; `index` says whose cache goes before, None starts a new one."""
        attention, count = layer.self_attn, len(hidden)
        x = layer.input_layernorm(hidden)
        query, key, value = (
            project(x).view(count, -1, HIDDEN // 4).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = self.text.rotary_emb(hidden[None], torch.arange(past, past + count)[None])
        query, key = (each[0] for each in apply_rotary_pos_emb(query[None], key[None], cos, sin))
        if index is None:
            self.keys.append(key)
            self.values.append(value)
        else:
            key = self.keys[index] = torch.cat([self.keys[index], key], 1)
            value = self.values[index] = torch.cat([self.values[index], value], 1)
        key, value = (each.repeat_interleave(2, 0) for each in (key, value))
        scores = query @ key.transpose(1, 2) / (HIDDEN // 4) ** 0.5
        allowed = torch.arange(key.shape[1]) <= torch.arange(past, past + count)[:, None]
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ value).transpose(0, 1).reshape(count, -1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def pool(self, hidden: torch.Tensor, index: int, site: dict[str, Any]) -> torch.Tensor:
        """Pool the visual tokens of [S, D] behind (or before) a layer."""
        count = self.grid[0] * self.grid[1]
        if count < 16:
            return hidden
        start, stop = self.place, self.place + count
        grid = hidden[start:stop].T.view(1, -1, *self.grid)
        name = self.pooling["pooling_function"]
        if self.pooling["pooling_type"] == "static":
            grid = getattr(F, f"{name}_pool2d")(grid, site["kernel_size"], site["stride"])
        else:
            if self.pooling["use_special_token"]:
                token = hidden[[place - 1 + count for place in self.routers]].mean(0)
            else:
                token = hidden[-1]
            gates = (self.router(token, index) / 10).softmax(-1)
            expert = int(gates.argmax())
            self.route.append(expert)
            kernel = site["kernel_size"][expert]
            if name == "conv":
                weight = self.tensors[f"model.layers.{index}.experts.{expert}.weight"]
                grid = F.conv2d(grid, weight, stride=kernel, groups=HIDDEN)
            elif kernel != [1, 1]:
                grid = getattr(F, f"{name}_pool2d")(grid, kernel, kernel)
            grid = grid * gates[expert]
        self.grid = tuple(grid.shape[2:])
        return torch.cat([hidden[:start], grid[0].flatten(1).T, hidden[stop:]])

    def router(self, token: torch.Tensor, index: int) -> torch.Tensor:
        name = f"model.layers.{index}.pooling_router."
        if self.pooling["router_version"] == "v1":
            weight, bias = (self.tensors[f"{name}mlp1.0.{part}"] for part in ("weight", "bias"))
            token = F.gelu(F.layer_norm(token, (HIDDEN,), weight, bias) @ self.tensors[f"{name}mlp1.1.weight"].T)
        return token @ self.tensors[f"{name}predictor.weight"].T


def make_dpn(make_original: Callable[..., Original], **changes: Any) -> tuple[Original, Reference]:
    """Write a random checkpoint of the authors, with routers that differ from prompt to prompt."""
    layers = [{"index": i, "kernel_size": KERNELS, "stride": KERNELS} for i in (1, 3, 5)]
    pooling: dict[str, Any] = {
        "pooling_type": "adaptive", "pooling_layers": layers, "pooling_function": "max", "pooling_location": "post",
        "prepooling": False, "use_special_token": True, "detach_cls_token_to_predict": False, "router_version": "v1",
    } | changes  # fmt: skip
    original = make_original(added=(ROUTER,) if pooling["use_special_token"] else ())
    original.edit(pooling=pooling, freeze_vision=False, is_multipath_encoder=False, input_image_size=48)
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        tensors[name] = torch.randn(shape, generator=generator) * scale + shift

    for layer in pooling["pooling_layers"]:
        name = f"model.layers.{layer['index']}."
        if pooling["pooling_type"] == "adaptive" and pooling["router_version"] == "v1":
            add(f"{name}pooling_router.mlp1.0.weight", HIDDEN, shift=1)
            add(f"{name}pooling_router.mlp1.0.bias", HIDDEN)
            add(f"{name}pooling_router.mlp1.1.weight", HIDDEN // 4, HIDDEN)
            add(f"{name}pooling_router.predictor.weight", 3, HIDDEN // 4)
        elif pooling["pooling_type"] == "adaptive":
            add(f"{name}pooling_router.predictor.weight", 3, HIDDEN)
        if pooling["pooling_function"] == "conv":
            for k, (height, width) in enumerate(KERNELS):
                add(f"{name}experts.{k}.weight", HIDDEN, 1, height, width, scale=0.2, shift=1 / (height * width))
    original.add(tensors)
    return original, Reference(original, pooling, tensors)


def prompts(special: bool) -> list[list[int]]:
    """Return prompts of the authors' ids; -1 is the image."""
    result = []
    for seed in range(4):
        words = torch.randint(3, 340, (14,), generator=torch.Generator().manual_seed(seed)).tolist()
        first = [1, *words[: 2 + seed], -1, *words[2 + seed : 9]]
        again = [*words[11:], OLD_ROUTER] if special and seed % 2 else []  # a second turn
        result.append([*first, *([OLD_ROUTER] if special else []), *again, *words[9:11]])
    return result


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_special_token": False, "pooling_function": "avg"},
    {"router_version": "v2", "pooling_function": "conv"},
    {"prepooling": True, "pooling_function": "conv", "router_version": "v1"},
    {"pooling_layers": [{"index": 2, "kernel_size": KERNELS, "stride": KERNELS}], "pooling_location": "pre"},
    {"pooling_location": "pre", "use_special_token": False, "router_version": "v2"},
    {"pooling_type": "static", "pooling_function": "avg", "use_special_token": False,
     "pooling_layers": [{"index": 1, "kernel_size": [5, 1], "stride": [5, 1]},
                        {"index": 4, "kernel_size": [1, 2], "stride": [1, 2]}]},
    {"pooling_type": "static", "prepooling": True, "pooling_layers": [
        {"index": i, "kernel_size": [2, 2], "stride": [2, 2]} for i in (1, 3, 5)]},
    {"pooling_layers": [{"index": i, "kernel_size": (k := [[1, 1], [2, 2], [4, 4]]), "stride": k} for i in (6, 2)]},
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [pytest.param(each, marks=pytest.mark.slow if i in (3, 5, 8) else []) for i, each in enumerate(OPTIONS)],
    ids=str,
)
@torch.inference_mode()
def test_an_import_gives_the_outputs_of_the_authors_evaluation(
    make_original: Callable[..., Original], tmp_path: Path, options: dict[str, Any]
) -> None:
    original, reference = make_dpn(make_original, **options)
    folder = convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip)).output
    model = dpn_cli.load(folder)
    special, prepooling = reference.pooling["use_special_token"], reference.pooling["prepooling"]
    routes = set()
    for seed, ids in enumerate(prompts(special)):
        reference.keys, reference.values, reference.route = [], [], []
        pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
        expected = [reference.prefill(ids, pixels)]
        visual = [IMAGE] * (36 if prepooling else 144)
        moved = [each for i in ids for each in (visual if i == -1 else [NEW_ROUTER if i == OLD_ROUTER else i])]
        inputs = {"input_ids": torch.tensor([moved]), "pixel_values": pixels}
        cache = model.new_cache()
        output = model(**inputs, past_key_values=cache, use_cache=True)
        found = [output.logits[0, -1]]
        if reference.pooling["pooling_type"] == "adaptive":
            assert [*model.last_routes[0]][: len(reference.route)] == reference.route
        routes.add(model.last_routes[0])
        for _ in range(5):
            token = int(expected[-1][:340].argmax())
            expected.append(reference.decode(token))
            found.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[:340], b[:340], rtol=1e-4, atol=1e-4)
            if special:
                torch.testing.assert_close(a[NEW_ROUTER], b[OLD_ROUTER], rtol=1e-4, atol=1e-4)
    assert any(map(any, routes))  # something was pooled


def test_the_router_token_makes_room_for_the_image(make_original: Callable[..., Original], tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    original, _ = make_dpn(make_original)
    done = convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip))
    assert (done.recipe, done.pyramid.router.token_id) == ("imported", NEW_ROUTER)
    assert any("<ROUTER>" in note for note in done.notes)
    config = Checkpoint.open(done.output).config
    assert (config["image_token_index"], config["pad_token_id"]) == (IMAGE, PAD)
    processor = AutoProcessor.from_pretrained(done.output)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>", ROUTER]) == [IMAGE, PAD, NEW_ROUTER]
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    text = processor.apply_chat_template([question], add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (60, 48)), return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert (ids.count(NEW_ROUTER), ids.count(IMAGE)) == (1, 144)
    blanks = processor(text=text.replace("what?", "what? \n"), images=Image.new("RGB", (60, 48)))
    assert blanks["input_ids"][0] == ids  # as the authors' tokenizer takes them
    answers = dpn_cli.load(done.output).generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answers.shape[1] == len(ids) + 3
    model = dpn_cli.load(done.output)
    with pytest.raises(ValueError, match=f"read the token {NEW_ROUTER}, which a prompt lacks"):
        model(input_ids=inputs["input_ids"][:, : ids.index(NEW_ROUTER)], pixel_values=inputs["pixel_values"])
    assert model(input_ids=torch.tensor([[1, 5, 6]])).logits.shape[1] == 3  # without an image


def test_an_export_of_an_import_is_the_same_model(make_original: Callable[..., Original], tmp_path: Path) -> None:
    original, _ = make_dpn(make_original, prepooling=True, router_version="v2", pooling_function="conv")
    folder = convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip)).output
    export(folder, tmp_path / "export")
    inputs = {
        "input_ids": torch.tensor([[1, 9, *[IMAGE] * 36, 7, NEW_ROUTER, 8]]),
        "pixel_values": torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)),
    }
    with torch.inference_mode():
        first, second = (dpn_cli.load(path)(**inputs).logits for path in (folder, tmp_path / "export"))
    assert torch.equal(first, second)
    assert inspect_checkpoint(folder).grids == ((6, 6),)


@torch.inference_mode()
def test_a_static_export_takes_the_routers_route_as_the_routers_do(
    make_original: Callable[..., Original], tmp_path: Path
) -> None:
    original, _ = make_dpn(make_original, pooling_function="conv")
    folder = convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip)).output
    inputs = {
        "input_ids": torch.tensor([[1, 9, *[IMAGE] * 144, 7, NEW_ROUTER, 8]]),
        "pixel_values": torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)),
    }
    routed = dpn_cli.load(folder)
    expected = routed(**inputs).logits
    [route] = routed.last_routes
    assert any(route)
    export(folder, tmp_path / "export", ExportOptions(static=",".join(map(str, route))))
    static = dpn_cli.load(tmp_path / "export")(**inputs).logits
    torch.testing.assert_close(static, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", ["pooling_router.mlp1.1.weight", "experts.2.weight"])
def test_routers_and_experts_are_searched_for_nan(
    make_original: Callable[..., Original], tmp_path: Path, broken: str
) -> None:
    original, reference = make_dpn(make_original, pooling_function="conv")
    tower, name = str(original.clip), f"model.layers.3.{broken}"
    convert(str(original.folder), output=tmp_path / "out", vision_tower=tower, check_values=True, verify=True)
    tensor = reference.tensors[name].clone()
    tensor.flatten()[-1] = torch.nan
    original.add({name: tensor})
    with pytest.raises(CheckpointError, match=f"{name}.* holds NaN"):
        convert(str(original.folder), output=tmp_path / "bad", vision_tower=tower, check_values=True)
    assert not (tmp_path / "bad").exists()


@torch.inference_mode()
@pytest.mark.parametrize("special", [False, True])
def test_without_pooling_layers_it_is_a_plain_llava(
    make_original: Callable[..., Original], tmp_path: Path, special: bool
) -> None:
    original, reference = make_dpn(make_original, pooling_layers=[], use_special_token=special)
    recipe = load_recipe("llava-1.5-7b", ["pyramid.pooling=max"])
    done = convert(str(original.folder), recipe, tmp_path / "out", vision_tower=str(original.clip))
    assert (done.recipe, done.pyramid.gate) == ("llava-1.5-7b", "none")
    inputs = {
        "input_ids": torch.tensor([[1, 9, *[IMAGE] * 144, 7, 8]]),
        "pixel_values": torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)),
    }
    logits = dpn_cli.load(done.output)(**inputs).logits[0, -1]
    torch.testing.assert_close(logits[:340], reference.prefill([1, 9, -1, 7, 8], inputs["pixel_values"])[:340])
    assert ("<ROUTER>" in (done.output / "chat_template.jinja").read_text()) == special


def test_a_batch_gives_what_its_samples_give(make_original: Callable[..., Original], tmp_path: Path) -> None:
    from tests.pyramids import collate

    original, _ = make_dpn(make_original)
    folder = convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip)).output
    model = dpn_cli.load(folder)
    samples = []
    for seed, ids in enumerate(prompts(special=True)):
        moved = [e for i in ids for e in ([IMAGE] * 144 if i == -1 else [NEW_ROUTER if i == OLD_ROUTER else i])]
        pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
        samples.append({"input_ids": torch.tensor([moved]), "pixel_values": pixels})
    samples.append({"input_ids": torch.tensor([[1, 7, 8, 9]])})
    with torch.inference_mode():
        together = model(**collate(samples)).logits[:, -1]
        for row, sample in zip(together, samples, strict=True):
            torch.testing.assert_close(row, model(**sample).logits[0, -1], rtol=1e-4, atol=1e-4)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"pooling_type": "random"}, "pooling.pooling_type .* 'random', expected adaptive or static"),
    "router": ({"router_version": "v3"}, "router_version"),
    "static conv": ({"pooling_type": "static", "pooling_function": "conv"}, "static pooling by convolution"),
    "before the first layer": (
        {"pooling_location": "pre", "pooling_layers": [{"index": 0, "kernel_size": KERNELS, "stride": KERNELS}]},
        "none before the first",
    ),
    "overlap": (
        {"pooling_layers": [{"index": 1, "kernel_size": KERNELS, "stride": [[1, 1]] * 3}]},
        "strides equal to kernels",
    ),
    "no 1×1": (
        {"pooling_layers": [{"index": 1, "kernel_size": KERNELS[1:], "stride": KERNELS[1:]}]},
        "expected 1×1 first",
    ),
    "no index": ({"pooling_layers": [{"kernel_size": KERNELS}]}, "is damaged"),
    "another layer": (
        {"pooling_layers": [{"index": 2, "kernel_size": KERNELS, "stride": KERNELS}]},
        r"layers\.2\.pooling_router.* found none",
    ),
    "fewer layers": (
        {"pooling_layers": [{"index": i, "kernel_size": KERNELS, "stride": KERNELS} for i in (1, 3)]},
        r"holds 4 tensors .* such as model\.layers\.5\.pooling_router",
    ),
    "unused routers": (
        {"pooling_type": "static", "pooling_layers": [{"index": 1, "kernel_size": [2, 2], "stride": [2, 2]}]},
        "holds 12 tensors of routers or experts",
    ),
    "no layers, but routers": ({"pooling_layers": []}, "pooling_router"),
    "nothing but prepooling": ({"pooling_layers": [], "prepooling": True}, "prepooling and no layers"),
    "no object": ({"pooling": "adaptive"}, "expected an object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_imported_is_refused(make_original: Callable[..., Original], tmp_path: Path, fault: str) -> None:
    original, reference = make_dpn(make_original)
    changes, message = FAULTS[fault]
    original.edit(pooling=changes.get("pooling", reference.pooling | changes))
    with pytest.raises(CheckpointError, match=message):
        convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip))
    assert not (tmp_path / "out").exists()


def test_a_recipe_for_an_import_is_refused(make_original: Callable[..., Original], tmp_path: Path) -> None:
    original, _ = make_dpn(make_original)
    with pytest.raises(RecipeError, match="has a pyramid of its own"):
        convert(str(original.folder), load_recipe("demo"), tmp_path / "out", vision_tower=str(original.clip))


def test_a_chat_template_can_be_given_unless_routers_read_a_token_of_its_own(
    make_original: Callable[..., Original], tmp_path: Path
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(CHAT_TEMPLATE)
    original, _ = make_dpn(make_original, use_special_token=False)
    tower = str(original.clip)
    output = convert(str(original.folder), output=tmp_path / "out", vision_tower=tower, chat_template=file).output
    assert (output / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    shutil.rmtree(original.folder)
    shutil.rmtree(original.clip)
    original, _ = make_dpn(make_original)
    with pytest.raises(UsageError, match="read a token of its chat template"):
        convert(str(original.folder), output=tmp_path / "again", vision_tower=tower, chat_template=file)


def test_the_command_says_what_became_of_it(
    make_original: Callable[..., Original],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, _ = make_dpn(make_original, pooling_location="pre")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(original.folder), "--vision-tower", str(original.clip), "-o", "out"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    for words in ("it needs no calibration", "the token <ROUTER>", "imported as it was meant", "Next: dpn export"):
        assert words in said
    capsys.readouterr()
    refused = {("calibrate", "--data", "demo"): 3, ("export", "--budget", "0.5"): 2}
    for words, code in refused.items():
        assert main([*words, "--model", "out"]) == code
        said = " ".join(capsys.readouterr().err.split())
        assert "pyramid was trained together with the model" in said
        assert "use it without a budget, as it was trained, or fix a route" in said
    assert main(["export", "--model", "out", "-o", "exported"]) == 0
    assert "not calibrated" not in capsys.readouterr().out
    assert "its routers choose as they were trained to" in Path("exported", "README.md").read_text()
    tower = ["--vision-tower", str(original.clip)]
    assert main(["convert", str(original.folder), *tower, "--set", "pyramid.pooling=avg", "-o", "again"]) == 2
    assert not Path("again").exists()
