"""Pairs by the million: tar shards, the index, mixtures."""

import gzip
import io
import json
import os
import pickle
import random
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageColor
from test_files import write_json

from data.datasets import ImageDataset, Pair, caption_collate, name_hash, some_examples
from data.files import InputError
from data.sources import Mixture, PairIndex, open_mixture, tar_records, with_shares
from data.text import Tokenizer
from tasks.task import Source


def shard(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def png(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_tar_shards(tmp_path, capsys):
    web = tmp_path / "web"
    web.mkdir()
    shard(web / "00000.tar", {
        "000.png": png("red"), "000.txt": b"A red thing", "000.json": b"{}",
        "001.png": png("blue"), "001.json": json.dumps({"caption": "a blue thing"}).encode(),
        "002.png": png("green"), "003.txt": b"no image", "004.png": png("red"), "004.txt": b" . ",
        "../005.png": png("red"), "../005.txt": b"outside", "/006.png": png("red")},
        {"007.png": "/etc/passwd"})
    shard(web / "00001.tar", {"000.jpg": b"broken", "000.txt": b"a broken thing",
                              "001.png": png("white"), "001.txt": b"a white thing"})
    whole = (web / "00001.tar").read_bytes()
    (web / "00002.tar").write_bytes(whole[:700])
    (web / "00003.tar").write_bytes(b"not a tar file" * 100)
    pairs = open_mixture(str(web), "", tmp_path / "index")
    assert [p.captions[0] for p in pairs] == ["A red thing", "a blue thing", "a broken thing",
                                              "a white thing"]
    assert pairs[0].image_id != pairs[2].image_id  # equal keys of two shards
    error = capsys.readouterr().err
    for reason in ("unsafe or no file", "no caption", "00003.tar is broken"):
        assert reason in error
    data = ImageDataset(pairs, "", 16, augment=True, replace_broken=True)
    item = data[1]
    assert item["example"].captions == ("a blue thing",) and item["image"][2].float().mean() > 150
    assert "(damaged or no image)" in data[2]["broken"][0]
    assert data[2]["example"].captions == ("a white thing",)
    again = open_mixture(str(web / "*.tar"), "", tmp_path / "index")
    assert capsys.readouterr().err == "" and len(again) == 4  # not built again
    batch = caption_collate(Tokenizer.train(["a red thing"] * 3, 100), 30, 30)([data[0], data[1]])
    assert batch["image"].shape == (2, 3, 16, 16)


def test_an_index_gives_what_the_file_holds(tmp_path):
    path = write_json(tmp_path / "p.json", [
        {"image": "a.jpg", "caption": ["One", " ", "two"], "image_id": 4},
        {"image": "b.jpg", "caption": "é"}])
    rows = PairIndex.open(str(path), None, tmp_path / "index")
    assert list(rows) == [Pair("a.jpg", ("One",), name_hash(4), "a.jpg"),
                          Pair("a.jpg", ("two",), name_hash(4), "a.jpg"),
                          Pair("b.jpg", ("é",), name_hash("b.jpg"), "b.jpg")]
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    with pytest.raises(IndexError):
        rows[3]
    os.utime(path, (1, 1))  # another file: another index
    assert PairIndex.open(str(path), None, tmp_path / "index").folder != rows.folder
    assert len(list((tmp_path / "index").iterdir())) == 2
    bad = write_json(tmp_path / "bad.json", [{"image": "a.jpg", "caption": "x"}, {"image": "b"}])
    with pytest.raises(InputError, match="record 1: 'caption' is missing"):
        PairIndex.open(str(bad), None, tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 2  # nothing half-written stays


def test_shares_of_an_epoch_go_through_everything():
    rows = [[Pair(f"{name}{i}", ("x",), i) for i in range(count)]
            for name, count in (("a", 4), ("b", 10))]
    mixture = Mixture(rows, [1.0, 0.2], ["r", "s"])
    seen = []
    for epoch in range(5):
        mixture.set_epoch(epoch)
        assert len(mixture) == 6
        names = [pair.image for pair in mixture]
        assert names[:4] == ["r/a0", "r/a1", "r/a2", "r/a3"]
        seen += names[4:]
    assert sorted(seen) == sorted(f"s/b{i}" for i in range(10))
    assert [p.image for p in Mixture(rows[:1], [2.0], [""])] == ["a0", "a1", "a2", "a3"] * 2


def test_images_of_several_sources_are_told_apart_by_their_paths():
    """Each source may number its images from 0; a picture that stands in two lists is one."""
    rows = [[Pair("1.jpg", ("a",), 1), Pair("1.jpg", ("b",), 1)], [Pair("1.jpg", ("c",), 1)]]
    apart = [pair.image_id for pair in Mixture(rows, [1.0, 1.0], ["r", "s"])]
    assert apart[0] == apart[1] != apart[2]
    assert len({pair.image_id for pair in Mixture(rows, [1.0, 1.0], ["r", "r"])}) == 1
    assert [pair.image_id for pair in Mixture(rows[:1], [1.0], ["r"])] == [1, 1]


def test_a_sample_of_a_mixture_is_of_all_rows():
    """The vocabulary and the digest of the data: later epochs read other rows."""
    rows = [Pair(f"{i}.jpg", (f"text {i}",), i) for i in range(10)]
    dataset = ImageDataset(Mixture([rows], [0.2], ["r"]), "", 16)
    assert [example.captions for example in some_examples(dataset, 100)] == [
        (f"text {i}",) for i in range(10)]
    assert len(list(some_examples(dataset, 5))) == 5 and len(dataset) == 2


def test_a_source_with_a_share(tmp_path):
    path = write_json(tmp_path / "p.json", [{"image": f"{i}.jpg", "caption": "x"}
                                            for i in range(10)])
    assert len(open_mixture(f"{path}:0.2,{path}", "", tmp_path / "index")) == 12
    for wrong, message in ((f"{path}:0", "give one above 0"), (f"{path},", "side of a comma"),
                           (f"{tmp_path}/*.tar", "no tar file"),
                           (f"{tmp_path}/x.json", "does not exist")):
        with pytest.raises(InputError, match=message):
            open_mixture(wrong, "", tmp_path / "index")


def test_a_hundred_mutated_files(tmp_path):
    """json and tar: read, or one sentence that names the file."""
    rng, said = random.Random(0), Counter()
    text = json.dumps([{"image": f"{i}.jpg", "caption": f"a dog {i}"} for i in range(30)]).encode()
    tar = shard(tmp_path / "s.tar", {f"{i:03}.{e}": png("red") if e == "png" else b"a dog"
                                     for i in range(10) for e in ("png", "txt")}).read_bytes()
    for number in range(100):
        content = bytearray(text if number % 2 else tar)
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)):]
        path = tmp_path / (f"{number}.json" if number % 2 else f"{number}.tar")
        path.write_bytes(bytes(content))
        try:
            rows = PairIndex.open(str(path), None, tmp_path / "index")
            assert all(isinstance(pair, Pair) for pair in rows)
            said["read"] += 1
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            said["refused"] += 1
    assert said.total() == 100 and min(said.values()) > 10


def test_a_broken_shard_gives_what_stands_before_the_break(tmp_path):
    """Wherever it is cut, each pair that is told of is there to the last byte."""
    whole = shard(tmp_path / "whole.tar", {f"{i:03}.{e}": png("red") if e == "png" else b"a dog"
                                           for i in range(10) for e in ("txt", "png")}).read_bytes()
    counts = []
    for cut in range(1000, len(whole), 300):
        path = tmp_path / "s.tar"
        path.write_bytes(whole[:cut])
        records = [record for _, record in tar_records(path, str(tmp_path), Counter())]
        for number, record in enumerate(records):
            offset, size = map(int, record["image"].split("::")[1].split(":"))
            assert record["image_id"] == f"s.tar {number:03}" and offset + size <= cut
            assert whole[offset:offset + size] == png("red")
        counts.append(len(records))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 10


def test_shards_of_one_name_in_two_folders_are_two(tmp_path):
    """Each image is read from its own shard, also beside a json list with an image root."""
    for folder, colour in (("p1", "red"), ("p2", "blue")):
        (tmp_path / folder).mkdir()
        shard(tmp_path / folder / "00000.tar", {"0.png": png(colour), "0.txt": colour.encode()})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png("lime"))
    path = write_json(tmp_path / "p.json", [{"image": "a.png", "caption": "lime"}])
    rows = open_mixture(f"{tmp_path}/p*/00000.tar,{path}", str(tmp_path / "photos"),
                        tmp_path / "index")
    data = ImageDataset(rows, "", 8)
    for i, colour in enumerate(("red", "blue", "lime")):
        item = data[i]
        assert item["example"].captions == (colour,) and not item["broken"], item["broken"]
        assert item["image"][:, 4, 4].tolist() == list(ImageColor.getrgb(colour))
        assert data.show(i, 20).shape == (3, 20, 20)
    assert len({pair.image_id for pair in rows}) == 3


def test_a_shard_that_is_a_link_is_read_where_it_is(tmp_path):
    """As data hubs keep them in their caches: links to files without an ending."""
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "blob", {"0.png": png(colour), "0.txt": colour.encode()})
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "00000.tar").symlink_to(tmp_path / "one" / "blob")
    (tmp_path / "web" / "00001.tar").symlink_to("../two/blob")
    data = ImageDataset(open_mixture(str(tmp_path / "web"), "", tmp_path / "index"), "", 8)
    assert [data[i]["image"][:, 4, 4].tolist() for i in (0, 1)] == [[255, 0, 0], [0, 0, 255]]


def test_pictures_are_named_by_the_way_through_a_link(tmp_path):
    """As home folders are on clusters, and /tmp on macOS."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "a.png").write_bytes(png("red"))
    path = write_json(tmp_path / "link" / "p.json",
                      [{"image": str(tmp_path / "link/a.png"), "caption": "x"}])
    for root in ("", str(tmp_path / "link")):
        data = ImageDataset(open_mixture(str(path), root, tmp_path / "index"), "", 8)
        assert data[0]["image"][:, 4, 4].tolist() == [255, 0, 0]


def test_signs_in_a_name(tmp_path):
    """A comma stands between files, [ ] in a pattern: a file that is there may have both."""
    folder = tmp_path / "my, set[1]"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("red"))
    path = str(write_json(folder / "p.json", [{"image": "a.png", "caption": "x"}]))
    shard(folder / "web.tar", {"0.png": png("red"), "0.txt": b"red"})
    for source in (path, str(folder / "web.tar")):
        data = ImageDataset(open_mixture(source, "", tmp_path / "index"), "", 8)
        assert len(data) == 1 and data[0]["image"][:, 4, 4].tolist() == [255, 0, 0]
    assert Source(path, "", "train", 0, 8).folder() == folder
    with pytest.raises(InputError, match="has a comma in its name"):
        with_shares([path], "", tmp_path / "index", 10)
    assert with_shares([path], "", tmp_path / "index", 0) == path


def test_a_link_out_of_the_root_is_not_followed_in_training(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(png("red"))
    (tmp_path / "root" / "a.png").symlink_to(tmp_path / "secret.png")
    path = write_json(tmp_path / "root" / "p.json", [{"image": "a.png", "caption": "x"}])
    data = ImageDataset(open_mixture(str(path), "", tmp_path / "index"), "", 8)
    assert data[0]["image"] is None and "outside the image root" in data[0]["broken"][0]


def test_a_bad_record_in_a_shard_is_passed_over_and_counted(tmp_path, capsys):
    good = {"a.png": png("red"), "a.txt": b"a red thing"}
    bad = {"deep": b"[" * 100_000, "long": b'{"caption": ' + b"9" * 5000 + b"}",
           "list": b"[1]", "number": b'{"caption": 3}', "not": b"nothing"}
    members = dict(good)
    for name, content in bad.items():
        members |= {f"{name}.png": png("blue"), f"{name}.json": content}
    members |= {"half.png": png("blue"), "half.json": b'{"caption": "half \\ud800"}',
                "b\udcff.png": png("blue"), "b\udcff.txt": b"no UTF-8 in its name",
                "lost.txt": b"its picture is not there"}
    rows = PairIndex.open(str(shard(tmp_path / "s.tar", members)), None, tmp_path / "index")
    assert [pair.captions[0] for pair in rows] == ["a red thing", "half ?", "no UTF-8 in its name"]
    assert rows.skipped == {"json without a caption": 4, "no picture": 1, "no caption": 5}
    assert "1 x no picture" in capsys.readouterr().err


def test_a_damaged_place_in_a_shard_is_passed_over_and_counted(tmp_path):
    """What stands behind it is read; a shard that is compressed or cut is named."""
    whole = shard(tmp_path / "s.tar", {f"{i}.{e}": png("red") if e == "png" else b"a dog"
                                       for i in range(9) for e in ("txt", "png")}).read_bytes()
    for hole in (bytes(2048), b"x" * 2048):  # two members of 1024 bytes
        (tmp_path / "s.tar").write_bytes(whole[:4096] + hole + whole[6144:])
        skipped = Counter()
        records = [r["image_id"] for _, r in tar_records(tmp_path / "s.tar", tmp_path, skipped)]
        assert records == [f"s.tar {i}" for i in (0, 1, 3, 4, 5, 6, 7, 8)]
        assert skipped.total() == 1 and "damaged place" in max(skipped, key=skipped.get)
    (tmp_path / "s.tar").write_bytes(whole[:6144])  # cut between two pairs
    assert len(list(tar_records(tmp_path / "s.tar", tmp_path, skipped := Counter()))) == 3
    assert "breaks off" in max(skipped, key=skipped.get)
    for content, reason in ((gzip.compress(whole), ".* or compressed"), (b"", ".* is broken"),
                            (bytes(5000), ""), (whole[:1500], ".* left out: 1 x")):
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(InputError, match=f"s.tar holds no image with a caption{reason}"):
            PairIndex.open(str(tmp_path / "s.tar"), None, tmp_path / "index")
    for name in ("s.tar.gz", "s.csv"):
        (tmp_path / name).write_bytes(gzip.compress(whole) if "gz" in name else b"image,text\n")
        with pytest.raises(InputError, match=f"{name} is no json .* tar shards"):
            PairIndex.open(str(tmp_path / name), None, tmp_path / "index")


def test_a_damaged_index_is_built_again(tmp_path):
    path = write_json(tmp_path / "p.json", [{"image": f"{i}.jpg", "caption": "x"}
                                            for i in range(20)])
    rows = list(PairIndex.open(str(path), None, tmp_path / "index"))
    folder, = (tmp_path / "index").iterdir()
    for name in ("rows", "offsets", "skipped"):
        for content in (b"", b"nonsense", None):
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
            assert list(PairIndex.open(str(path), None, tmp_path / "index")) == rows
    whole = (folder / "rows").read_bytes()
    (folder / "rows").write_bytes(b"\xff" * len(whole))
    with pytest.raises(InputError, match="is damaged; remove this folder, and it is built again"):
        PairIndex.open(str(path), None, tmp_path / "index")[3]


def test_what_dead_processes_left_beside_an_index_is_removed(tmp_path):
    """What is a day old; an index, or what is being written, stays."""
    path = write_json(tmp_path / "p.json", [{"image": "a.jpg", "caption": "x"}])
    for name, age in (("a-0.17.tmp", 1e6), ("b-0.18.tmp", 0), ("c.5-0123", 1e6)):
        (tmp_path / "index" / name).mkdir(parents=True)
        (tmp_path / "index" / name / "rows").write_text("[]")
        os.utime(tmp_path / "index" / name / "rows", (time.time() - age,) * 2)
    rows = PairIndex.open(str(path), None, tmp_path / "index")
    assert {folder.name for folder in (tmp_path / "index").iterdir()} == {
        "b-0.18.tmp", "c.5-0123", rows.folder.name}


@pytest.mark.slow
def test_a_loaders_memory_does_not_grow_with_the_rows(tmp_path):
    """1 million rows against 10 million, 20,000 of them read at random in a process of its own."""
    def resident(rows: int) -> int:
        path = tmp_path / f"{rows}.json"
        with open(path, "w") as file:
            file.write("[")
            for i in range(rows):
                file.write(f'{"," if i else ""}{{"image":"{i}.jpg","caption":"a dog {i}"}}')
            file.write("]")
        folder = PairIndex.open(str(path), None, tmp_path / "index").folder
        reader, writer = os.pipe()
        if os.fork() == 0:
            index, rng = PairIndex(folder, ""), random.Random(0)
            for _ in range(20_000):
                index[rng.randrange(rows)]
            status = Path("/proc/self/status").read_text()
            os.write(writer, status.split("VmRSS:")[1].split()[0].encode())
            os._exit(0)
        os.wait()
        return int(os.read(reader, 100))
    small, large = resident(1_000_000), resident(10_000_000)
    assert large < 1.1 * small
