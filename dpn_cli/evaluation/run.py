"""Evaluating a checkpoint's folder: data and model in, an evaluation out, kept on the way."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from dpn_cli.checkpoint.fitted import validate_predictors
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.data.encoding import token_limit
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.scan import Dataset
from dpn_cli.evaluation.evaluate import Evaluation, at_budgets, evaluate, validate_metric
from dpn_cli.evaluation.judging import Evaluator
from dpn_cli.evaluation.kept import keeping
from dpn_cli.evaluation.options import EvaluationOptions
from dpn_cli.evaluation.spending import unmet
from dpn_cli.evaluation.stored import PAGE_FILE, REPORT_FILE, read_known, write_report
from dpn_cli.extras import extra
from dpn_cli.inference.dtypes import compute_dtype
from dpn_cli.inference.loading import default_device, load_opened, load_opened_processor, max_positions
from dpn_cli.inference.provenance import in_words, provenance
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.fingerprint import evaluation_fingerprint, validate_same
from dpn_cli.parallel.launch import on_this_machine
from dpn_cli.parallel.processes import Processes
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.route import parse_route
from dpn_cli.reporter import SILENT, Reporter


def evaluate_folder(
    folder: Path,
    data: DataOptions,
    options: EvaluationOptions,
    reporter: Reporter = SILENT,
    processes: Processes | None = None,
    deliver: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Evaluation | None:
    """Evaluate a converted or exported checkpoint; nothing but `evaluation/report.json` and `.html` is written into it.

    That holds the results, so that another evaluation on the same samples asks only whom it has to. While it runs, they
    are kept in `.dpn/evaluation`, so that the same call goes on after a kill.

    Args:
        folder: the checkpoint folder.
        data: the samples to ask about; of the demo, the held-out pictures.
        options: Options of the comparison, and of the questions.
        reporter: Reporter of messages and of the progress.
        processes: the processes that evaluate together, each with this call; by default those that a launcher has
            started.
        deliver: Function that shows the evaluation, in the main process; until it returns, all results are kept.

    Returns:
        The evaluation; None in all processes but the main one.

    Raises:
        DpnError: if its report cannot be written; the evaluation is delivered all the same.
    """
    processes = processes or Processes.join(reporter.note)
    with ExitStack() as held:
        with processes.as_one():
            held.enter_context(in_use(folder))
            checkpoint, layout, pyramid = open_converted(folder)
            is_writable = os.access(folder, os.W_OK)
            if not is_writable:
                reporter.note(f"{folder} cannot be written, so the results are shown, but not kept in it.")
            at_budgets(pyramid, options.budgets)  # refuses what is out of reach, before the data are read
            for route in options.routes:  # what is none is refused before the data are read
                validate_predictors(checkpoint, layout, pyramid, pyramid.experts(parse_route(route, pyramid.sites)))
            with reporter.waiting("opening processor"):
                processor = load_opened_processor(checkpoint, layout)
            dataset = load_data(
                data, split="heldout", limit=options.samples, seed=options.seed, reporter=reporter,
                check=token_limit(processor, layout, max_positions(checkpoint), options.answer_tokens),
            )  # fmt: skip
            shown = [sample for sample in dataset.samples if sample.images]
            validate_metric(options.metric, shown)
            device = default_device()
            dtype = compute_dtype(checkpoint, layout, options.dtype, device, reporter.note, copies=on_this_machine())
        dtype = processes.agree(dtype)
        with processes.as_one():
            with reporter.waiting("loading the model"):
                model = load_opened(checkpoint, pyramid, dtype, device_map=device)
            reporter.note(f"{len(shown)} samples from {data.name}; computing on {in_words(model)}")
            for line in _caveats(model, pyramid, dataset):
                reporter.note(line)
            depends_on = {
                **evaluation_fingerprint(checkpoint, Lora.of(folder, pyramid), dataset.digest),
                "answer_tokens": options.answer_tokens, "batch_size": options.batch_size, "dtype": options.dtype,
            }  # fmt: skip
        validate_same(processes.gather(depends_on))
        with processes.as_one():
            kept = held.enter_context(keeping(depends_on, reporter.note)) if processes.is_main else None
        known = processes.agree(read_known(folder, depends_on) if processes.is_main else {})
        evaluator = Evaluator(model, processor, options.batch_size, options.answer_tokens, kept, known, processes)
        result = evaluate(evaluator, shown, options, reporter)
        if not processes.is_main:
            return None
        try:
            if is_writable:
                with extra(f"{folder / REPORT_FILE} and .html are not written"):
                    about = _about(folder, data, model, pyramid)
                    earlier = write_report(folder, about, depends_on, known, result, shown)
                reporter.note(
                    f"Wrote {folder / PAGE_FILE} and report.json. More methods and budgets can be added to them."
                )
                if earlier:
                    reporter.note(f"The earlier evaluation, of other samples or settings, is kept in {earlier}.")
        finally:
            deliver(result)
            for line in unmet(result.spendings, pyramid, folder, data):
                reporter.note(line)
    return result


def _about(folder: Path, data: DataOptions, model: PyramidGenerationMixin, pyramid: PyramidConfig) -> dict[str, str]:
    """Say what was evaluated on what, when and where."""
    recipe = pyramid.calibration.get("recipe")
    return provenance(model, {"checkpoint": str(folder), "recipe": recipe and str(recipe), "data": data.name})


def _caveats(model: PyramidGenerationMixin, pyramid: PyramidConfig, dataset: Dataset) -> Iterator[str]:
    """Say what a reader of the figures should know."""
    if dataset.digest == pyramid.calibration.get("data_digest"):
        yield "Note: the routers were calibrated on these very samples; on others, figures may be worse."
    if pyramid.is_imported:
        yield "Note: the pyramid came with its source: the model was trained with it, and the original runs without it."
    if teacher := pyramid.calibration.get("teacher"):
        yield (
            f"Note: the checkpoint was calibrated against another model, {teacher}; the original here is its own, "
            "with all tokens."
        )
    if model.is_adapted:
        yield "Note: the checkpoint is healed: the pyramid runs with its adapter, teacher and other methods without it."
    elif pyramid.calibration.get("training"):
        yield (
            "Note: this export is healed: its teacher is its own weights with all tokens. Evaluate the converted "
            "folder to compare it with the original."
        )
