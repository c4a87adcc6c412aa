"""What curves and matrices are drawn with: a page, panels with axes, heat maps, bars.

A Page is written from top to bottom and cut to its height when it is saved. Everything is Pillow:
no plotting package is needed.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reports.sheets import BLACK, FONT, GREY, LINE

PALE = (225, 225, 225)
BLUE = (31, 90, 180)
# One for each run; dark enough on white, and told apart by lightness as well as by hue.
COLOURS = (BLUE, (214, 70, 20), (20, 140, 70), (150, 60, 170), (120, 80, 40), (0, 160, 180),
           (220, 150, 0), (230, 90, 150), (90, 90, 90), (110, 150, 30))
MARGIN, TALLEST = 20, 20_000  # pixels

Points = list[tuple[float, float]]


class Page:
    """A white picture with a title and a legend, on which `y` is where to go on."""

    def __init__(self, width: int, title: str, legend: str = ""):
        """width in pixels; the legend is wrapped to it."""
        self.image = Image.new("RGB", (width, TALLEST), "white")
        self.draw, self.width, self.y = ImageDraw.Draw(self.image), width, MARGIN
        self.write(MARGIN, self.y, title, BLACK, FONT + 6)
        self.y += 2 * LINE
        self.paragraph(legend)

    def write(self, x: float, y: float, text: str, colour: tuple = BLACK, size: int = FONT,
              anchor: str = "la") -> None:
        """One line; anchor as in Pillow: "la" has its left top corner at x, y."""
        self.draw.text((x, y), text, colour, ImageFont.load_default(size), anchor=anchor)

    def paragraph(self, text: str, x: int = MARGIN, width: int = 0, colour: tuple = BLACK) -> None:
        """Text that is wrapped to `width` pixels (0: to the page), and `y` moves below it."""
        for line in wrap(text, width or self.width - x - MARGIN):
            self.write(x, self.y, line, colour)
            self.y += LINE
        self.y += LINE // 2

    def name_colours(self, names: Iterable[str]) -> None:
        """Which colour is what: a line for each name; after ten the colours repeat."""
        for number, name in enumerate(names):
            colour = COLOURS[number % len(COLOURS)]
            self.draw.line((MARGIN, self.y + 8, MARGIN + 30, self.y + 8), colour, 4)
            self.write(MARGIN + 38, self.y, name)
            self.y += LINE + 2
        self.y += LINE

    def paste(self, picture: np.ndarray, x: int, y: int, side: int) -> None:
        """A picture (3, S, S) uint8, `side` pixels wide and high."""
        shown = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
        self.image.paste(shown.resize((side, side)), (x, y))
        self.draw.rectangle((x - 1, y - 1, x + side, y + side), outline=GREY)

    def save(self, path: str | Path) -> None:
        """Write a PNG, cut below `y`."""
        self.image.crop((0, 0, self.width, min(self.y + MARGIN, TALLEST))).save(path)


def wrap(text: str, width: int, size: int = FONT) -> list[str]:
    """The lines of a text that is `width` pixels wide at most; a longer word stands alone."""
    font, lines = ImageFont.load_default(size), []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def fit(text: str, width: int, size: int = FONT) -> str:
    """The text, cut with dots where it is wider than `width` pixels."""
    font = ImageFont.load_default(size)
    text = text[:width]  # no letter is narrower than a pixel: a long text is not measured
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


# ---- curves --------------------------------------------------------------------------------------

def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, about `most`: 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10):
        if (high - low) / (factor * step) <= most:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """0.002, 1,500 or 5e-05."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{round(value, 6):g}"


def draw_panel(page: Page, x: int, y: int, width: int, height: int, title: str,
               curves: list[tuple[tuple, Points]], level: float | None = None,
               across: tuple[float, float] | None = None) -> None:
    """Axes with numbers and one line for each (colour, points); `level` is a dashed line.

    The panel's left top corner is x, y. across: the range of the horizontal axis, else that of the
    points. Points that are no finite number are left out.
    """
    curves = [(colour, [p for p in points if math.isfinite(p[1])]) for colour, points in curves]
    curves = [(colour, points) for colour, points in curves if points]
    page.write(x + 52, y, fit(title, width - 56, FONT + 1), BLACK, FONT + 1)
    left, top, right, bottom = x + 52, y + LINE + 8, x + width - 8, y + height - LINE - 6
    page.draw.rectangle((left, top, right, bottom), outline=GREY)
    if not curves:
        page.write(left + 8, top + 8, "no value", GREY)
        return
    across = across or [p[0] for _, points in curves for p in points]
    up = [p[1] for _, points in curves for p in points] + ([] if level is None else [level])
    (x_low, x_high), (y_low, y_high) = with_room(across, 0.0), with_room(up, 0.05)

    def place(point):
        return (left + (point[0] - x_low) / (x_high - x_low) * (right - left),
                bottom - (point[1] - y_low) / (y_high - y_low) * (bottom - top))
    for value in ticks(y_low, y_high):
        at = place((x_low, value))[1]
        page.draw.line((left, at, right, at), PALE)
        page.write(left - 5, at, tick_text(value), GREY, FONT - 1, "rm")
    for value in ticks(x_low, x_high):
        at = place((value, y_low))[0]
        page.draw.line((at, bottom, at, bottom + 4), GREY)
        page.write(at, bottom + 5, tick_text(value), GREY, FONT - 1, "ma")
    if level is not None:
        at = place((x_low, level))[1]
        for start in range(left, right, 8):
            page.draw.line((start, at, min(start + 4, right), at), GREY)
        near_top = at - top < LINE  # then the word stands below the line
        page.write(right - 4, at + (2 if near_top else -2), "chance", GREY, FONT - 1,
                   "ra" if near_top else "rd")
    for colour, points in curves:
        if len(points) == 1:
            px, py = place(points[0])
            page.draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)
        page.draw.line([place(p) for p in points], colour, 2)
    page.draw.rectangle((left, top, right, bottom), outline=GREY)


def with_room(values: list[float], room: float) -> tuple[float, float]:
    """The least and the largest value, with a share of the range below and above."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    return low - room * (high - low), high + room * (high - low)


# ---- matrices ------------------------------------------------------------------------------------

def shade(share: float) -> tuple:
    """White for 0 to dark blue for 1."""
    share = min(max(share, 0.0), 1.0)
    return tuple(round(255 + share * (dark - 255)) for dark in (8, 48, 107))


def draw_heat(page: Page, x: int, y: int, cell: int, shares: np.ndarray,
              marked: np.ndarray | None = None, colour: tuple = COLOURS[1],
              gap_after: int = 0) -> tuple[int, int]:
    """A matrix of numbers in [0, 1] as coloured cells -> its right and bottom edge.

    marked: a matrix of truth values, of cells that get a frame; gap_after: a line stands behind so
    many columns.
    """
    rows, columns = shares.shape
    for i in range(rows):
        for j in range(columns):
            box = (x + j * cell, y + i * cell, x + (j + 1) * cell - 1, y + (i + 1) * cell - 1)
            outline = colour if marked is not None and marked[i, j] else None
            page.draw.rectangle(box, shade(shares[i, j]), outline, 2)
    right, bottom = x + columns * cell, y + rows * cell
    page.draw.rectangle((x - 1, y - 1, right, bottom), outline=GREY)
    if gap_after:
        page.draw.line((x + gap_after * cell, y - 6, x + gap_after * cell, bottom + 6), BLACK, 2)
    return right, bottom


def draw_scale(page: Page, x: int, y: int, width: int, labels: list[tuple[float, str]]) -> None:
    """What the colours of a heat map mean: a strip with (share, what it stands for) below."""
    for pixel in range(width):
        page.draw.line((x + pixel, y, x + pixel, y + 10), shade(pixel / width))
    page.draw.rectangle((x - 1, y - 1, x + width, y + 11), outline=GREY)
    for share, text in labels:
        page.write(x + share * width, y + 14, text, GREY, FONT - 1, "ma")
