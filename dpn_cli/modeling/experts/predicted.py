"""`predicted` and `guided`: the visual tokens stay that a small network foresees the answer will need.

Source: ours; see `dpn_cli.modeling.predictors`.
"""

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.select import select
from dpn_cli.modeling.predictors import foreseen
from dpn_cli.pyramid.config import network_name


def foreseen_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens that the network of this kind of expert at this site scores highest."""
    network = batch.text_model.predictors[network_name(batch.experts[0].kind, batch.next_layer)]
    scores = foreseen(network, batch.state)
    return select(batch, scores.to(batch.coords.device))  # layers and networks may be on several devices
