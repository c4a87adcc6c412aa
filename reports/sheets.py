"""Sheets of example pictures with words under them, as PNG files."""

import random
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from data.files import whole_file
from data.images import load_whole, open_member

LIGHT = (240, 240, 240)  # beside a picture that is no square
BLACK, GREY, GREEN, RED = (20, 20, 20), (120, 120, 120), (0, 130, 50), (200, 20, 30)
# pixels: a picture's side, the gap between cells, font size, line height
SIDE, GAP, FONT, LINE = 128, 14, 12, 15
MOST = 500  # characters of a line of text; more is cut off


@dataclass
class Cell:
    """A picture and lines of (text, colour) under it.

    The picture is (3, H, W) uint8, which is fitted into a square, a clip (F, 3, S, S) of which the
    middle frame is shown, or None: then the text stands in its place. `frame` is the colour of its
    frame or None.
    """

    image: Tensor | None
    lines: list[tuple[str, tuple]]
    frame: tuple | None = None

    def wrapped(self) -> list[tuple[str, tuple]]:
        """The lines, broken where they are wider than a picture."""
        columns = int(SIDE / FONT * 1.9)  # characters that fit under a picture
        return [(part, colour) for text, colour in self.lines
                for part in textwrap.wrap(text[:MOST], columns) or [""]]

    def height(self) -> int:
        """In pixels."""
        return SIDE * (self.image is not None) + LINE * len(self.wrapped())


Row = list[Cell]
Sections = list[tuple[str, list[Row]]]  # headings and the rows below them


def in_rows(cells: list[Cell], columns: int) -> list[Row]:
    """The cells, `columns` in a row."""
    return [cells[i:i + columns] for i in range(0, len(cells), columns)]


def pick_examples(values: list[float], count: int) -> dict[str, list[int]]:
    """Which items a sheet shows: at most `count` indices each under "best", "worst", "random".

    The random ones are the same every time.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    rng = random.Random("examples")
    return {"best": order[::-1][:count], "worst": order[:count],
            "random": rng.sample(range(len(values)), min(count, len(values)))}


def pictures_of(dataset, index: int) -> Tensor | list[Tensor]:
    """What a sheet shows of an item: files in their own proportions, else what the model sees."""
    return dataset.show(index, SIDE) if hasattr(dataset, "show") else dataset[index]["image"]


def draw_sheet(path: str | Path, sections: Sections) -> None:
    """Write a PNG: for each section a heading and rows of cells. Raises InputError."""
    font = ImageFont.load_default(FONT)
    rows = [row for _, section_rows in sections for row in section_rows]
    width = GAP + max(len(row) for row in rows) * (SIDE + GAP)
    height = 3 * LINE * len(sections) + sum(row_height(row) for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for heading, section_rows in sections:
        draw.text((GAP, y + LINE), heading, BLACK, ImageFont.load_default(FONT + 3))
        y += 3 * LINE
        for row in section_rows:
            for x, cell in zip(range(GAP, width, SIDE + GAP), row):
                draw_cell(sheet, draw, cell, x, y, font)
            y += row_height(row)
    with whole_file(path, "wb") as file:
        sheet.save(file, "PNG")


def row_height(row: Row) -> int:
    """In pixels, the gap below it included."""
    return 2 * GAP + max(cell.height() for cell in row)


def draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int,
              font) -> None:
    """The picture with its top left corner at x, y, and the text below."""
    top = y
    if cell.image is not None:
        shown = cell.image if cell.image.ndim == 3 else cell.image[len(cell.image) // 2]
        picture = Image.fromarray(np.ascontiguousarray(shown.permute(1, 2, 0).numpy()))
        sheet.paste(ImageOps.pad(picture, (SIDE, SIDE), color=LIGHT), (x, y))
        draw.rectangle((x - 2, y - 2, x + SIDE + 1, y + SIDE + 1),
                       outline=cell.frame or (200, 200, 200), width=3 if cell.frame else 1)
        top = y + SIDE + 4
    for i, (text, colour) in enumerate(cell.wrapped()):
        draw.text((x, top + i * LINE), text, colour, font)


def draw_judged_texts(path: str | Path, images: list[dict], root: Path) -> None:
    """The paper's Fig. 4: an image, its web text (W) and its synthetic text (S).

    Accepted in green, rejected in red. images: {image, texts: [{caption, source, kept, itm}]}.
    """
    cells = []
    for record in images:
        lines = []
        for text in record["texts"][:6]:
            scores = "".join(f" ({value:.2f})" for value in text.get("itm", []))
            lines.append((f"{text['source'][0].upper()}: {text['caption'][:120]}{scores}",
                          GREEN if text["kept"] else RED))
        try:
            picture = load_whole(open_member(root, record["image"]), SIDE)
        except OSError as error:  # moved since it was judged
            picture, lines = None, [(f"{record['image']}: {error}", GREY), *lines]
        cells.append(Cell(picture, lines))
    heading = ("W: web text, S: synthetic text; green: accepted, red: rejected by the filter (ITM "
               "probability)")
    draw_sheet(path, [(heading, in_rows(cells, 6) or [[Cell(None, [("none", BLACK)])]])])
