"""Evaluating a checkpoint's folder: data and model in, an evaluation out, kept on the way."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.data.encoding import token_limit
from dpn_cli.data.loading import OnBadRow, load_data
from dpn_cli.data.scan import Dataset
from dpn_cli.evaluation.evaluate import Evaluation, Progress, evaluate
from dpn_cli.evaluation.judging import Panel
from dpn_cli.evaluation.kept import keeping
from dpn_cli.evaluation.spending import unmet
from dpn_cli.inference.loading import default_device, load_opened, load_processor, max_positions
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.fingerprint import evaluation_fingerprint, validate_same
from dpn_cli.parallel.processes import Processes
from dpn_cli.pyramid.config import PyramidConfig


def evaluate_folder(
    folder: Path,
    data: str,
    image_root: Path | None,
    on_bad_row: OnBadRow,
    max_bad: float,
    *,
    budgets: Sequence[float],
    against: Sequence[str],
    metric: str,
    samples: int | None,
    seed: int,
    answer_tokens: int,
    batch_size: int,
    progress: Progress,
    say: Callable[[str], None],
    kind_field: str | None = None,
    ignored: Sequence[str] = (),
    processes: Processes | None = None,
) -> Evaluation | None:
    """Evaluate a converted or exported checkpoint; nothing is written into it.

    Results are kept in `.dpn/evaluation` while it runs, so that the same call goes on after a kill.

    Args:
        folder: the checkpoint.
        data: see `load_data`; of the demo, the held-out pictures.
        image_root: see `load_data`.
        on_bad_row: see `load_data`.
        max_bad: see `load_data`.
        budgets: see `evaluate`.
        against: see `evaluate`.
        metric: see `evaluate`.
        samples: to draw; None for all.
        seed: of the draw.
        answer_tokens: per answer, at most.
        batch_size: samples per forward pass.
        progress: see `evaluate`.
        say: told what goes on, a sentence at a time.
        kind_field: see `load_data`.
        ignored: see `load_data`.
        processes: that evaluate together, each with this call; by default those that a launcher has started.

    Returns:
        The evaluation; None in all processes but the main one.
    """
    processes = processes or Processes.join()
    with ExitStack() as held:
        with processes.as_one():
            held.enter_context(in_use(folder))
            checkpoint, layout, pyramid = open_converted(folder)
            processor = load_processor(folder)
            dataset = load_data(
                data, image_root, on_bad_row=on_bad_row, max_bad=max_bad, split="heldout", limit=samples, seed=seed,
                kind_field=kind_field, ignored=ignored, progress=progress,
                check=token_limit(processor, layout, max_positions(folder), answer_tokens),
            )  # fmt: skip
            for line in dataset.scan.lines():
                say(line)
            shown = [sample for sample in dataset.samples if sample.images]
            model = load_opened(checkpoint, pyramid, device_map=default_device())
            say(f"{len(shown)} samples from {data}; model in {model.dtype} on {model.device}")
            for line in _caveats(model, pyramid, dataset):
                say(line)
            depends_on = {
                **evaluation_fingerprint(checkpoint, Lora.of(folder, pyramid), dataset.digest),
                "answer_tokens": answer_tokens, "batch_size": batch_size, "dtype": str(model.dtype),
            }  # fmt: skip
        validate_same(processes.gather(depends_on))
        with processes.as_one():
            kept = held.enter_context(keeping(depends_on, say)) if processes.is_main else None
        panel = Panel(model, processor, batch_size, answer_tokens, kept, processes)
        result = evaluate(panel, shown, budgets, against, metric, progress)
        if not processes.is_main:
            return None
    for line in unmet(result.spendings, pyramid, folder, data, image_root):
        say(line)
    return result


def _caveats(model: PyramidGenerationMixin, pyramid: PyramidConfig, dataset: Dataset) -> Iterator[str]:
    """Say what a reader of the figures should know."""
    if dataset.digest == pyramid.calibration.get("data_digest"):
        yield "Note: the routers were calibrated on these very samples; figures on others may be worse."
    if pyramid.is_imported:
        yield "Note: the pyramid came with its source, and the original, without it, is not how the model was trained."
    if model.is_adapted:
        yield "Note: the checkpoint is healed: its pyramid runs with the adapter, teacher and contenders without."
    elif pyramid.calibration.get("training"):
        yield (
            "Note: this export is healed: its teacher is its own weights without pooling. Evaluate the converted "
            "folder to compare it with the original."
        )
