"""The model `dpn` of lmms-eval: a converted or exported checkpoint, at a budget or with its pyramid off.

    lmms-eval eval --model dpn --model_args pretrained=DIR,budget=0.44 --tasks gqa,pope --batch_size 8

Installing this package is enough, lmms-eval finds the plugin (see `harness.manifest`).
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.data.encoding import prompts
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.evaluation.baselines.routes import Original, Routed
from dpn_cli.evaluation.latency import prompts_of
from dpn_cli.inference.dtypes import compute_dtype
from dpn_cli.inference.loading import default_device, load_opened, load_opened_processor
from dpn_cli.parallel.launch import is_launched, on_this_machine

MAX_NEW_TOKENS = 1024  # where a task does not say

_LOG = logging.getLogger(__name__)


class DpnLlava(lmms):
    """Answers the requests of lmms-eval in batches.

    Args:
        pretrained: the checkpoint's folder.
        budget: mean fraction of the prefill FLOPs to spend; None for what the checkpoint is set to.
        teacher: whether to answer with the pyramid off.
        batch_size: samples per forward pass.
        device: the device; None for the first GPU, or this process's in a launch of several, else the CPU.
        dtype: dtype to compute in, see `compute_dtype`.
        record: a JSON file that takes the mean FLOPs fraction of every task.
    """

    def __init__(
        self,
        pretrained: str,
        budget: float | None = None,
        teacher: bool = False,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        record: str | None = None,
    ) -> None:
        super().__init__()
        self.device = device or default_device()
        if device is None and self.device == "cuda" and is_launched():
            self.device += f":{os.environ['LOCAL_RANK']}"
        self.batch_size = int(batch_size)
        self.method = Original() if teacher else Routed(None if budget is None else float(budget))
        with in_use(Path(pretrained)):
            checkpoint, layout, pyramid = open_converted(Path(pretrained))
            self.processor = load_opened_processor(checkpoint, layout)
            dtype = compute_dtype(checkpoint, layout, dtype, self.device, _LOG.warning, copies=on_this_machine())
            self.model = load_opened(checkpoint, pyramid, dtype, device_map=self.device)
        self.record = None if record is None else Path(record)
        self.fractions: dict[str, list[float]] = {}

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests, whose arguments are (context, generation settings, document → visuals, id, task, split).

        Greedy, unless a task asks for another temperature. An answer ends before the first of the task's stop strings.
        """
        answers: dict[int, str] = {}
        for batch in self._batches([request.args for request in requests]):
            settings, task = batch[0][1][1], batch[0][1][4]
            samples = [self._sample(arguments) for _, arguments in batch]
            inputs = prompts(samples, self.processor, self.model.device)
            with self.method.applied(self.model):
                texts = self._generate(inputs, settings)
                fractions = self.method.fractions(self.model, prompts_of(self.model, inputs))
            self.fractions.setdefault(task, []).extend(fractions)
            for (place, _), text in zip(batch, texts, strict=True):
                answers[place] = _until(text, settings.get("until", ()))
        if self.record is not None and self.rank == 0:
            means = {task: sum(values) / len(values) for task, values in self.fractions.items()}
            self.record.write_text(json.dumps(means))
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse tasks that score given continuations."""
        raise NotImplementedError("dpn answers tasks with output_type generate_until; it has no loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise NotImplementedError("dpn answers tasks with output_type generate_until, in one round")

    def _batches(self, requests: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[int, tuple[Any, ...]]]]:
        """Yield numbered requests of one task and with the same settings, longest contexts first."""

        def kind(request: tuple[int, tuple[Any, ...]]) -> tuple[str, str]:
            return request[1][4], repr(request[1][1])

        order = sorted(enumerate(requests), key=lambda each: (kind(each), -len(each[1][0])))
        for _, group in groupby(order, key=kind):
            numbered = list(group)
            yield from (numbered[i : i + self.batch_size] for i in range(0, len(numbered), self.batch_size))

    def _sample(self, arguments: tuple[Any, ...]) -> Sample:
        """Return a request's question and images; images go first, where the chat template puts them."""
        context, _, visuals_of, doc_id, task, split = arguments
        images = tuple(visuals_of(self.task_dict[task][split][doc_id]) or ())
        return Sample(f"{task} {doc_id}", images, (Turn(context.replace("<image>", "").strip()),))

    def _generate(self, inputs: Any, settings: dict[str, Any]) -> list[str]:
        sampled = bool(settings.get("temperature"))
        generated = self.model.generate(
            **inputs,
            max_new_tokens=settings.get("max_new_tokens", MAX_NEW_TOKENS),
            num_beams=settings.get("num_beams") or 1,
            do_sample=sampled,
            temperature=settings["temperature"] if sampled else None,
            top_p=settings.get("top_p") if sampled else None,
            return_dict_in_generate=False,
        )
        return self.processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _until(text: str, stops: str | Sequence[str]) -> str:
    """Cut an answer before the first of its stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop, maxsplit=1)[0] if stop else text
    return text.strip()
