"""Draws the dashboard's panels from a recorded run, for people who look before they read.

``python -m k8s.monitoring.picture RECORDED.json docs/img/dashboard.png``; needs matplotlib, which nothing else does.
The recording is what tests/integration/k8s/test_watching.py keeps: the answer of a real Prometheus to every expression.
"""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from k8s.monitoring.panels import ROWS, Panel
from k8s.monitoring.promql import PHASES

_COLOURS: Final = ("#5794f2", "#fade2a", "#ff9830", "#73bf69", "#b877d9", "#f2495c", "#8ab8ff", "#c8f2c2")
_INK: Final = "#d8d9da"
_SCALE: Final[Mapping[str, tuple[float, str]]] = {"bytes": (1 / 2**20, "MiB"), "percentunit": (100, "%"), "s": (1, "s")}
_COLUMNS: Final = 24
_STEP: Final = 1.5  # seconds; the recording has a sample a second
_LEGENDS: Final = 8  # more would hide the lines

Series = Sequence[Mapping[str, Any]]


def draw(answers: Mapping[str, Series], target: Path) -> None:
    """Write the picture; every panel of the dashboard in its place."""
    lines: list[str | list[Panel]] = []
    for row in ROWS:
        lines += [row.title, *_lines(row.panels)]
    heights = [0.22 if isinstance(line, str) else 1.0 for line in lines]
    end = max(s["values"][-1][0] for found in answers.values() for s in found)
    figure = plt.figure(figsize=(17, 2.0 * sum(heights)), facecolor="#111217")
    grid = figure.add_gridspec(len(lines), _COLUMNS, height_ratios=heights, hspace=0.75, wspace=1.6)
    for number, line in enumerate(lines):
        if isinstance(line, str):
            axes = figure.add_subplot(grid[number, :])
            axes.axis("off")
            axes.text(0, 0, line, color="white", fontsize=13, fontweight="bold")
            continue
        column = 0
        for panel in line:
            axes = figure.add_subplot(grid[number, column : column + panel.width])
            _panel(axes, panel, answers, end)
            column += panel.width
    figure.savefig(target, dpi=80, bbox_inches="tight", facecolor=figure.get_facecolor())


def _lines(panels: Sequence[Panel]) -> list[list[Panel]]:
    lines: list[list[Panel]] = [[]]
    for panel in panels:
        if sum(p.width for p in lines[-1]) + panel.width > _COLUMNS:
            lines.append([])
        lines[-1].append(panel)
    return lines


def _panel(axes: Any, panel: Panel, answers: Mapping[str, Series], end: float) -> None:
    axes.set_title(panel.title, color=_INK, fontsize=8.5, loc="left")
    axes.set_facecolor("#181b1f")
    axes.tick_params(colors=_INK, labelsize=6)
    for edge in axes.spines.values():
        edge.set_color("#2c3235")
    factor, unit = _SCALE.get(panel.unit, (1.0, ""))
    series = [
        (_legend(query.legend, s["metric"]), *_points(s["values"], factor))
        for query in panel.queries
        for s in answers[query.expr]
    ]
    series = [s for s in series if s[1]]
    if not series:
        axes.text(0.5, 0.5, "no data in this run", color="#6e7681", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
    elif panel.kind == "stat":
        _numbers(axes, series)
    elif panel.kind == "phases":
        _bars(axes, series, end)
    else:
        for number, (legend, xs, ys) in enumerate(series):
            axes.plot(xs, ys, color=_COLOURS[number % len(_COLOURS)], linewidth=1, label=legend)
        handles = axes.get_lines()[:_LEGENDS]
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, end)
        axes.grid(color="#2c3235", linewidth=0.4)
        if unit:
            axes.set_ylabel(unit, color=_INK, fontsize=6)
        legend = axes.legend(
            handles=handles, fontsize=5, loc="upper left", ncols=2, framealpha=0.3, facecolor="#111217"
        )
        for text in legend.get_texts():
            text.set_color(_INK)


def _points(values: Sequence[tuple[float, str]], factor: float) -> tuple[list[float], list[float]]:
    """Times and values; a gap in the samples becomes a break in the line."""
    finite = [(t, float(v) * factor) for t, v in values if math.isfinite(float(v))]
    xs, ys = [], []
    for n, (t, v) in enumerate(finite):
        if n and t - finite[n - 1][0] > _STEP:
            xs.append(t)
            ys.append(math.nan)
        xs.append(t)
        ys.append(v)
    return xs, ys


def _legend(pattern: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), pattern)


def _numbers(axes: Any, series: Sequence[tuple[str, list[float], list[float]]]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for number, (legend, _, ys) in enumerate(series):
        x = (number + 0.5) / len(series)
        axes.text(x, 0.55, f"{ys[-1]:g}", color="#73bf69", fontsize=20, ha="center", transform=axes.transAxes)
        axes.text(x, 0.2, legend, color=_INK, fontsize=5.5, ha="center", transform=axes.transAxes)


def _bars(axes: Any, series: Sequence[tuple[str, list[float], list[float]]], end: float) -> None:
    names = sorted({legend for legend, _, _ in series})
    for legend, xs, ys in series:
        for x, y in zip(xs, ys, strict=True):
            if math.isnan(y):
                continue
            axes.broken_barh([(x, 1.05)], (names.index(legend) - 0.4, 0.8), facecolors=_COLOURS[int(y)])
    axes.set_yticks(range(len(names)), names)
    for number, phase in enumerate(PHASES):
        axes.text(0.25 * number, -0.28, f"■ {phase}", color=_COLOURS[number], fontsize=6.5, transform=axes.transAxes)
    axes.set_xlim(0, end)
    axes.set_xticks([])


def main() -> None:
    """Draw the file named first into the file named second."""
    parser = argparse.ArgumentParser(prog="python -m k8s.monitoring.picture", description=__doc__)
    parser.add_argument("recorded", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    answers = json.loads(args.recorded.read_text())
    begin = min(values[0][0] for found in answers.values() for values in [s["values"] for s in found])
    for found in answers.values():
        for series in found:
            series["values"] = [(t - begin, v) for t, v in series["values"]]
    args.target.parent.mkdir(parents=True, exist_ok=True)
    draw(answers, args.target)


if __name__ == "__main__":
    main()
