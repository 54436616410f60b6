"""The Markdown report of a GPU check; only Python's own library is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Goals with three Base teachers, in seconds of audio per second.
GOALS = {"bf16": 5_000, "bf16 cached": 9_000}
Record = Mapping[str, Any]


def markdown(check: Record) -> str:
    """Format the contents of ``gpu_check.json``."""
    parts = check["parts"]
    lines = [*machine(check), "", *table(["part", "result", "seconds"], status_rows(parts))]
    for name, part in parts.items():
        if part.get("error"):
            lines += ["", f"End of the output of {name}:", "", "```text", part["error"], "```"]
    for size in ("base", "tiny"):
        if result := parts.get(size, {}).get("result"):
            lines += ["", f"## Step rates, {size}", "", *rates(result, goals=size == "base")]
    if result := parts.get("tests", {}).get("result"):
        lines += ["", "## Tests", "", f"{result['passed']} passed"]
        lines += [f"- {kind}: {name}" for kind in ("failed", "skipped") for name in result[kind]]
    if result := parts.get("training", {}).get("result"):
        lines += ["", "## bfloat16 against float32", "", *training(result)]
    if result := parts.get("torchrun", {}).get("result"):
        losses = ", ".join(f"{loss:.5f}" for loss in result["losses"])
        lines += ["", "## torchrun", "", f"{result['processes']} process(es); losses: {losses}"]
    return "\n".join(lines) + "\n"


def machine(check: Record) -> Iterator[str]:
    about = check["parts"].get("environment", {}).get("result", {})
    yield f"# GPU check: {about.get('device', 'unknown device')}"
    yield ""
    shown = ("driver", "capability", "python", "torch", "torchaudio", "transformers", "s3prl")
    known = [f"{name} {about[name]}" for name in shown if about.get(name)]
    auto = [f"`precision: auto` is {about['auto']}"] if about.get("auto") else []
    toy = ["toy sizes: the numbers mean nothing"] if check["toy"] else []
    yield "; ".join([", ".join(known), *auto, *toy, f"{check['seconds']:.0f} s in all"])


def status_rows(parts: Mapping[str, Record]) -> Iterator[list[str]]:
    for name, part in parts.items():
        yield [name, part["status"], f"{part['seconds']:.0f}"]


def rates(result: Record, goals: bool) -> Iterator[str]:
    """Table of the variants, their kernels and waits, goals, and rates of the disk."""
    variants, matmul = result["variants"], result["matmul_rates"]
    measured = {name: row for name, row in variants.items() if "rate" in row}
    reference = measured.get("s3prl", {}).get("rate")
    rows = []
    for name, row in variants.items():
        if name not in measured:
            error = " ".join(row["error"].replace("|", "/").split())
            rows.append([name, str(row.get("batch", "")), error, *[""] * 4])
            continue
        low, median, high = row["rate"]
        share = median * row["flops"] / matmul[row["numbers"]]
        waits = "" if row["waits"] is None else f"{row['waits']:g}"
        ratio = f"{median / reference[1]:.2f}" if reference else ""
        rate = f"{median:,.0f} ({low:,.0f} to {high:,.0f})"
        peak = f"{row['peak'] / 2**30:.2f}"
        rows.append([name, str(row["batch"]), rate, ratio, f"{100 * share:.0f} %", peak, waits])
    head = ["", "batch", "seconds of audio per second", "times s3prl", "FLOP utilisation"]
    yield from table([*head, "peak memory, GiB", "waits a step"], rows)
    yield ""
    speeds = [f"{name} {rate / 1e12:,.3g}" for name, rate in matmul.items()]
    yield (
        f"Utterances of {0.9 * result['seconds']:g} to {result['seconds']:g} s, read in advance; "
        "medians with quartiles. Utilisation is relative to a large matrix product in the same "
        f"number format, here {', '.join(speeds)} TFLOP/s."
    )
    yield ""
    if goals:
        yield from goal_lines(measured)
    for dtype, size in result["cache_bytes"].items():
        rates = [r["rate"][1] for n, r in measured.items() if f"cached {dtype}" in n]
        if not rates:
            continue
        best = max(rates)
        yield (
            f"- A cache in {dtype} has {size / 1e6:.3f} MB per second of audio: the disk must give "
            f"{best * size / 1e9:.2f} GB/s at {best:,.0f} seconds of audio per second."
        )
    yield from ("", "Largest kernels, share of all kernels' time; lines that wait for the GPU:", "")
    for name, row in measured.items():
        kernels = ", ".join(f"`{k['name'][:60]}` {100 * k['share']:.0f} %" for k in row["kernels"])
        waits = f"; waits: {', '.join(row['waits_at'])}" if row["waits_at"] else ""
        yield f"- {name}: {kernels or 'not measured'}{waits}"


def goal_lines(measured: Mapping[str, Record]) -> Iterator[str]:
    for goal, rate in GOALS.items():
        names = [
            name
            for name in measured
            if name.startswith(goal)
            and ("cached" in name) == ("cached" in goal)
            and "frozen" not in name
        ]
        if not names:
            yield f"- Goal for {goal}: {rate:,} seconds of audio per second; not measured."
            continue
        best = max(names, key=lambda name: measured[name]["rate"][1])
        median = measured[best]["rate"][1]
        verdict = "reached" if median >= rate else "missed"
        yield f"- Goal for {goal}: {rate:,}; {verdict} with {median:,.0f} ({best})."


def training(result: Record) -> Iterator[str]:
    """Losses of both runs, at up to six steps."""
    losses, interval = result["losses"], result["interval"]
    points = len(losses["float32"])
    steps = sorted({round(i * (points - 1) / 5) for i in range(6)})
    rows = [
        [name, *(f"{values[i]:.5f}" for i in steps if i < len(values))]
        for name, values in losses.items()
    ]
    yield from table(["loss at step", *(str((i + 1) * interval) for i in steps)], rows)
    if "mean_difference" in result:
        mean, largest = (100 * result[f"{name}_difference"] for name in ("mean", "largest"))
        yield ""
        yield f"Difference over {points} points: {mean:.3f} % on average, at most {largest:.3f} %."


def table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
