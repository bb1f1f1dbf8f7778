"""The table of a calibration: one, whole at 80 columns, the dearest budget first."""

import re

import pytest
from PIL import Image

from dpn_cli import console
from dpn_cli.commands.tables import print_calibration
from dpn_cli.data.samples import Sample, Turn
from tests.reports import made_up_report


def test_a_calibration_is_one_table_that_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_WIDTH", 80)
    image = Image.new("RGB", (8, 8))
    report = made_up_report([Sample(str(i), (image,), (Turn("What?", "that"),)) for i in range(60)])
    print_calibration(report)
    output = capsys.readouterr().out
    title, rows = output.split("FLOPs", 1)
    low, high = report.agreement_interval
    assert f"{low:.1%} to {high:.1%}" in " ".join(title.split())
    [chosen] = [line for line in rows.splitlines() if "budget 0.5" in line]
    assert f"{report.routed.fraction:.3f}" in chosen
    assert f"{report.routed.agreement:.1%}" in chosen
    assert report.best_fixed is not None
    assert sum(f"{report.best_fixed[1].distortion:.4f}" in line for line in rows.splitlines()) == 1
    fractions = [float(found[1]) for line in rows.splitlines() if (found := re.search(r"([01]\.\d{3}) ", line))]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] == pytest.approx(1.0, abs=1e-3)
