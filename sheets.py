"""Sheets of example pictures with words under them, as PNG files: what a person looks at beside
the numbers."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BLACK, GREY, GREEN, RED = (20, 20, 20), (120, 120, 120), (0, 130, 50), (200, 20, 30)
# pixels: a picture's side, the gap between cells, font size, line height
SIDE, GAP, FONT, LINE = 128, 14, 12, 15


@dataclass
class Cell:
    """A picture (3, S, S) uint8, a clip (F, 3, S, S) whose middle frame is shown, or None; lines
    of (text, colour) under it or in its place; a frame's colour or None."""

    image: Tensor | None
    lines: list[tuple[str, tuple]]
    frame: tuple | None = None


def draw_sheet(path: str | Path, sections: list[tuple[str, list[list[Cell]]]]) -> None:
    """Write a PNG: for each section a heading and rows of cells."""
    font = ImageFont.load_default(FONT)
    columns = int(SIDE / FONT * 1.9)  # characters that fit under a picture
    def wrap(cell):
        return [(part, colour) for text, colour in cell.lines
                for part in textwrap.wrap(text, columns) or [""]]
    def row_height(row):
        return 2 * GAP + max(SIDE * (cell.image is not None) + LINE * len(wrap(cell))
                             for cell in row)
    width = GAP + max(len(row) for _, rows in sections for row in rows) * (SIDE + GAP)
    height = sum(3 * LINE + sum(map(row_height, rows)) for _, rows in sections)
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for heading, rows in sections:
        draw.text((GAP, y + LINE), heading, BLACK, ImageFont.load_default(FONT + 3))
        y += 3 * LINE
        for row in rows:
            for x, cell in zip(range(GAP, width, SIDE + GAP), row):
                if cell.image is not None:
                    shown = cell.image if cell.image.ndim == 3 else cell.image[len(cell.image) // 2]
                    picture = Image.fromarray(np.ascontiguousarray(shown.permute(1, 2, 0).numpy()))
                    sheet.paste(picture.resize((SIDE, SIDE)), (x, y))
                    draw.rectangle((x - 2, y - 2, x + SIDE + 1, y + SIDE + 1),
                                   outline=cell.frame or (200, 200, 200),
                                   width=3 if cell.frame else 1)
                top = y + SIDE + 4 if cell.image is not None else y
                for i, (text, colour) in enumerate(wrap(cell)):
                    draw.text((x, top + i * LINE), text, colour, font)
            y += row_height(row)
    sheet.save(path)
