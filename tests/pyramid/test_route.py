import re
import shlex

import pytest

from dpn_cli.errors import RouteError, UsageError
from dpn_cli.pyramid.config import Site
from dpn_cli.pyramid.experts import pool
from dpn_cli.pyramid.route import format_route, parse_route

SITES = (Site(1, pool((1, 1), (1, 2), (2, 2))), Site(3, pool((1, 1), (2, 2))))


@pytest.mark.parametrize(
    ("text", "route"), [("0,1", (0, 1)), ("1x2,2x2", (1, 1)), (" 2×2 , 1x1", (2, 0)), ("2,2x2", (2, 1))]
)
def test_routes_are_read(text: str, route: tuple[int, ...]) -> None:
    assert parse_route(text, SITES) == route
    assert parse_route(format_route(route, SITES), SITES) == route
    assert shlex.split(format_route(route, SITES)) == [format_route(route, SITES)]  # one word of a command line


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("0", "expected 2 experts, one for each site"),
     ("0,2", "'2' is not an expert of site 1: expected one of keep, pool:2x2, or 0 to 1"),
     ("3x3,0", "'3x3' is not an expert of site 0"), ("-1,0", "'-1' is not an expert"), ("a,b", "'a' is not an expert"),
     ("1x2,keap", "Did you mean 'keep'?"),
     ("", "found 1")],
)  # fmt: skip
def test_what_is_no_route_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(RouteError, match=re.escape(complaint)) as error:
        parse_route(text, SITES)
    assert isinstance(error.value, UsageError) and isinstance(error.value, ValueError)
