"""`predicted` and `guided`: the visual tokens stay that a small network foresees the answer will need.

Source: ours; see `dpn_cli.modeling.predictors`.
"""

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.select import select
from dpn_cli.modeling.predictors import predicted_scores
from dpn_cli.pyramid.config import predictor_name


def predicted_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens that the predictor of this kind of expert at this site scores highest."""
    predictor = batch.text_model.predictors[predictor_name(batch.experts[0].kind, batch.next_layer)]
    scores = predicted_scores(predictor, batch.state)
    return select(batch, scores.to(batch.coords.device))  # layers and predictors may be on several devices
