"""What the teacher's model card says: held-out accuracy per kind, whole and under fixed pooling."""

from collections.abc import Sequence

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dpn_cli.data.samples import Sample as Asked
from dpn_cli.data.samples import Turn
from dpn_cli.demo.pictures import KINDS, Sample
from dpn_cli.evaluation.baselines.routes import FixedRoute
from dpn_cli.evaluation.judging import Evaluator
from dpn_cli.evaluation.metrics import exact_match
from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import Rate, pool

SITES = (1, 4, 7)
"""The layers at a quarter, a half and three quarters of the depth after which the card pools."""

RATES: tuple[Rate, ...] = ((1, 1), (1, 2), (2, 2))
WHOLE: tuple[Rate, Rate, Rate] = ((1, 1), (1, 1), (1, 1))
PYRAMID = PyramidConfig(tuple(Site(layer, pool(*RATES)) for layer in SITES), min_visual_tokens=1, static_route=(0, 0, 0))


def accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    route: Sequence[Rate] = WHOLE,
    batch_size: int = 64,
) -> dict[str, float]:
    """Measure per kind how often greedy decoding gives the answer.

    Args:
        model: The teacher.
        processor: Its processor.
        samples: Pictures with one question each.
        route: Average pooling (rows, columns) of the visual tokens after each layer of ``SITES``.
        batch_size: Samples per forward pass.

    Returns:
        Accuracy by kind, as a fraction.
    """
    asked = [Asked(s.id, (s.image,), (Turn(s.question, s.answer, images=1),), s.kind) for s in samples]
    contender = FixedRoute(PYRAMID, tuple(RATES.index(rate) for rate in route))
    evaluator = Evaluator(_pyramid_of(model), processor, batch_size, answer_tokens=4)
    answers = evaluator.ask(contender, asked, lambda done: None)
    scores = [(s.kind, exact_match(answer, s.answer)) for s, answer in zip(samples, answers, strict=True)]
    by_kind = {kind: [score for other, score in scores if other == kind] for kind in KINDS}
    return {kind: sum(found) / len(found) for kind, found in by_kind.items() if found}


def _pyramid_of(model: LlavaForConditionalGeneration) -> DpnLlavaForConditionalGeneration:
    """Return a pyramid with a teacher's weights."""
    settings = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    pyramid = DpnLlavaForConditionalGeneration(DpnLlavaConfig(**settings, pyramid=PYRAMID.to_dict()))
    pyramid.load_state_dict(model.state_dict())
    return pyramid.to(model.dtype).eval()
