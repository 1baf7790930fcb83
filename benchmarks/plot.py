"""Line charts as SVG, written by hand: no plotting library for two pictures. Colours read on white and on black."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 44, 52
COLOURS = ("#2a7de1", "#e1572a", "#2aa15a", "#9b51e0", "#b58900", "#d33682")
INK = "#7a7a7a"
TICKS = 6


@dataclass(frozen=True)
class Line:
    """One series; ``dashed`` for what is not ours."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """Label and scale of one axis."""

    label: str
    log: bool = False


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers that cover the range."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = [1, 2, 5] if high / low < 1e4 else [1]
        return [m * 10.0**e for e in exponents for m in steps if low <= m * 10.0**e <= high]
    raw = (high - low) / TICKS or 1.0
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def label(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1_000 else f"{value:g}"


def chart(title: str, x: Axis, y: Axis, lines: Sequence[Line], marks: Sequence[tuple[float, str]] = ()) -> str:
    """The picture as text; ``marks`` are vertical lines with a word beside them."""
    xs = [px for line in lines for px, _ in line.points]
    ys = [py for line in lines for _, py in line.points if py > 0 or not y.log]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = (min(ys) * 0.8, max(ys) * 1.25) if y.log else (0.0, max(ys) * 1.08 or 1.0)

    def place(value: float, low: float, high: float, *, log: bool) -> float:
        if log:
            return (math.log(max(value, low)) - math.log(low)) / (math.log(high) - math.log(low) or 1)
        return (value - low) / (high - low or 1)

    def at_x(value: float) -> float:
        return LEFT + place(value, x_low, x_high, log=x.log) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - place(value, y_low, y_high, log=y.log) * (HEIGHT - TOP - BOTTOM)

    font = f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {font}>',
        f"<title>{escape(title)}</title>",
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for value in ticks(x_low, x_high, log=x.log):
        out.append(f'<text x="{at_x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label(value)}</text>')
    for value in ticks(y_low, y_high, log=y.log):
        height = at_y(value)
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="{INK}" '
            f'stroke-opacity="0.25"/><text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{label(value)}</text>'
        )
    out.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x.label)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">{escape(y.label)}</text>'
    )
    for n, (when, text) in enumerate(marks):
        across, height = at_x(when), TOP + 14 + 14 * (n % 3)
        out.append(
            f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{INK}" '
            f'stroke-dasharray="2 3"/><text x="{across + 4:.1f}" y="{height}">{escape(text)}</text>'
        )
    for n, line in enumerate(lines):
        colour = COLOURS[n % len(COLOURS)]
        path = " ".join(f"{at_x(px):.1f},{at_y(py):.1f}" for px, py in line.points)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        across = LEFT + n * (WIDTH - LEFT - RIGHT) / max(len(lines), 3)
        out.append(f'<text x="{across:.0f}" y="38" fill="{colour}">— {escape(line.label)}</text>')
    return "\n".join([*out, "</svg>", ""])
