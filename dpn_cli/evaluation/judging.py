"""Letting methods answer: what each makes of every sample, beside the teacher.

Shapes: B batch, A answer tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dpn_cli.data.encoding import collate, encode
from dpn_cli.data.rendering import chat_prompt, prompt_ids
from dpn_cli.data.samples import Sample
from dpn_cli.evaluation.asking import AskedBatch
from dpn_cli.evaluation.baselines.baseline import Baseline, Prompt
from dpn_cli.evaluation.baselines.routes import Original
from dpn_cli.evaluation.kept import KeptResults
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
TEACHER = f"answers of {Original()}"  # what they are known by


@dataclass(frozen=True)
class SampleResult:
    """What one method makes of one sample.

    Attributes:
        answer: the greedy answer.
        distortion: KL from the teacher, nats, the mean over the answer tokens.
        agreement: fraction of the answer tokens on which the most likely token is the teacher's.
        fraction: FLOPs of the prompt's prefill, as a fraction of the original's.
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
        return [self._size(sample) for sample in samples]

    def _size(self, sample: Sample) -> Prompt:
        tokens = len(prompt_ids(self.processor, chat_prompt(self.processor, sample, sample.asked)))
        shown = sample.image_sizes(sample.asked)
        sizes = {"image_sizes": torch.tensor(shown), "batch_num_images": torch.tensor([len(shown)])}
        return Prompt(self.model.model.image_grids(len(shown), **sizes), tokens - len(shown))

    @property
    def teacher_answers(self) -> list[str]:
        """The original's greedy answers to what the samples ask that were judged."""
        return self.known[TEACHER]

    def judge(
        self, methods: Sequence[Baseline], samples: Sequence[Sample], sizes: Sequence[Prompt], advance: Advance
    ) -> list[list[SampleResult]]:
        """Return what every method makes of every sample, and have `teacher_answers`.

        Args:
            methods: the methods, fitted to what they may spend.
            samples: the samples, each with at least one image.
            sizes: what `sizes` returns of them.
            advance: called with the number of samples done after each batch.

        Raises:
            UsageError: if a method cannot handle this model.
        """
        new = [method for method in methods if str(method) not in self.known]
        names = [TEACHER, *map(str, new)]

        def judge_batch(rows: Sequence[tuple[Sample, Prompt, str | None]]) -> list[list[Any]]:
            answers, *judged = self._judge_batch(new, *zip(*rows, strict=True))
            return [answers, *([asdict(result) for result in results] for results in judged)]

        if all(name in self.known for name in names):
            advance(len(samples))
        else:
            answers = self.known.get(TEACHER, [None] * len(samples))
            rows = list(zip(samples, sizes, answers, strict=True))
            batches = self._each_batch(f"{TEACHER}, results of {new}", rows, judge_batch, advance)
            self.known.update({x: [each for batch in batches for each in batch[i]] for i, x in enumerate(names)})
        return [[SampleResult.from_dict(each) for each in self.known[str(method)]] for method in methods]

    def _judge_batch(
        self,
        methods: Sequence[Baseline],
        samples: Sequence[Sample],
        sizes: Sequence[Prompt],
        answers: Sequence[str | None],
    ) -> Iterator[list[Any]]:
        """Yield the teacher's answers to a batch, then every method's results on it; the teacher runs once for all.

        Its answers, of which some may be known, are the target where the data has none.
        """
        asked = AskedBatch(self.model, self.processor, samples, self.answer_tokens)
        known = {row: answer for row, answer in enumerate(answers) if answer is not None}
        with torch.inference_mode(), self.model.teacher():
            known |= asked.generated([i for i, x in enumerate(samples) if not x.is_answered and i not in known])
            complete = [x if x.is_answered else x.answered(known[i]) for i, x in enumerate(samples)]
            batch, theirs = self._pass_along(complete)
            labels, expected = batch["labels"], theirs.argmax(-1)
            taught = asked.completed(asked.shown(labels, expected) | known)
        yield taught
        rows, _ = answer_positions(labels)
        for method in methods:
            with torch.inference_mode(), method.applied(self.model):
                ours = answer_log_probs(self.model, batch)
                likely = ours.argmax(-1)
                shown = asked.shown(labels, likely)
                spent = self._spent(method, sizes) if shown else None
                columns = (
                    asked.completed(shown),
                    mean_by_row(divergence(ours, theirs, temperature=1).clamp(min=0), rows, len(samples)).tolist(),
                    mean_by_row((likely == expected).float(), rows, len(samples)).tolist(),
                    *(spent or self._spent(method, sizes)),
                )
            yield [SampleResult(*values) for values in zip(*columns, strict=True)]

    def _pass_along(self, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return a batch of answered samples, and the log-probabilities [A, V] of the answers as the model is set."""
        examples = [encode(sample, self.processor, self.answer_tokens) for sample in samples]
        batch = collate(examples, self.processor.tokenizer.pad_token_id, self.model.device)
        log_probs = answer_log_probs(self.model, batch)
        rows, _ = answer_positions(batch["labels"])
        for i in is_broken(log_probs, rows, len(examples)).nonzero():
            raise broken(examples[i].name, self.model)
        return batch, log_probs

    def _spent(self, method: Baseline, sizes: Sequence[Prompt]) -> tuple[Sequence[Any], ...]:
        """Return the FLOPs fractions, visual tokens and routes of a method's last prefill, sample by sample."""
        num_layers = self.model.text_model.shape.num_layers
        return (
            method.fractions(self.model, sizes),
            [sum(layers) / num_layers for layers in method.visual_tokens(self.model, sizes)],
            method.routes(self.model) or [None for _ in sizes],
        )

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
