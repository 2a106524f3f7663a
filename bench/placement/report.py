"""Tables for people, and plots."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

from bench.placement.figures import Figures

HEAD = "| | requests | failed | hit rate | of the oracle's | TTFT p50 ms | p90 | TPOT p90 ms | worst 30 s | mean load |"


def table(rows: Mapping[str, Figures]) -> str:
    """One line for each configuration."""
    lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    lines += [_row(name, one) for name, one in rows.items()]
    lines += [f"{name} failed: {'; '.join(one.faults)}" for name, one in rows.items() if one.faults]
    return "\n".join(lines)


def _row(name: str, one: Figures) -> str:
    share = f"{one.hit_rate / one.oracle_hit_rate:.1%}" if one.oracle_hit_rate else "-"
    worst = f"{one.imbalance:.2f}x" if one.imbalance else "-"
    return (
        f"| {name} | {one.num_requests} | {one.num_failed} | {one.hit_rate:.3f} | {share} of {one.oracle_hit_rate:.3f} "
        f"| {one.ttft_p50:.0f} | {one.ttft_p90:.0f} | {one.tpot_p90:.1f} | {worst} | {one.mean_load:.1f} |"
    )


def plot_frontier(rows: Mapping[str, Figures], title: str, path: Path) -> None:
    """What first tokens cost in time per token, a point for each configuration, as a PNG."""
    mpl.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for number, (name, one) in enumerate(rows.items()):
        axis.scatter(one.ttft_p90, one.tpot_p90, label=name, color=f"C{number % 10}", marker="os^"[number // 10 % 3])
    axis.legend()
    axis.set_xlabel("TTFT p90, ms")
    axis.set_ylabel("TPOT p90, ms")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_title(title)
    drawn.savefig(path)
    pyplot.close(drawn)


def plot(rows: Mapping[str, Figures], title: str, path: Path) -> None:
    """Bars of hit rate, TTFT p90 and TPOT p90, as a PNG."""
    mpl.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    bars = {
        "hit rate (line: oracle)": [one.hit_rate for one in rows.values()],
        "TTFT p90, ms": [one.ttft_p90 for one in rows.values()],
        "TPOT p90, ms": [one.tpot_p90 for one in rows.values()],
    }
    for axis, (label, heights) in zip(axes, bars.items(), strict=True):
        axis.bar(list(rows), heights)
        axis.set_title(label)
        axis.tick_params(axis="x", rotation=30)
    axes[0].axhline(max(one.oracle_hit_rate for one in rows.values()), color="black", linewidth=1)
    drawn.suptitle(title)
    drawn.savefig(path)
    pyplot.close(drawn)
