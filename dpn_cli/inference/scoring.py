"""How likely a model finds given answers, and how far two models' distributions are apart.

Shapes: B batch, L sequence, A answer tokens, V vocabulary.
"""

from itertools import chain

import torch
from torch.nn import functional as F

from dpn_cli.data.encoding import IGNORED
from dpn_cli.errors import CheckpointError, DataError, DpnError
from dpn_cli.modeling.wrapper import PyramidGenerationMixin


def answer_log_probs(model: PyramidGenerationMixin, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probabilities [A, V] of a batch's answer tokens, by the model as it is set, in float32."""
    row, column = answer_positions(batch["labels"])
    kept, index = column.unique(return_inverse=True)
    logits = model(
        **{name: tensor for name, tensor in batch.items() if name != "labels"},
        position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
        instruction=instruction_columns(batch["labels"]),
        logits_to_keep=kept,
    ).logits
    return F.log_softmax(logits[row, index].float(), dim=-1)


def is_broken(log_probs: torch.Tensor, row: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return for every row, [num_rows], whether log-probabilities [A, V] of its answer tokens are no numbers."""
    return mean_by_row(log_probs.sum(-1) * 0, row, num_rows).isnan()


def broken(name: str, *models: PyramidGenerationMixin) -> DpnError:
    """Return the error to raise where one of the models answers a sample of that name with no finite numbers."""
    for tensor_name, tensor in chain.from_iterable(model.named_parameters() for model in models):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return CheckpointError(
                f"the tensor {tensor_name!r} holds NaN or infinite values, so the model is broken: download it again "
                "and convert it"
            )
    return DataError(
        f"{name}: the model's outputs for it are not finite numbers; leave it out of the data, or convert a checkpoint "
        "of another dtype, such as bfloat16 instead of float16"
    )


def answer_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions that predict answer tokens, as indices (row [A], column [A]) of [B, L - 1]."""
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return row, column


def mean_by_row(values: torch.Tensor, row: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the mean of values [A] over the answer tokens of every row, [num_rows]."""
    total = values.new_zeros(num_rows).index_add(0, row, values)
    return (total / row.bincount(minlength=num_rows)).cpu()


def instruction_columns(labels: torch.Tensor) -> torch.Tensor:
    """Return the column before every row's first label, [B]."""
    return (labels != IGNORED).int().argmax(1) - 1


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return KL(teacher ‖ student) [A] of softened distributions, times temperature² to keep the gradient's size.

    A teacher of a smaller vocabulary knows the first tokens of the student's.

    Source: Hinton et al. 2015, section 2.
    """
    goal = (teacher / temperature).log_softmax(-1)
    found = (student[:, : teacher.shape[1]] / temperature).log_softmax(-1)
    return F.kl_div(found, goal, reduction="none", log_target=True).sum(-1) * temperature**2
