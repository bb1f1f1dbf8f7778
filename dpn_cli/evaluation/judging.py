"""Letting methods answer: what each makes of every sample, beside the teacher.

Shapes: B batch, A answer tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch

from dpn_cli.data.encoding import (
    Example,
    collate,
    collate_prompts,
    encode,
    encode_prompt,
    prompts,
)
from dpn_cli.data.rendering import chat_prompt, prompt_ids
from dpn_cli.data.samples import Sample
from dpn_cli.evaluation.baselines.baseline import Baseline, Prompt
from dpn_cli.evaluation.kept import KeptResults
from dpn_cli.inference.generation import forced_texts, generate_texts
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
        self,
        methods: Sequence[Baseline],
        samples: Sequence[Sample],
        sizes: Sequence[Prompt],
        teacher: Sequence[str],
        advance: Advance,
    ) -> list[list[SampleResult]]:
        """Return what every method makes of every sample.

        Args:
            methods: the methods, fitted to what they may spend.
            samples: the samples, each with at least one image.
            sizes: what `sizes` returns of them.
            teacher: the teacher's answers, which are the target where the data has none.
            advance: called with the number of samples done after each batch.

        Raises:
            UsageError: if a method cannot handle this model.
        """

        def judge_batch(rows: Sequence[tuple[Sample, Prompt, str]]) -> list[list[dict[str, Any]]]:
            judged = self._judge_batch(new, *zip(*rows, strict=True))
            return [[asdict(result) for result in results] for results in judged]

        new = [method for method in methods if str(method) not in self.known]
        rows = list(zip(samples, sizes, teacher, strict=True))
        if new:
            batches = self._each_batch(f"results of {new}", rows, judge_batch, advance)
            self.known.update({str(x): [each for batch in batches for each in batch[i]] for i, x in enumerate(new)})
        else:
            advance(len(samples))
        return [[SampleResult.from_dict(each) for each in self.known[str(method)]] for method in methods]

    def _judge_batch(
        self, methods: Sequence[Baseline], samples: Sequence[Sample], sizes: Sequence[Prompt], teacher: Sequence[str]
    ) -> Iterator[list[SampleResult]]:
        """Yield every method's results on one batch; the teacher runs once for all."""
        complete = [s if s.is_answered else s.answered(answer) for s, answer in zip(samples, teacher, strict=True)]
        examples = [encode(sample, self.processor, self.answer_tokens) for sample in complete]
        batch = collate(examples, self.processor.tokenizer.pad_token_id, self.model.device)
        with torch.inference_mode(), self.model.teacher():
            theirs = answer_log_probs(self.model, batch)
        rows, _ = answer_positions(batch["labels"])
        for i in is_broken(theirs, rows, len(examples)).nonzero():
            raise broken(examples[i].name, self.model)
        prompt_of = cache(lambda i: encode_prompt(samples[i], self.processor))
        for method in methods:
            with torch.inference_mode(), method.applied(self.model):
                ours = answer_log_probs(self.model, batch)
                likely = ours.argmax(-1)
                answers, spent = self._answer(method, samples, sizes, prompt_of, batch["labels"], likely)
            columns = (
                answers,
                mean_by_row(divergence(ours, theirs, temperature=1).clamp(min=0), rows, len(samples)).tolist(),
                mean_by_row((likely == theirs.argmax(-1)).float(), rows, len(samples)).tolist(),
                *spent,
            )
            yield [SampleResult(*values) for values in zip(*columns, strict=True)]

    def _answer(
        self,
        method: Baseline,
        samples: Sequence[Sample],
        sizes: Sequence[Prompt],
        prompt_of: Callable[[int], Example],
        labels: torch.Tensor,
        likely: torch.Tensor,
    ) -> tuple[list[str], tuple[Sequence[Any], ...]]:
        """Return the greedy answers of a method that is applied, and what it spends on the prompts.

        Answers that a forward pass along the labels [B, L] has shown are not generated, which halves the work. Where
        samples have several turns, the labels may be of others than what is asked.

        Args:
            method: the method.
            samples: the samples.
            sizes: what the prefill of each depends on.
            prompt_of: encodes what one of them asks.
            labels: [B, L], those that the last forward pass went along.
            likely: [A], the most likely tokens that it found.
        """
        is_single = all(len(sample.turns) == 1 for sample in samples)
        tokenizer, most = self.processor.tokenizer, self.answer_tokens
        texts = forced_texts(self.model, tokenizer, labels, likely, most) if is_single else {}
        spent = self._spent(method, sizes) if texts else None
        if rest := [i for i in range(len(samples)) if i not in texts]:
            inputs = collate_prompts(list(map(prompt_of, rest)), self.processor, self.model.device)
            texts |= dict(zip(rest, generate_texts(self.model, self.processor, inputs, most), strict=True))
        return [texts[i] for i in range(len(samples))], spent or self._spent(method, sizes)

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
