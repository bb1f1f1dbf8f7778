"""Letting methods answer: what each makes of every sample, beside the teacher.

Shapes: B batch, A answer tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dpn_cli.data.encoding import chat_prompt, collate, encode, prompts
from dpn_cli.data.samples import Sample
from dpn_cli.evaluation.baselines.baseline import Baseline, Prompt
from dpn_cli.evaluation.kept import KeptResults
from dpn_cli.inference.generation import generate_texts
from dpn_cli.inference.scoring import (
    answer_log_probs,
    answer_positions,
    broken,
    divergence,
    is_broken,
    mean_by_row,
)
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.processes import ALONE, Processes

Advance = Callable[[int], None]
Known = dict[str, list[Any]]  # one plain value per sample, by what was asked of whom


@dataclass(frozen=True)
class SampleResult:
    """What one method makes of one sample.

    Attributes:
        answer: the greedy answer.
        distortion: KL from the teacher, nats, the mean over the answer tokens.
        agreement: fraction of the answer tokens on which the most likely token is the teacher's.
        fraction: FLOPs of the prompt's prefill, as a fraction of the unpooled one's.
        visual_tokens: visual tokens, the mean over the decoder's layers.
        route: the experts that a pyramid took; None of a method that has no routes.
    """

    answer: str
    distortion: float
    agreement: float
    fraction: float
    visual_tokens: float
    route: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SampleResult":
        """Read what `asdict` made of a result."""
        route = data["route"]
        return cls(**{**data, "route": None if route is None else tuple(route)})


@dataclass(frozen=True)
class Evaluator:
    """The model, and how it is asked.

    Attributes:
        model: the model, in eval mode.
        processor: the checkpoint's processor.
        batch_size: samples per forward pass.
        answer_tokens: the most tokens in an answer.
        kept: results of an earlier run, and where new ones go; None to keep nothing.
        known: results of earlier evaluations of the same samples, which are not asked for again; new ones are added.
        processes: the processes that share the work, each with the same evaluator.
    """

    model: PyramidGenerationMixin
    processor: Any
    batch_size: int
    answer_tokens: int
    kept: KeptResults | None = None
    known: Known = field(default_factory=dict)
    processes: Processes = ALONE

    def sizes(self, samples: Sequence[Sample]) -> list[Prompt]:
        """Return what the prefill of every sample's prompt depends on, without decoding its images."""
        found = []
        for sample in samples:
            tokens = len(self.processor.tokenizer(chat_prompt(self.processor, sample, sample.asked))["input_ids"])
            shown = sample.image_sizes(sample.asked)
            sizes = {"image_sizes": torch.tensor(shown), "batch_num_images": torch.tensor([len(shown)])}
            found.append(Prompt(self.model.model.image_grids(len(shown), **sizes), tokens - len(shown)))
        return found

    def ask(self, method: Baseline, samples: Sequence[Sample], advance: Advance) -> list[str]:
        """Return a method's greedy answer to what every sample asks."""

        def ask_batch(batch: Sequence[Sample]) -> list[str]:
            inputs = prompts(batch, self.processor, self.model.device)
            with method.applied(self.model):
                return generate_texts(self.model, self.processor, inputs, self.answer_tokens)

        what = f"answers of {method}"
        if what in self.known:
            advance(len(samples))
        else:
            batches = self._each_batch(what, samples, ask_batch, advance)
            self.known[what] = [answer for answers in batches for answer in answers]
        return self.known[what]

    def judge(
        self, methods: Sequence[Baseline], samples: Sequence[Sample], teacher: Sequence[str], advance: Advance
    ) -> list[list[SampleResult]]:
        """Return what every method makes of every sample.

        Args:
            methods: the methods, fitted to what they may spend.
            samples: the samples, each with at least one image.
            teacher: the teacher's answers, which are the target where the data has none.
            advance: called with the number of samples done after each batch.

        Raises:
            UsageError: if a method cannot handle this model.
        """

        def judge_batch(pairs: Sequence[tuple[Sample, str]]) -> list[list[dict[str, Any]]]:
            judged = self._judge_batch(new, [sample for sample, _ in pairs], [answer for _, answer in pairs])
            return [[asdict(result) for result in results] for results in judged]

        new = [method for method in methods if str(method) not in self.known]
        pairs = list(zip(samples, teacher, strict=True))
        if new:
            batches = self._each_batch(f"results of {new}", pairs, judge_batch, advance)
            self.known.update({str(x): [each for batch in batches for each in batch[i]] for i, x in enumerate(new)})
        else:
            advance(len(samples))
        return [[SampleResult.from_dict(each) for each in self.known[str(method)]] for method in methods]

    def _judge_batch(
        self, methods: Sequence[Baseline], samples: Sequence[Sample], teacher: Sequence[str]
    ) -> Iterator[list[SampleResult]]:
        """Yield every method's results on one batch; the teacher runs once for all."""
        complete = [s if s.is_answered else s.answered(answer) for s, answer in zip(samples, teacher, strict=True)]
        examples = [encode(sample, self.processor, self.answer_tokens) for sample in complete]
        batch = collate(examples, self.processor.tokenizer.pad_token_id, self.model.device)
        inputs = prompts(samples, self.processor, self.model.device)
        sizes = self.sizes(samples)
        with torch.inference_mode(), self.model.teacher():
            theirs = answer_log_probs(self.model, batch)
        rows, _ = answer_positions(batch["labels"])
        for i in is_broken(theirs, rows, len(examples)).nonzero():
            raise broken(examples[i].name, self.model)
        for method in methods:
            with torch.inference_mode(), method.applied(self.model):
                ours = answer_log_probs(self.model, batch)
                answers = generate_texts(self.model, self.processor, inputs, self.answer_tokens)
            yield self._results(method, answers, ours, theirs, batch["labels"], sizes)

    def _results(
        self,
        method: Baseline,
        answers: Sequence[str],
        ours: torch.Tensor,
        theirs: torch.Tensor,
        labels: torch.Tensor,
        sizes: Sequence[Prompt],
    ) -> list[SampleResult]:
        """Compare the log-probabilities [A, V] of a method with the teacher's, row by row."""
        row, num_layers = answer_positions(labels)[0], self.model.text_model.shape.num_layers
        columns: tuple[Sequence[Any], ...] = (
            answers,
            mean_by_row(divergence(ours, theirs, temperature=1).clamp(min=0), row, len(labels)).tolist(),
            mean_by_row((ours.argmax(-1) == theirs.argmax(-1)).float(), row, len(labels)).tolist(),
            method.fractions(self.model, sizes),
            [sum(layers) / num_layers for layers in method.visual_tokens(self.model, sizes)],
            method.routes(self.model) or [None for _ in labels],
        )
        return [SampleResult(*values) for values in zip(*columns, strict=True)]

    def _each_batch(
        self, what: str, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]], advance: Advance
    ) -> list[list[Any]]:
        """Return what `work` makes of every batch, in whatever process, or has made of it in an earlier run."""
        starts = range(0, len(items), self.batch_size)
        batches = [items[start : start + self.batch_size] for start in starts]
        done: dict[int, list[Any]] = {}

        def take(number: int, results: list[Any]) -> None:
            done[number] = results
            advance(len(batches[number]))

        kept = self.kept.of(what) if self.kept else None
        self.processes.share(len(batches), lambda number: work(batches[number]), take, kept)
        return self.processes.agree([done[number] for number in sorted(done)])
