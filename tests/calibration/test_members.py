"""A router that is joined from networks gives their mean, and is no larger than it was."""

from typing import Any

import pytest
import torch

from dpn_cli.calibration.members import MEMBERS, Members, new_members
from dpn_cli.modeling.routers import Router
from dpn_cli.pyramid.config import RouterConfig

SIZE, SCORES = 32, 5


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (RouterConfig(output="logits"), MEMBERS),
        (RouterConfig(output="logits", input="last_instruction_token", hidden_ratio=1), MEMBERS),
        (RouterConfig(output="logits", hidden_ratio=16), 1),  # two hidden units
        (RouterConfig(output="logits", kind="linear"), 1),
    ],
)
def test_a_joined_router_is_the_mean_of_its_members(config: RouterConfig, count: int) -> None:
    router = Router(SIZE, SCORES, config)
    for parameter in router.parameters():  # as if it were fitted before
        torch.nn.init.normal_(parameter)
    members = Members(router)
    features = torch.randn(7, config.num_inputs, SIZE)
    with torch.no_grad():
        scores = members(features)
        assert scores.shape == (count, 7, SCORES)
        members.join(router)
        torch.testing.assert_close(router(features), scores.mean(0), rtol=1e-4, atol=1e-4)


def test_one_member_does_not_learn_from_another() -> None:
    members: Any = Members(Router(SIZE, SCORES, RouterConfig()))
    members(torch.randn(7, RouterConfig().num_inputs, SIZE))[1].sum().backward()
    of_member = members.hidden.weight.grad.unflatten(0, (MEMBERS, -1)).abs().sum((1, 2))
    assert [float(x) > 0 for x in of_member] == [i == 1 for i in range(MEMBERS)]


def test_members_begin_unlike_each_other_and_alike_for_the_same_seed() -> None:
    routers = torch.nn.ModuleList([Router(SIZE, SCORES, RouterConfig())])
    drawn: list[Any] = [new_members(routers, seed)[0] for seed in (0, 0, 1)]
    one, same, other = (members.hidden.weight for members in drawn)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(*one.unflatten(0, (MEMBERS, -1))[:2])
