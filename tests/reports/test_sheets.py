"""Sheets of pictures: their proportions, what stands beside them."""

import numpy as np
import pytest
from PIL import Image

from data.datasets import ImageDataset, NLVR2Example, Pair
from reports.sheets import GAP, LIGHT, LINE, SIDE, Cell, draw_sheet, pictures_of
from world.datasets import World


@pytest.mark.parametrize("size", [(80, 200), (200, 80), (90, 90), (1000, 2)])
def test_a_picture_keeps_its_proportions(tmp_path, size):
    Image.new("RGB", size, (250, 0, 0)).save(tmp_path / "a.png")
    data = ImageDataset([Pair("a.png", ("x",), 0)], tmp_path, 16)
    draw_sheet(tmp_path / "s.png", [("a sheet", [[Cell(pictures_of(data, 0), [])]])])
    sheet = np.asarray(Image.open(tmp_path / "s.png"))[3 * LINE:3 * LINE + SIDE, GAP:GAP + SIDE]
    red = (sheet == (250, 0, 0)).all(-1)
    assert red[SIDE // 2, SIDE // 2] and (red | (sheet == LIGHT).all(-1))[2:-2, 2:-2].all()
    longer = max(size)
    assert red.any(0).sum() == pytest.approx(SIDE * size[0] / longer, abs=2)
    assert red.any(1).sum() == pytest.approx(SIDE * size[1] / longer, abs=2)


def test_what_is_shown_of_an_item(tmp_path):
    """Of a statement both pictures; of the world what the model sees."""
    for name, size in (("a.png", (80, 200)), ("b.png", (30, 10))):
        Image.new("RGB", size).save(tmp_path / name)
    data = ImageDataset([NLVR2Example(("a.png", "b.png"), "x", True, "1")], tmp_path, 16)
    first, second = pictures_of(data, 0)
    assert first.shape == (3, SIDE, round(SIDE * 0.4)) and second.shape[2] == SIDE
    assert pictures_of(World("val", 2, 32), 1).shape == (3, 32, 32)
