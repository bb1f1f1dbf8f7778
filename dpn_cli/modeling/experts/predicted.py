"""`predicted`: the visual tokens stay that a small network foresees the answer will need.

Source: ours; see `dpn_cli.modeling.predictors`.
"""

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.select import select
from dpn_cli.modeling.predictors import last_text


def predicted_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens that the predictor of this site scores highest."""
    predictor = batch.text_model.predictors[str(batch.next_layer)]
    scores = predictor(batch.state.hidden_states, *last_text(batch.state))
    return select(batch, scores.to(batch.coords.device))  # layers and predictors may be on several devices
