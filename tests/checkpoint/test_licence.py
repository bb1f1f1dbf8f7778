from pathlib import Path

import pytest

from dpn_cli.checkpoint.licence import read_licence


@pytest.mark.parametrize(
    ("readme", "config", "found"),
    [
        ("---\nlanguage: en\nlicense: llama2\n---\n# LLaVA", {}, {"license": "llama2"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            {"license": "mit"},
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ("---\nlanguage: en\n---\n", {"license": "mit"}, {"license": "mit"}),
        ("license: llama2", {}, {}),
        ("---\nlicense: llama2\n", {}, {}),
        ("---\n[broken: {yaml\n---\n", {}, {}),
        ("---\n- a list\n---\n", {}, {}),
        ("---\nlicense: [llama2, mit]\n---\n", {"license": 3}, {}),
        (f"---\nlicense: {'x' * 1000}\n---\n", {}, {}),
        (None, {}, {}),
    ],
)
def test_the_licence_is_the_cards_or_the_configs(
    tmp_path: Path, readme: str | None, config: dict[str, object], found: dict[str, str]
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert read_licence(tmp_path, config) == found
