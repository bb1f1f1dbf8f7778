"""A router that is joined from networks gives their mean, and is no larger than it was."""

import pytest
import torch

from dpn_cli.calibration.members import MEMBERS, join, new_members, num_members
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
    assert num_members(router) == count
    [*members] = (new_members(torch.nn.ModuleList([router]), seed)[0] for seed in range(count))
    for seed, member in enumerate(members):  # as if they were fitted
        torch.manual_seed(seed)
        for parameter in member.parameters():
            torch.nn.init.normal_(parameter)
    features = torch.randn(7, config.num_inputs, SIZE)
    with torch.no_grad():
        expected = torch.stack([member(features) for member in members]).mean(0)
        join(router, members)
        torch.testing.assert_close(router(features), expected, rtol=1e-4, atol=1e-4)


def test_members_begin_unlike_each_other_and_alike_for_the_same_seed() -> None:
    routers = torch.nn.ModuleList([Router(SIZE, SCORES, RouterConfig())])
    one, same, other = (new_members(routers, seed)[0].hidden.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
