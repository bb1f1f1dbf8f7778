"""Where the instruction of a sample ends, which is what its routers read.

`generate` gives prompts, whose last token it is. Training and scoring give whole conversations, with labels or without,
and it must be found in them: routers that read anything else would take other routes than `generate` does.

Shapes: B batch, L sequence.
"""

from collections.abc import Sequence

import torch

IGNORED = -100  # the label of a token that is not to be predicted


def instruction_ends(
    labels: torch.Tensor,
    is_image: torch.Tensor,
    is_cue_end: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the column of every row's last instruction token, [B].

    It stands before the first label after the last image, unless the labels cover the question too and do not show
    it: then it ends the first cue after the last image. Without labels, or without images, it is the last token of
    the row.

    Args:
        labels: [B, L], -100 where a token is not to be predicted.
        is_image: [B, L] bool, the image tokens.
        is_cue_end: [B, L] bool, the tokens that end what the chat template writes between a question and its answer.
        attention_mask: [B, L], or None when no row is padded.

    Raises:
        ValueError: if the labels of a row do not show where its instruction ends, and there is no cue.
    """
    valid = torch.ones_like(labels) if attention_mask is None else attention_mask
    rows = zip(labels, is_image, is_cue_end, valid, strict=True)
    return torch.tensor([_end(*map(_columns, (row != IGNORED, *rest))) for row, *rest in rows], device=labels.device)


def unlabelled_ends(
    is_image: torch.Tensor, is_cue_end: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the column of every row's last instruction token, [B], where there are no labels; see `instruction_ends`.

    It is the last token of a row that ends with the cue, as prompts do. A row that goes on after cues holds answers,
    too: then it ends the first cue after the last image, as it does with labels.
    """
    columns = torch.arange(is_image.shape[1], device=is_image.device).expand(is_image.shape)
    valid = torch.ones_like(is_image)
    if attention_mask is not None and attention_mask.ndim == 2:
        valid = attention_mask[:, -is_image.shape[1] :].bool()
    last = columns.masked_fill(~valid, 0).amax(1)
    last_image = columns.masked_fill(~is_image, -1).amax(1, keepdim=True)
    is_end = is_cue_end & valid & (columns > last_image)
    first = columns.masked_fill(~is_end, is_image.shape[1]).amin(1)
    ends_with_cue = is_end.gather(1, last[:, None])[:, 0]
    return torch.where(ends_with_cue, last, torch.minimum(first, last))


def cue_ends(is_image: torch.Tensor, is_token: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return which tokens end the cue, [B, L] bool, given where each token of the cue stands; no cue ends anywhere.

    Args:
        is_image: [B, L] bool.
        is_token: [B, L] bool for every token of the cue, in their order.
    """
    is_end, starts = torch.zeros_like(is_image), is_image.shape[1] - len(is_token) + 1
    if is_token and starts > 0:
        found = [each[:, i : i + starts] for i, each in enumerate(is_token)]  # nothing waits for the device
        is_end[:, len(is_token) - 1 :] = torch.stack(found).all(0)
    return is_end


def _columns(is_chosen: torch.Tensor) -> list[int]:
    """Return the columns of a row [L] that are chosen."""
    columns: list[int] = is_chosen.nonzero()[:, 0].tolist()
    return columns


def _end(labelled: list[int], images: list[int], cue_ends: list[int], valid: list[int]) -> int:
    """Return the column of one row, from the columns that are labelled, image tokens, ends of cues and not padding."""
    last, last_image = max(valid, default=0), max(images, default=-1)
    first_label = min((column for column in labelled if column > last_image), default=None)
    cue_ends = [column for column in cue_ends if column > last_image]
    if not images:
        return last
    if first_label is None:  # as in `unlabelled_ends`
        return last if last in cue_ends else min([*cue_ends, last])
    if cue_ends:
        return first_label - 1 if cue_ends[0] < first_label else cue_ends[0]
    if first_label - 1 > last_image or min(labelled) > last_image:
        return first_label - 1
    raise ValueError(
        "the labels do not show where the instruction of a sample ends, which its router reads: set every label before "
        "the answer to -100, or pass `instruction`, the column of the last token before each answer"
    )
