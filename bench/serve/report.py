"""What a benchmark prints: how it was run, on what, and its figures, for people and for machines."""

import json
from dataclasses import asdict
from typing import Any

from bench import provenance
from bench.serve.workload import Workload

ROWS = {"ttft_ms": "first token", "tpot_ms": "per token", "itl_ms": "between chunks", "e2e_ms": "whole request"}


def circumstances(command: str, url: str, model: str, workload: Workload) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "command": command,
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "url": url,
        "model": model,
        "workload": asdict(workload),
    }


def text(told: dict[str, Any], figures: dict[str, Any]) -> str:
    """Circumstances, table, and everything again as one line of JSON."""
    lines = [f"{key}: {told[key]}" for key in ("command", "commit", "hardware", "model")]
    lines += ["", "| ms | mean | p50 | p90 | p99 |", "|---|---|---|---|---|"]
    for key, name in ROWS.items():
        if (values := figures[key]) is not None:
            lines.append("| {} | {mean:.1f} | {p50:.1f} | {p90:.1f} | {p99:.1f} |".format(name, **values))
    lines += ["", f"{figures['num_requests'] - figures['num_failed']} of {figures['num_requests']} requests answered"]
    lines[-1] += f" in {figures['wall_s']:.1f} s: {figures['output_tokens_per_s']:.1f} output tokens/s, "
    lines[-1] += f"{figures['requests_per_s']:.2f} requests/s"
    lines += [f"failed, {count} times: {fault}" for fault, count in figures["faults"].items()]
    return "\n".join([*lines, json.dumps(told | figures)])
