"""Shards: their bounds, their seeds, and how much memory a web set of any size takes."""

import json
import ntpath
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import shards
from data.datasets import Pair
from data.files import InputError
from data.sources import PairIndex


def test_an_images_rows_are_never_parted():
    rows = [Pair(image, ("t",), 0) for image in "aabbbbccdd"]
    assert shards.shard_bounds(rows, 3) == [(0, 6), (6, 10)]
    assert shards.shard_bounds(rows, 4) == [(0, 6), (6, 8), (8, 10)]
    assert shards.shard_bounds(rows, 100) == [(0, 10)]


def test_every_batch_draws_other_numbers_and_the_same_ones_again(tmp_path):
    """The seed of a batch is a function of the seed, the shard and the batch."""
    web = web_set(tmp_path / "web", 50)
    def seeds(folder, seed):
        found = []
        for shard in shards.pending(web, folder, {}, 10, seed):
            for pairs, images, batch_seed in shard.batches({16}, 4, 0):
                assert images[16].shape == (len(pairs), 3, 16, 16)
                found.append(batch_seed)
            shards.write(shard, [{"image": pair.image, "texts": []} for pair in shard.pairs])
        return found
    first = seeds(tmp_path / "a", 0)
    assert len(first) == len(set(first)) > 10 and first == seeds(tmp_path / "b", 0)
    assert not set(first) & set(seeds(tmp_path / "c", 1))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_web(tmp_path, monkeypatch):
    """Ten times as many images: the same peak."""
    def peak(count):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "web.json").write_text(json.dumps(
            [{"image": f"web/000000.png?{i}", "caption": f"text {i}"} for i in range(count)]))
        web = PairIndex.open(str(folder / "web.json"), tmp_path, folder)
        def judge(shard):
            return [{"image": pair.image,
                     "texts": [{"caption": pair.captions[0], "source": "web", "kept": True}]}
                    for pairs, _, _ in shard.batches({16}, 32, 0) for pair in pairs]
        tracemalloc.start()
        for shard in shards.pending(web, folder, {}, 500, 0):
            shards.write(shard, judge(shard))
        report = shards.merge(web, None, folder, 500)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report["web_kept"] == count
        return found
    monkeypatch.setattr(shards, "load_image", lambda source, size: torch.zeros(
        3, size, size, dtype=torch.uint8))
    few, many = peak(2000), peak(20000)
    assert many < 1.1 * few


def test_a_shard_of_few_broken_images_is_no_reason_to_stop(tmp_path):
    """Whichever shard is done first. But a set of which no image could be read is none."""
    web = web_set(tmp_path / "web", 6)
    def work(folder: Path) -> dict:
        for shard in shards.pending(web, folder, {}, 2, 0):
            read = [pair for pairs, _, _ in shard.batches({8}, 4, 0) for pair in pairs]
            shards.write(shard, [{"image": pair.image, "texts": []} for pair in read])
        return shards.merge(web, None, folder, 2)
    for name in ("0.png", "1.png"):  # the first shard
        (tmp_path / "web" / name).unlink()
    assert work(tmp_path / "a")["images"] == 4
    for picture in (tmp_path / "web").glob("*.png"):
        picture.unlink()
    with pytest.raises(InputError, match="none of the images of the web texts can be read"):
        work(tmp_path / "b")
    assert not list((tmp_path / "b/shards").glob("*.json"))  # the next try begins anew


def test_images_on_two_drives_are_one_sentence(monkeypatch):
    """On Windows."""
    monkeypatch.setattr(shards.os.path, "commonpath", ntpath.commonpath)
    web, human = SimpleNamespace(root=r"D:\web"), SimpleNamespace(root=r"C:\human")
    with pytest.raises(InputError, match="are on two drives; put the images on one"):
        shards.common_root(web, human)
    assert shards.common_root(web, None) == r"D:\web"


def web_set(folder: Path, count: int) -> PairIndex:
    """Pictures with a text each."""
    folder.mkdir()
    records = []
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
        records.append({"image": f"{i}.png", "caption": f"text {i}"})
    (folder / "web.json").write_text(json.dumps(records))
    return PairIndex.open(str(folder / "web.json"), None, folder / "index")
