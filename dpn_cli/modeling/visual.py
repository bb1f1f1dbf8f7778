"""What the inner models of every family share: they tell a pyramid where each visual token stands in its image.

A family's own inner model builds the vision tower and the projector, and says which visual grids images have.

Shapes: B batch, L sequence, D hidden.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate, chain, count
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_torchdynamo_exporting
from typing_extensions import override

from dpn_cli.modeling.pyramid_text import PYRAMID_TEXT_MODELS, PyramidTextMixin
from dpn_cli.modeling.renamed import SELECTS_STATES
from dpn_cli.modeling.salience import at_tokens, changes_noted, patch_salience
from dpn_cli.pyramid.config import FITTED_PARTS, Block
from dpn_cli.pyramid.experts import Grid, num_tokens

GRID_INPUTS = ("image_sizes", "batch_num_images")  # what processors return beside the pixels
ENCODER_INPUTS = (*GRID_INPUTS, "vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")


def visual_coordinates(is_image: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
    """Return (grid, row, col) of every image token, -1 elsewhere.

    Args:
        is_image: [B, L] bool, the image placeholders, in the order of the images.
        blocks: Grids of all images of the batch, in their order; every sample's grids are counted from 0.

    Returns:
        [B, L, 3], long.

    Raises:
        ValueError: if there are not as many placeholders as tokens in the grids, or an image lies in two samples.
    """
    number = count()
    rows = [torch.cat([_cells(next(number), grid) for grid in block], dim=1) for block in blocks]
    tokens = torch.cat([each.flatten(0, 1) for each in rows]).to(is_image.device)
    samples = list(accumulate(is_image.sum(1).tolist()))
    if samples[-1] != len(tokens):
        raise ValueError(
            f"the prompt has {samples[-1]} image tokens, its images have {len(tokens)}: encode text and images "
            "together, with the checkpoint's own processor"
        )
    if not {0, *accumulate(map(num_tokens, blocks))}.issuperset(samples):
        raise ValueError(
            "the tokens of one image would be split between two samples: give the images in the order of the samples "
            "(releases of transformers before 5.16 mix up the images of a sample in beam search)"
        )
    coords = torch.full((*is_image.shape, 3), -1, device=is_image.device)
    coords[is_image] = tokens
    first = torch.where(is_image, coords[..., 0], next(number)).amin(1)
    coords[..., 0] -= first[:, None] * is_image
    return coords


def _cells(number: int, grid: Grid) -> torch.Tensor:
    """Return (number, row, col) of the tokens of a grid, [H, W, 3]."""
    height, width = grid
    axes = torch.tensor([number]), torch.arange(height), torch.arange(width)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[0]


def brings_images(
    pixel_values: torch.Tensor | None = None,
    mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
    **kwargs: Any,
) -> bool:
    """Say whether a model's inputs hold images, as pixels or encoded."""
    return pixel_values is not None or (mm_encoder_outputs or {}).get("image") is not None


class PyramidModelMixin(PreTrainedModel):
    """Makes the inner model of a family hand the place of each visual token in its image to a pyramid."""

    _keep_in_fp32_modules_strict = list(FITTED_PARTS)
    _can_compile_fullgraph = False  # lengths depend on the data

    language_model: PyramidTextMixin

    def image_grid(self) -> Grid:
        """Return the visual tokens of a whole image, (H, W)."""
        raise NotImplementedError

    def image_blocks(
        self,
        num_images: int,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
    ) -> tuple[Block, ...]:
        """Return the visual grids of some images, in the order of their tokens: one per image, whatever its size.

        Args:
            num_images: how many images there are.
            image_sizes: [images, 2] their heights and widths in pixels, where the processor gives them.
            batch_num_images: how many images each sample with images has, likewise.
        """
        return ((self.image_grid(),),) * num_images

    def image_grids(self, num_images: int, **sizes: torch.Tensor) -> tuple[Grid, ...]:
        """Return the same as one list of grids, as routes and costs need it."""
        return tuple(chain(*self.image_blocks(num_images, **sizes)))

    def build_language_model(self) -> PyramidTextMixin:
        """Return the pyramid that the config describes, with fresh weights.

        Raises:
            ValueError: if there is none for the text model's type.
        """
        text_config = self.config.text_config
        if text_config.model_type not in PYRAMID_TEXT_MODELS:
            raise ValueError(
                f"text model type {text_config.model_type!r} has no pyramid; there is one for "
                f"{list(PYRAMID_TEXT_MODELS)}"
            )
        return PYRAMID_TEXT_MODELS[text_config.model_type]._from_config(
            text_config, pyramid=self.config.pyramid_config()
        )

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return embeddings [B, L, D] with the images in place, visual coordinates [B, L, 3] and salience [B, L]."""
        embeds = self.get_input_embeddings()(input_ids)
        encoded = self.get_image_features(pixel_values=pixel_values, **sizes, return_dict=True)
        images = list(encoded.pooler_output)
        is_image = self.is_image(input_ids, None)
        coords = visual_coordinates(is_image, self.image_blocks(len(images), **sizes))
        features = torch.cat(images).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(is_image[..., None], features), coords, self.salience(encoded, coords)

    def salience(self, encoded: BaseModelOutputWithPooling, coords: torch.Tensor) -> torch.Tensor | None:
        """Return how much the vision tower attends to the visual tokens, [B, L]; None where no expert reads it.

        Args:
            encoded: the images, as `get_image_features` returns them.
            coords: Coordinates of the visual tokens, [B, L, 3].

        Raises:
            ValueError: if the images were encoded without their salience.
        """
        if not self.language_model.reads_salience:
            return None
        if encoded.attentions is None:
            raise ValueError(
                "an expert of this pyramid reads what the vision tower attends to, which these encoded images do not "
                "tell: encode them with the get_image_features of this model, or give pixel_values"
            )
        return at_tokens(encoded.attentions, coords)

    def locate(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the visual coordinates [B, L, 3] of a prompt; its images are pixels or encoded ones."""
        encoded = (mm_encoder_outputs or {}).get("image")
        sizes = {name: kwargs[name] for name in GRID_INPUTS if kwargs.get(name) is not None}
        images: Any = pixel_values if encoded is None else encoded.pooler_output
        num_images = len(sizes.get("image_sizes", images))  # the tiles of all images may be stacked
        return visual_coordinates(self.is_image(input_ids, inputs_embeds), self.image_blocks(num_images, **sizes))

    @override
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        visual_coords: torch.Tensor | None = None,
        salience: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the original's forward with the visual coordinates handed on to the language model.

        Args:
            visual_coords: Coordinates of the prompt's visual tokens; by default they are looked up.
            salience: how much the vision tower attends to these, where an expert reads it; likewise.

        Raises:
            NotImplementedError: under torch.export.
        """
        if brings_images(pixel_values, mm_encoder_outputs):
            if is_torchdynamo_exporting():
                raise NotImplementedError(
                    "torch.export cannot trace a pyramid, whose lengths depend on its images; export the original model"
                )
            if visual_coords is None:
                visual_coords = self.locate(input_ids, inputs_embeds, pixel_values, mm_encoder_outputs, **kwargs)
            is_image = self.is_image(input_ids, inputs_embeds)
            drafted = is_image.shape[1] - visual_coords.shape[1]  # or generated, where there is no cache
            if salience is None and self.language_model.reads_salience:
                if pixel_values is not None:
                    how = {name: kwargs[name] for name in ENCODER_INPUTS if kwargs.get(name) is not None}
                    mm_encoder_outputs = {"image": self.get_image_features(pixel_values, **how, return_dict=True)}
                    pixel_values = None
                salience = self.salience((mm_encoder_outputs or {})["image"], visual_coords)
            kwargs["visual_coords"] = F.pad(visual_coords, (0, 0, 0, drafted), value=-1)
            kwargs["salience"] = None if salience is None else F.pad(salience, (0, drafted))
            kwargs["router_tokens"] = self._router_tokens(is_image.any(1), input_ids, inputs_embeds)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def is_image(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Return the image placeholders, [B, L] bool."""
        return self.is_token(self.config.image_token_id, input_ids, inputs_embeds)

    def _router_tokens(
        self, has_image: torch.Tensor, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the columns [B, R] of the token that the routers read, -1 where a sample has fewer.

        None where they read no special token.

        Raises:
            ValueError: if a sample with an image, [B] bool, has none.
        """
        token_id = self.language_model.pyramid.router.token_id
        if token_id is None:
            return None
        is_read = self.is_token(token_id, input_ids, inputs_embeds)
        count = is_read.sum(1)
        if not count[has_image].all():
            raise ValueError(
                f"the routers of this model read the token {token_id}, which a prompt lacks: put it at the end of "
                "the question, as the chat template does"
            )
        columns = is_read.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(count.max()))]
        return torch.where(torch.arange(columns.shape[1], device=columns.device) < count[:, None], columns, -1)

    def is_token(
        self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Say where a token stands, [B, L] bool; in embeddings, where its embedding does."""
        if input_ids is not None:
            return input_ids == token_id
        assert inputs_embeds is not None
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)


def with_salience(encode: Callable[..., BaseModelOutputWithPooling]) -> Callable[..., BaseModelOutputWithPooling]:
    """Wrap a family's `get_image_features`: where an expert reads it, the output's `attentions` are the salience.

    The salience of every image's tokens is [N, 1]; it is that of the tower's layer whose output the projector takes, of
    several the last.
    """

    @wraps(encode)
    def get_image_features(self: PyramidModelMixin, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        if not self.language_model.reads_salience:
            return encode(self, *args, **kwargs)
        wanted = kwargs.get("vision_feature_layer") or self.config.vision_feature_layer
        *others, chosen = [wanted] if isinstance(wanted, int) else wanted
        states = [*others, chosen - 1, chosen] if SELECTS_STATES else True
        with changes_noted() as changes:
            encoded = encode(self, *args, **{**kwargs, "output_hidden_states": states})
        layer = self.vision_tower.encoder.layers[chosen if chosen < 0 else chosen - 1]  # state 0 goes into the first
        strategy = kwargs.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        salience: Any = patch_salience(layer, encoded.hidden_states[chosen - 1], strategy == "default")
        for change in changes:
            salience = change(salience)
        encoded.attentions = tuple(salience)
        return encoded

    return get_image_features
