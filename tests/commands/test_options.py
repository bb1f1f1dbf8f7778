from functools import partial
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dpn_cli.cli import COMMANDS, cli, main
from dpn_cli.commands.data_options import Columns, Names, data_options
from dpn_cli.commands.numbers import Fraction, Percent
from dpn_cli.commands.options import Choice, Size
from dpn_cli.data.options import DataOptions


@click.command()
@click.option("--budget", type=Fraction())
@click.option("--dtype", type=Choice(["float32", "bfloat16"]))
def command(budget: float | None, dtype: str | None) -> None:
    click.echo(f"{budget} {dtype}")


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-0.5", "1.01", "half"])
def test_a_fraction_is_above_zero_and_at_most_one(value: str) -> None:
    assert CliRunner().invoke(command, ["--budget", value]).exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_are_called_so_in_messages(name: str) -> None:
    """Click calls them ranges."""
    types = [each.type for each in import_module(f"dpn_cli.commands.{name}").command.params]
    assert not [kind for kind in types if "range" in kind.name or kind.name in ("integer", "float")]


def test_good_values_pass() -> None:
    assert CliRunner().invoke(command, ["--budget", "1", "--dtype", "float32"]).output == "1.0 float32\n"


def test_a_wrong_choice_suggests_a_right_one() -> None:
    done = CliRunner().invoke(command, ["--dtype", "bfloat1"])
    assert done.exit_code == 2
    assert "Did you mean 'bfloat16'?" in done.output


@pytest.mark.parametrize(("value", "share"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0), ("100%", 1.0)])
def test_a_percent_is_a_share(value: str, share: float) -> None:
    assert Percent().convert(value, None, None) == share


@pytest.mark.parametrize("value", ["5", "-1%", "101%", "nan", "%", "few"])
def test_what_is_no_share_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter, match=r"expected something like 5% or 0\.05"):
        Percent().convert(value, None, None)


def test_a_size_is_height_and_width() -> None:
    assert Size().convert("480x640", None, None) == (480, 640)
    assert all("--image-size HxW" in CliRunner().invoke(cli, [name, "--help"]).output for name in ("bench", "inspect"))


@pytest.mark.parametrize("value", ["", "480", "0x10", "480x", "-1x5", "480×640", "1e3x5", "480x640x3", "999999x1"])
def test_what_is_no_size_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter, match="such as 480x640"):
        Size().convert(value, None, None)


@pytest.mark.parametrize("value", ["1x12000", "12000x1", "20000x20000"])
def test_sizes_of_images_that_are_not_read_are_refused(value: str) -> None:
    with pytest.raises(click.BadParameter, match="pixels, at most"):
        Size().convert(value, None, None)


def test_names_stand_between_commas() -> None:
    assert Names().convert("a, b c,", None, None) == ("a", "b c")


def test_options_about_data_reach_a_command_as_one() -> None:
    seen: list[DataOptions | None] = []

    @click.command()
    @partial(data_options, required=False)
    def reads(data: DataOptions | None) -> None:
        seen.append(data)

    options = [
        "--image-root",
        ".",
        "--ignore-fields",
        "a,b",
        "--columns",
        "image=img 1, answer=a=b",
        "--stream",
        "--allow-urls",
    ]
    options += ["--on-bad-row", "skip", "--max-bad", "20%"]
    for line in (["--data", "rows.json", *options], ["--data", "demo"], []):
        assert CliRunner().invoke(reads, line).exit_code == 0
    columns = (("image", "img 1"), ("answer", "a=b"))
    rows = DataOptions("rows.json", Path(), ("a", "b"), columns, True, True, "skip", 0.2)
    assert seen == [rows, DataOptions("demo"), None]
    again = CliRunner().invoke(reads, [*rows.arguments(), "--on-bad-row", "skip", "--max-bad", "20%"])
    assert again.exit_code == 0 and seen[-1] == rows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("picture", "'picture': expected ROLE=COLUMN, such as image=picture"),
        ("image=", "expected ROLE=COLUMN"),
        ("images=picture", "'images' is not one of image, conversation, .*Did you mean 'image'"),
        ("image=a,image=b", "image is given twice, as a and as b"),
    ],
)
def test_columns_that_are_none_are_refused(value: str, message: str) -> None:
    with pytest.raises(click.BadParameter, match=message):
        Columns().convert(value, None, None)


# What a command needs beside --model.
NEEDED = {
    "run": ["--image", "picture.png", "what ?"],
    "data": ["data.json"],
    "calibrate": ["--data", "data.json"],
    "eval": ["--data", "data.json"],
}


def takes_a_model(name: str) -> bool:
    return any(parameter.opts == ["--model"] for parameter in import_module(f"dpn_cli.commands.{name}").command.params)


@pytest.mark.parametrize("name", [name for name in COMMANDS if takes_a_model(name)])
@pytest.mark.parametrize(("folder", "complaint"), [("nosuchdir", "does not exist"), ("file", "is a file")])
def test_every_command_says_that_there_is_no_such_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, folder: str,
    complaint: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no folder")
    assert main([name, "--model", folder, *NEEDED.get(name, [])]) == 3
    assert f"Error: {folder} {complaint}" in capsys.readouterr().err
