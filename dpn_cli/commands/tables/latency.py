"""Times, speedups and memory of methods."""

from typing import TYPE_CHECKING

from dpn_cli import console
from dpn_cli.commands.tables.columns import Column, meaning, show
from dpn_cli.notation import nats, percent

if TYPE_CHECKING:
    from dpn_cli.evaluation.latency import Latency, Measurement

PHASE_NAMES = {
    "vision": "vision tower",
    "prefill": "prefill",
    "first_token": "first token",
    "decode": "decode, per token",
}


def print_latency(result: "Latency", has_data: bool, wide: bool = False) -> None:
    """Print the times, speedups and memory of every method; wide, every phase and all costs in a table each."""
    threads = f", {result.threads} thread{'s' * (result.threads > 1)}" if result.device == "CPU" else ""
    title = (
        f"Batch of {result.batch_size}, prompts of up to {result.prompt_tokens} tokens, {result.new_tokens} new ones; "
        f"{result.device}{threads}, {result.dtype}, {result.attention} attention; "
        f"{result.rounds} round{'s' * (result.rounds > 1)}"
    )
    if wide:
        _print_phases(title, result)
        _print_costs(result, has_data)
        return
    costs = [
        Column("ms per token", lambda m: _median(m, "decode"), means="per token"),
        Column("peak MB", _peak, means="peak"),
    ]
    fidelity = [
        Column("KL", lambda m: nats(m.distortion), means="KL"),
        Column("same token", lambda m: percent(m.agreement), means="same token"),
    ]
    show(
        title,
        [
            Column("method", lambda m: m.name, text=True),
            Column("FLOPs", lambda m: f"{m.fraction:.3f}", means="FLOPs"),
            Column("first token ms", lambda m: _median(m, "first_token"), means="first token"),
            Column("prefill ms", lambda m: _median(m, "prefill"), means="prefill"),
            Column("speedup", _speedup, text=True, means="speedup"),
            *(fidelity if has_data else costs),
        ],
        result.measurements,
        wide,
        more="--wide shows the vision tower and decoding, the KV cache and the attention kernels, too.",
    )


def _median(each: "Measurement", name: str) -> str:
    return f"{each.phases[name].median_s * 1e3:.1f}" if name in each.phases else ""


def _speedup(each: "Measurement") -> str:
    phase = each.phases["prefill"]
    return f"{phase.speedup:.2f} ({phase.speedup_low:.2f}–{phase.speedup_high:.2f})"


def _peak(each: "Measurement") -> str:
    return "" if each.peak_bytes is None else f"{each.peak_bytes / 1e6:,.0f}"


def _print_phases(title: str, result: "Latency") -> None:
    console.table(
        title,
        ["method", "phase", "median, ms", "quartiles, ms", "speedup", "95% interval", "ideal speedup", "efficiency"],
        [row for each in result.measurements for row in _phase_rows(each)],
        texts=["method", "phase"],
        legend="Speedups are paired by round; the ideal one is that of the FLOPs, and efficiency the share of it that "
        "is reached.",
    )


def _print_costs(result: "Latency", has_data: bool) -> None:
    fidelity = ["KL (nats)", "same first token"] if has_data else []
    costs = ["method", "FLOPs", "prefill GFLOPs", "tokens/s", "KV cache, MB", "peak, MB"]
    console.table(
        "Cost" + (", and fidelity of the first token to the original's" if has_data else ""),
        [*costs, *fidelity, "attention kernels"],
        [_cost_row(each, result.batch_size, has_data) for each in result.measurements],
        texts=["method", "attention kernels"],
        legend=f"{meaning('FLOPs')}; {meaning('peak')}.",
    )


def _phase_rows(each: "Measurement") -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, phase in each.phases.items():
        ideal, reached = f"{each.ideal_speedup:.2f}", f"{phase.speedup / each.ideal_speedup:.0%}"
        rows.append(
            (
                each.name, PHASE_NAMES[name], f"{phase.median_s * 1e3:.1f}",
                f"{phase.low_s * 1e3:.1f} – {phase.high_s * 1e3:.1f}", f"{phase.speedup:.2f}",
                f"{phase.speedup_low:.2f} – {phase.speedup_high:.2f}",
                *((ideal, reached) if name == "prefill" else ("", "")),
            )
        )  # fmt: skip
    return rows


def _cost_row(each: "Measurement", batch_size: int, has_data: bool) -> list[str]:
    decode = each.phases.get("decode")
    return [
        each.name,
        f"{each.fraction:.3f}",
        f"{each.flops / 1e9:,.3g}",
        "" if decode is None else f"{batch_size / decode.median_s:.3g}",
        f"{each.kv_bytes / 1e6:,.3g}",
        _peak(each),
        *([nats(each.distortion), percent(each.agreement)] if has_data else []),
        ", ".join(each.kernels) or "matrix products",
    ]
