"""What do shared prefixes save? Calibration's rollout against a loop with two models, on the same routes and samples.

    python benchmarks/rollout.py --model dpn-demo/demo-dpn

The loop is what one would write first: a second copy of the model is the teacher, and every route is a forward of its
own through the whole model. Both send the same batches down the same routes. Each has a process to itself, so that its
peak memory is its own; they take turns, in alternating order, so that a round's two times belong together.
"""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import click
import torch

from dpn_cli import console
from dpn_cli.calibration.rollout import Batch, RouteTree, measure, plan_batches
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.data.encoding import IGNORED, Example, collate, encode, expected_grids
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.inference.loading import default_device, load_model, load_processor
from dpn_cli.inference.scoring import divergence, instruction_columns
from dpn_cli.modeling.wrapper import PyramidGenerationMixin

MIB = 1 << 20
TOLERANCE = 1e-4  # nats

Measure = Callable[[], torch.Tensor]  # returns the distortion of every sample down every route, [N, R]


@dataclass(frozen=True)
class Job:
    """What both methods do.

    Attributes:
        model: a converted folder.
        data: the data, as `--data` of `dpn calibrate` takes it.
        samples: number of samples to read.
        batch_size: samples per forward pass.
    """

    model: Path
    data: str
    samples: int
    batch_size: int

    def open(self) -> tuple[PyramidGenerationMixin, list[Example], RouteTree, list[Batch], int]:
        """Load the model, and encode and plan the samples; the last item fills up the shorter ones."""
        model = load_model(self.model, device_map=default_device())
        processor = load_processor(self.model)
        rows = load_data(DataOptions(self.data), limit=self.samples).samples
        samples = [sample for sample in rows if sample.images]
        examples = [encode(sample, processor, answer_tokens=8) for sample in samples]
        layout = open_converted(self.model)[1]
        grids = [expected_grids(sample, layout) for sample in samples]
        tree = RouteTree.of(model.pyramid, grids)
        batches = plan_batches(tree, model.pyramid, grids, self.batch_size, None)
        return model, examples, tree, batches, processor.tokenizer.pad_token_id


@dataclass(frozen=True)
class Result:
    """A method's figures.

    Attributes:
        name: the method's name.
        ms_per_sample: milliseconds per sample, in every round.
        peak_mib: the most memory that its process held, in MiB.
    """

    name: str
    ms_per_sample: list[float]
    peak_mib: float


def rollout(job: Job) -> Measure:
    """Measure as calibration does."""
    model, examples, tree, batches, pad = job.open()
    return lambda: measure(model, examples, tree, batches, pad).distortion


def two_models(job: Job) -> Measure:
    """Measure with a teacher and a student, a whole forward per route."""
    student, examples, _, batches, pad = job.open()
    teacher = load_model(job.model, device_map=default_device())
    return lambda: loop(teacher, student, examples, batches, pad)


@torch.inference_mode()
def loop(
    teacher: PyramidGenerationMixin,
    student: PyramidGenerationMixin,
    examples: Sequence[Example],
    batches: Sequence[Batch],
    pad: int,
) -> torch.Tensor:
    """Return the distortion [N, R] of samples that are offered the same routes."""
    distortion = torch.zeros(len(examples), len(batches[0].routes))
    for batch in batches:
        inputs = collate([examples[row] for row in batch.rows], pad, student.device)
        labels = inputs.pop("labels")
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs["instruction"] = instruction_columns(labels)
        row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        with teacher.teacher():
            expected = teacher(**inputs, use_cache=False).logits[row, column].float()
        for i, route in enumerate(batch.routes[1:], start=1):
            student.set_route(route)
            found = student(**inputs, use_cache=False).logits[row, column].float()
            total = torch.zeros(len(batch.rows), device=row.device)
            total.index_add_(0, row, divergence(found, expected, temperature=1.0))
            distortion[list(batch.rows), i] = (total / row.bincount()).cpu()
    return distortion


BASELINES = {"rollout": rollout, "two models": two_models}


def serve(name: str, job: Job, pipe: Connection) -> None:
    """Be one of the methods: measure whenever told to, and answer with the seconds; in the end, with all else."""
    measure_all = BASELINES[name](job)
    distortion = measure_all()  # warms up
    pipe.send(len(distortion))
    while pipe.recv():
        start = time.perf_counter()
        distortion = measure_all()
        pipe.send(time.perf_counter() - start)
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB, distortion.tolist()))


def compete(job: Job, rounds: int) -> tuple[list[Result], float]:
    """Let the methods take turns; also return the largest difference of their distortions."""
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in BASELINES:
        pipes[name], other = context.Pipe()
        context.Process(target=serve, args=(name, job, other), daemon=True).start()
        other.close()  # so that a method that dies ends the wait for it
        count = pipes[name].recv()
    times: dict[str, list[float]] = {name: [] for name in BASELINES}
    with console.progress("rounds", rounds) as advance:
        for i in range(rounds):
            for name in sorted(BASELINES, reverse=i % 2 == 1):
                pipes[name].send(True)
                times[name].append(pipes[name].recv() * 1000 / count)
            advance(1)
    results, tables = [], []
    for name, pipe in pipes.items():
        pipe.send(False)
        peak, distortion = pipe.recv()
        results.append(Result(name, times[name], peak))
        tables.append(torch.tensor(distortion))
    return results, (tables[0] - tables[1]).abs().max().item()


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="A converted folder.")
@click.option("--data", default="demo", show_default=True)
@click.option("--samples", default=64, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(model: Path, data: str, samples: int, batch_size: int, rounds: int, as_json: bool) -> None:
    """Time both ways and compare what they measure."""
    results, difference = compete(Job(model, data, samples, batch_size), rounds)
    ours, theirs = results
    ratios = sorted(b / a for a, b in zip(ours.ms_per_sample, theirs.ms_per_sample, strict=True))
    if as_json:
        figures = {"results": [asdict(each) for each in results], "ratios": ratios, "difference": difference}
        click.echo(json.dumps(figures, indent=2))
    else:
        rows = [(r.name, f"{median(r.ms_per_sample):.1f}", f"{r.peak_mib:.0f}") for r in results]
        console.table(f"{samples} samples, {rounds} rounds", ["", "ms per sample, median", "peak MiB"], rows)
        console.note(
            f"Two models take {median(ratios):.2f} times as long ({ratios[0]:.2f} to {ratios[-1]:.2f} in a round); "
            f"distortions differ by {difference:.1e} nats at most."
        )
    if difference > TOLERANCE:
        raise click.ClickException(f"the two ways measure different things: {difference:.1e} nats apart")


if __name__ == "__main__":
    main()
