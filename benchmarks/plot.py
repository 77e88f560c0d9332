"""Lines in a picture: SVG made of text, with both axes logarithmic, because what is compared differs by factors.

The picture brings its own white ground and its own ink: a page that shows it may be dark.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 900, 440  # of the picture, in its own units
LEFT, TOP, RIGHT, BOTTOM = 76, 56, 270, 56  # around the field with the lines; on the right are their names
NAME = 17  # height of a name
INK, GRID = "#222222", "#dddddd"
# Okabe and Ito's colours, which the colour-blind can tell apart; without the yellow, which is lost on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

Point = tuple[float, float, float, float]  # x; lowest, median and highest y


class Axis(NamedTuple):
    """A logarithmic scale from the value `low` at `start` to `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> Iterator[float]:
        """1, 2, 5, 10, 20 … as far as the scale goes."""
        for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for digit in (1, 2, 5):
                if self.low * 0.999 <= digit * 10.0**exponent <= self.high * 1.001:
                    yield digit * 10.0**exponent


def around(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: as far as the values go, and a little more."""
    return min(values) / 1.25, max(values) * 1.25


def to_ticks(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis that begins and ends with a number: else one might have none, where values are close."""
    ticks = [*Axis(min(values) / 10, max(values) * 10, 0, 1).ticks()]
    low = max(tick for tick in ticks if tick <= min(values))
    return low, min(tick for tick in ticks if tick >= max(values) and tick > low)


def plot(title: str, x_name: str, lines: Mapping[str, Sequence[Point]], write: Callable[[float], str]) -> str:
    """Return the picture; `lines` are in the order of their colours, and `write` says a y in words."""
    points = [point for line in lines.values() for point in line]
    x = Axis(*around([point[0] for point in points]), LEFT, WIDTH - RIGHT)
    y = Axis(*to_ticks([value for point in points for value in point[1:]]), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, TOP - 26, title, "start", 16),
        text((x.start + x.end) / 2, HEIGHT - 14, x_name, "middle"),
    ]
    parts += [mark for value in sorted({point[0] for point in points}) for mark in x_tick(x, y, value)]
    parts += [mark for value in y.ticks() for mark in y_tick(x, y, value, write(value))]
    for number, line in enumerate(lines.values()):
        parts += drawn(x, y, line, COLOURS[number % len(COLOURS)])
    parts += names(x, y, lines)
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str, size: int = 13, colour: str = INK) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"


def stroke(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def x_tick(x: Axis, y: Axis, value: float) -> list[str]:
    return [stroke(x(value), y.start, x(value), y.end, GRID), text(x(value), y.start + 18, f"{value:,.0f}", "middle")]


def y_tick(x: Axis, y: Axis, value: float, words: str) -> list[str]:
    return [stroke(x.start, y(value), x.end, y(value), GRID), text(x.start - 8, y(value) + 4, words, "end")]


def drawn(x: Axis, y: Axis, line: Sequence[Point], colour: str) -> list[str]:
    """The medians joined, and at each the spread as a bar."""
    way = " ".join(f"{x(at)},{y(median)}" for at, _, median, _ in line)
    bars = [stroke(x(at), y(low), x(at), y(high), colour) for at, low, _, high in line if low < high]
    dots = [f'<circle cx="{x(at)}" cy="{y(median)}" r="3.5" fill="{colour}"/>' for at, _, median, _ in line]
    return [f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>', *bars, *dots]


def names(x: Axis, y: Axis, lines: Mapping[str, Sequence[Point]]) -> list[str]:
    """Each name beside the end of its line, moved down where it would lie on another."""
    ends = sorted((y(line[-1][2]), number, name) for number, (name, line) in enumerate(lines.items()))
    parts, free = [], 0.0
    for end, number, name in ends:
        at = max(end, free)
        free = at + NAME
        parts.append(text(x.end + 8, at + 4, name, "start", colour=COLOURS[number % len(COLOURS)]))
    return parts
