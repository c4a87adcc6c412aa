"""CapFilt: what is judged, what is kept, what is written, and what an interruption costs."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import TOY, toy_model
from PIL import Image
from tqdm import tqdm

import capfilt
from data import shards
from data.datasets import Pair
from data.files import read_json, write_json
from data.images import load_image, prepare_images
from data.shards import Shard
from data.sources import PairIndex
from data.text import Tokenizer, clean_caption
from tasks.captioning import Decoding
from tools.filter_quality import open_filter
from training import checkpoints
from world.language import all_captions
from world.web import WorldSets

ROOT = Path(__file__).parents[1]
UNTRAINED = {"caption": {"itc_weight": 0.0, "itm_weight": 0.0}, "retrieval": {"lm_weight": 0.0}}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """web.json (50 pairs, two of them broken, one image with two texts), human.json, shards/*.tar
    with the web pairs again, two captioners and two filters (toys: random weights)."""
    folder = tmp_path_factory.mktemp("capfilt")
    WorldSets(50, 12, 0.5).save(folder, 0)
    web = read_json(folder / "web.json")
    (folder / web[7]["image"]).write_bytes(b"not a picture")
    (folder / web[30]["image"]).unlink()
    web.insert(10, {"image": web[9]["image"], "caption": "a second text"})
    (folder / "web.json").write_text(json.dumps(web))
    tokenizer = Tokenizer.train(all_captions(), 300)
    for task, seed, size in (("caption", 1, 32), ("caption", 2, 48), ("retrieval", 3, 32),
                             ("retrieval", 4, 48)):
        torch.manual_seed(seed)
        model = toy_model(**{**TOY, **tokenizer.config(), "image_size": size})
        with torch.no_grad():  # else it calls every text the same
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        checkpoints.save(folder / f"{task}{seed}.pt", {
            "model": model.state_dict(), "model_config": asdict(model.config),
            "tokenizer": tokenizer.state(),
            "train_config": {"task": task, "max_tokens": 30, "prompt": "",
                             **UNTRAINED[task], "max_length": 12}})
    return folder


def arguments(files: Path, out: Path, *flags) -> list[str]:
    return ["--web", f"{files}/web.json", "--human", f"{files}/human.json", "--captioner",
            f"{files}/caption1.pt", "--filter", f"{files}/retrieval3.pt", "--out", str(out),
            "--shard-size", "10", "--batch-size", "4", "--device", "cpu", "--precision", "fp32",
            *map(str, flags)]


def run(files: Path, out: Path, *flags) -> tuple[list[dict], list[dict]]:
    """-> the records that were kept and those that were rejected."""
    assert capfilt.main(arguments(files, out, *flags)) == 0
    return read_json(out / "bootstrapped.json"), read_json(out / "rejected.json")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run that keeps about half."""
    out = tmp_path_factory.mktemp("whole") / "out"
    capfilt.main(arguments(files, out, "--threshold", THRESHOLD))
    return out


THRESHOLD = 0.97  # about the median of what these untrained filters say


# ---- what is kept ----

def test_what_convinces_the_filters_is_kept():
    def kept(keep="all", agree="mean", threshold=0.5, seed=0):
        texts = [{"source": "web", "itm": [0.9, 0.2]}, {"source": "web", "itm": [0.4, 0.4]},
                 {"source": "synthetic", "itm": [0.6, 0.7]},
                 {"source": "synthetic", "itm": [0.95, 0.9]},
                 {"source": "synthetic", "itm": [0.1, 0.8]}]
        config = capfilt.CapFiltConfig(keep=keep, agree=agree, threshold=threshold)
        capfilt.decide(texts, config, random.Random(seed))
        return [text["kept"] for text in texts]
    assert kept() == [True, False, True, True, False]
    assert kept(agree="all") == [False, False, True, True, False]
    assert kept(keep="best") == [True, False, False, True, False]
    assert kept(threshold=0.4) == [True, True, True, True, True]
    sampled = {tuple(kept(keep="sample", seed=s)) for s in range(20)}
    assert sampled == {(True, False, True, False, False), (True, False, False, True, False)}
    assert kept(threshold=1.0) == [False] * 5


def test_without_a_filter_all_is_kept():
    texts = [{"source": "web"}, {"source": "synthetic"}]
    capfilt.decide(texts, capfilt.CapFiltConfig(), random.Random(0))
    assert all(text["kept"] for text in texts)


def test_scores_are_those_of_one_text_with_one_image(files, whole):
    """Batching, padding and stacking change nothing."""
    trained = open_filter(files / "retrieval3.pt", torch.device("cpu"))
    model = trained.model
    records = read_json(whole / "bootstrapped.json") + read_json(whole / "rejected.json")
    judged = [r for r in records if r["source"] != "human"]
    for record in judged[::9]:
        image = prepare_images(load_image(files / record["image"], 32)[None], "cpu")
        ids, mask = trained.tokenizer.encode([clean_caption(record["caption"])], 30)
        with torch.no_grad():
            logits = model.match(model.project(model.vit(image)), ids, mask)
        assert record["itm"] == pytest.approx([logits.softmax(-1)[0, 1].item()], abs=2e-4)
        assert record["kept"] == (record["itm"][0] >= THRESHOLD)


def make_shard(folder: Path, pairs: list[Pair], seed: int = 0) -> Shard:
    """A shard of random pictures."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for pair in pairs:
        pixels = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / pair.image)
    return Shard(folder / "shard.json", pairs, str(folder), seed, tqdm(disable=True))


def test_an_image_is_encoded_and_projected_once_for_each_model(files, tmp_path):
    device = torch.device("cpu")
    captioner = capfilt.open_captioner(files / "caption1.pt", {}, device)
    filter = open_filter(files / "retrieval3.pt", device)
    seen = []
    for number, trained in enumerate((captioner.trained, filter)):
        for module, name in ((trained.model.vit, "forward"), (trained.model.med, "project")):
            original = getattr(module, name)
            def counting(x, *rest, original=original, label=(number, name)):
                seen.append((*label, len(x)))
                return original(x, *rest)
            setattr(module, name, counting)
    pairs = [Pair(f"{i}.png", ("a red circle", "a box"), i) for i in range(3)]
    records = capfilt.caption_and_filter(make_shard(tmp_path, pairs), [captioner], [filter],
                                         capfilt.CapFiltConfig(captions=4))
    texts = [record["texts"] for record in records]
    assert len(texts) == 3
    assert all(len(row) > 4 and all("itm" in text for text in row) for row in texts)
    assert sorted(seen) == [(number, name, 3) for number in (0, 1)
                            for name in ("forward", "project")]


def test_a_text_that_says_the_same_is_judged_once(files, tmp_path, monkeypatch):
    captioner = capfilt.open_captioner(files / "caption1.pt", {}, torch.device("cpu"))
    monkeypatch.setattr(capfilt, "write_captions", lambda *a, **k: [
        [("a red circle", -1.0), ("a box", -2.0), ("a box", -3.0), ("", -9.0)]])
    shard = make_shard(tmp_path, [Pair("x.png", ("A red circle.",), 0)])
    record, = capfilt.caption_and_filter(shard, [captioner], [], capfilt.CapFiltConfig(captions=4))
    assert [t["caption"] for t in record["texts"]] == ["A red circle.", "a box"]


# ---- what is written ----

def test_the_bootstrapped_set(files, whole):
    kept, rejected = read_json(whole / "bootstrapped.json"), read_json(whole / "rejected.json")
    web, human = read_json(files / "web.json"), read_json(files / "human.json")
    assert [(r["image"], r["caption"]) for r in kept if r["source"] == "human"] == [
        (r["image"], r["caption"]) for r in human]
    readable = {r["image"] for r in web} - {web[7]["image"], web[31]["image"]}
    told = [(r["image"], r["caption"]) for r in kept + rejected if r["source"] == "web"]
    assert sorted(told) == sorted((r["image"], r["caption"]) for r in web
                                  if r["image"] in readable)
    synthetic = [r for r in kept + rejected if r["source"] == "synthetic"]
    assert {r["image"] for r in synthetic} == readable and len(synthetic) == len(readable)
    assert all(r["kept"] for r in kept if r["source"] != "human")
    assert not any(r["kept"] for r in rejected) and rejected
    report = read_json(whole / "report.json")
    assert report["images"] == 48 and report["broken"] == {"damaged or no image": 1, "missing": 1}
    for source in ("web", "synthetic"):
        n = [sum(r["source"] == source for r in records) for records in (kept, rejected)]
        assert [report[f"{source}_kept"], report[f"{source}_rejected"]] == n and min(n) > 0
        assert report[f"{source}_kept_rate"] == pytest.approx(n[0] / sum(n), abs=1e-4)
    assert Image.open(whole / "sheet.png").size[1] > 500


def test_train_reads_it(files, whole, tmp_path):
    """As it is, with the scores in it."""
    from conftest import run as train
    root = read_json(whole / "report.json")["image_root"]
    assert train(tmp_path / "r", "--data", whole / "bootstrapped.json", "--image-root", root) == 0
    rows = PairIndex.open(str(whole / "bootstrapped.json"), root, tmp_path)
    assert len(rows) == len(read_json(whole / "bootstrapped.json"))


def test_tar_shards_give_the_same_texts(files, whole, tmp_path):
    """Broken members and pairs without a text are counted; a truncated shard gives what is
    there."""
    web = read_json(files / "web.json")
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        def add(name, content):
            path = tmp_path / "member"
            path.write_bytes(content)
            archive.add(path, name)
        for number, record in enumerate(r for i, r in enumerate(web) if i != 10):
            path = files / record["image"]
            if path.exists():
                add(f"{number:05d}.png", path.read_bytes())
                add(f"{number:05d}.txt", record["caption"].encode())
        add("99999.png", b"an image without a text")
    out = tmp_path / "out"
    flags = arguments(files, out, "--threshold", THRESHOLD)
    flags[1] = str(tmp_path)
    assert capfilt.main(flags) == 0
    report = read_json(out / "report.json")
    assert report["broken"] == {"damaged or no image": 1}
    assert report["left_out"] == {"no caption": 1} and report["images"] == 48
    def web_scores(folder):
        return sorted((r["caption"], r["itm"][0]) for name in ("bootstrapped", "rejected")
                      for r in read_json(folder / f"{name}.json")
                      if r["source"] == "web" and r["caption"] != "a second text")
    for (text, score), (other, expected) in zip(web_scores(out), web_scores(whole), strict=True):
        assert text == other and score == pytest.approx(expected, abs=2e-4)


def test_one_role_alone(files, tmp_path):
    """Table 1: without a captioner web texts are filtered; without a filter all is kept."""
    flags = arguments(files, tmp_path / "f", "--threshold", THRESHOLD)
    del flags[4:6]
    assert capfilt.main(flags) == 0
    sources = {r["source"] for r in read_json(tmp_path / "f" / "bootstrapped.json")}
    assert sources == {"human", "web"} and read_json(tmp_path / "f" / "rejected.json")
    flags = arguments(files, tmp_path / "c", "--threshold", THRESHOLD)
    del flags[6:8]
    assert capfilt.main(flags) == 0
    assert read_json(tmp_path / "c" / "rejected.json") == []
    assert len(read_json(tmp_path / "c" / "bootstrapped.json")) == 12 + 49 + 48


def test_several_captioners_filters_and_captions(files, tmp_path):
    """Models of different image sizes; both captioners write, both filters judge."""
    kept, rejected = run(files, tmp_path / "o", "--captioner", files / "caption1.pt",
                         files / "caption2.pt", "--filter", files / "retrieval3.pt",
                         files / "retrieval4.pt", "--captions", 2, "--agree", "all", "--keep",
                         "best", "--threshold", 0.4)
    synthetic = [r for r in kept + rejected if r["source"] == "synthetic"]
    assert len(synthetic) > 3.5 * 48 and {r["captioner"] for r in synthetic} == {0, 1}
    assert all(len(r["itm"]) == 2 for r in synthetic)
    images = [r["image"] for r in kept if r["source"] == "synthetic"]
    assert images and len(images) == len(set(images))
    assert all(min(r["itm"]) >= 0.4 for r in kept if r["source"] != "human")


def test_nucleus_by_default_and_other_samples_with_another_seed(files, whole, tmp_path):
    def texts(folder):
        return [r["caption"] for name in ("bootstrapped", "rejected")
                for r in read_json(folder / f"{name}.json") if r["source"] == "synthetic"]
    run(files, tmp_path / "s", "--seed", 1, "--threshold", THRESHOLD)
    assert set(texts(tmp_path / "s")) != set(texts(whole))
    # no two batches draw the same numbers
    assert len(set(texts(whole))) > 40
    assert read_json(whole / "settings.json")["captioners"][0][1]["method"] == "nucleus"


def test_in_bfloat16(files, whole, tmp_path):
    """Scores move by rounding only; another precision is another set."""
    run(files, tmp_path / "b", "--precision", "bf16", "--threshold", THRESHOLD)
    def web(folder):
        return {(r["image"], r["caption"]): r["itm"][0] for name in ("bootstrapped", "rejected")
                for r in read_json(folder / f"{name}.json") if r["source"] == "web"}
    ours, exact = web(tmp_path / "b"), web(whole)
    assert ours.keys() == exact.keys() and ours != exact
    assert sum(abs(ours[key] - exact[key]) for key in exact) / len(exact) < 0.05


# ---- interruptions ----

def same(a: Path, b: Path) -> bool:
    return all((a / name).read_text() == (b / name).read_text()
               for name in ("bootstrapped.json", "rejected.json", "report.json"))


def test_killed_in_the_middle_of_a_shard(files, whole, tmp_path):
    """kill -9, then the same command: the same set, no finished shard done again."""
    out = tmp_path / "out"
    slow = ("import sys, time, capfilt; original = capfilt.add_itm_scores\n"
            "def slowly(*a):\n    time.sleep(0.15)\n    return original(*a)\n"
            "capfilt.add_itm_scores = slowly; capfilt.main(sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", slow,
                                *arguments(files, out, "--threshold", THRESHOLD)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 180
    while not (out / "shards" / "000001.json").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # into the third shard
    process.kill()
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in (out / "shards").glob("*.json")}
    assert len(done) == 2 and not (out / "bootstrapped.json").exists()
    run(files, out, "--threshold", THRESHOLD)
    assert same(out, whole)
    assert all(p.stat().st_mtime_ns == when for p, when in done.items())


def test_a_full_disk_leaves_nothing_half_written(files, whole, tmp_path, monkeypatch, capsys):
    out, original = tmp_path / "out", os.fsync
    def full(descriptor):
        if len(list((out / "shards").glob("*.json"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    assert capfilt.main(arguments(files, out, "--threshold", THRESHOLD)) == 2
    assert re.search(r"000002.json could not be written \(No space left on device\).*make room",
                     capsys.readouterr().err)
    assert sorted(p.name for p in (out / "shards").iterdir()) == ["000000.json", "000001.json"]
    monkeypatch.undo()
    run(files, out, "--threshold", THRESHOLD)
    assert same(out, whole)


def test_two_processes_write_the_same_set(files, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_port=29551", "capfilt.py",
               *arguments(files, tmp_path / "out", "--threshold", THRESHOLD)]
    threads = {"OMP_NUM_THREADS": "2"}  # as many as here: else scores are rounded otherwise
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env={**os.environ, **threads})
    assert same(tmp_path / "out", whole)


# ---- bad input ----

def test_mistakes_are_one_sentence(files, whole, tmp_path, capsys, monkeypatch):
    def error(*changes) -> str:
        flags = arguments(files, tmp_path / "out")
        for flag, value in changes:
            if flag in flags:
                flags[flags.index(flag) + 1] = str(value)
            else:
                flags += [flag] if value is None else [flag, str(value)]
        capsys.readouterr()
        assert capfilt.main(flags) == 2
        message = capsys.readouterr().err.split("\r")[-1]  # behind the progress bar
        assert message.startswith("error: ") and message.count("\n") == 1
        return message
    assert "caption1.pt is a checkpoint of another task (caption): it was trained without ITC " \
        "and ITM" in error(("--filter", files / "caption1.pt"))
    assert "retrieval3.pt is a checkpoint of another task" in error(
        ("--captioner", files / "retrieval3.pt"))
    urls = tmp_path / "urls.json"
    urls.write_text('[{"url": "http://x/y.jpg", "caption": "a dog"}]')
    assert "download them first" in error(("--web", urls))
    urls.write_text("[]")
    assert "holds no image with a caption" in error(("--web", urls))
    nowhere = tmp_path / "nowhere.json"
    nowhere.write_text('[{"image": "a.jpg", "caption": "a dog"}]')
    assert re.search("none of the images of the web texts can be read .the first: a.jpg in .*"
                     "missing.; is --image-root right", error(("--web", nowhere)))
    assert not list((tmp_path / "out").glob("shards/*"))
    assert "--captions 5 by beam search need --beams 5" in error(
        ("--method", "beam"), ("--captions", 5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/bootstrapped.json").write_text((files / "web.json").read_text())
    assert "bootstrapped.json lies in the folder" in error(
        ("--out", tmp_path / "mine"), ("--web", tmp_path / "mine/bootstrapped.json"))
    assert "--min-length 13 is more than --max-length 12" in error(("--min-length", 13))
    assert "--keep is 'some'; choose one of all, best, sample" in error(("--keep", "some"))
    assert "holds shards made with another threshold" in error(
        ("--out", whole), ("--threshold", 0.7))
    with monkeypatch.context() as edited:
        edited.setattr(capfilt, "digest_of_code", lambda: "edited")
        assert "holds shards made with another code" in error(
            ("--out", whole), ("--threshold", THRESHOLD))
    assert "--rounds needs --finetune and --pretrain" in error(("--rounds", 2))
    assert "or else --init and --finetune to make them" in error(("--finetune", ""))
    (tmp_path / "empty").mkdir()  # a first try that failed does not stand in the way of the next
    assert "is --image-root right" in error(("--image-root", tmp_path / "empty"))
    run(files, tmp_path / "out", "--threshold", THRESHOLD)


def test_a_set_that_is_refused_keeps_its_filters_report(files, whole, capsys):
    before = (whole / "filter.json").read_bytes()
    assert capfilt.main(arguments(files, whole, "--threshold", 0.7)) == 2
    assert "holds shards made with another threshold" in capsys.readouterr().err
    assert (whole / "filter.json").read_bytes() == before


def test_web_texts_may_move_but_not_change(files, whole, tmp_path, capsys):
    """The same command goes on after a copy to another disk; other texts are another set."""
    out = shutil.copytree(whole, tmp_path / "out")
    done = {p: p.stat().st_mtime_ns for p in (out / "shards").glob("*.json")}
    moved = shutil.copytree(files, tmp_path / "moved", copy_function=shutil.copy)  # new dates
    assert capfilt.main(arguments(moved, out, "--threshold", THRESHOLD)) == 0
    assert done and all(p.stat().st_mtime_ns == when for p, when in done.items())
    thumbnails = shutil.copytree(moved, tmp_path / "thumbnails")
    for picture in (thumbnails / "web").glob("*.png"):
        picture.write_bytes(b"smaller")
    other_root = arguments(moved, out, "--threshold", THRESHOLD, "--image-root", thumbnails)
    assert capfilt.main(other_root) == 2
    assert "holds shards made with another web set" in capsys.readouterr().err
    texts = read_json(moved / "web.json")
    texts[-1]["caption"] += " again"
    write_json(moved / "web.json", texts)
    assert capfilt.main(arguments(moved, out, "--threshold", THRESHOLD)) == 2
    assert "holds shards made with another web set" in capsys.readouterr().err


def test_a_last_shard_without_a_readable_picture_costs_nothing_else(tmp_path):
    web = web_of(tmp_path, 5)
    (tmp_path / "4.png").unlink()
    for shard in shards.pending(web, tmp_path / "out", {}, 2, 0):
        readable = [pair for pairs, _, _ in shard.batches({8}, 2, 0) for pair in pairs]
        shards.write(shard, [{"image": pair.image, "texts": []} for pair in readable])
    assert shards.merge(web, None, tmp_path / "out", 2)["images"] == 4


def web_of(folder: Path, count: int) -> PairIndex:
    records = []
    for i in range(count):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")
        records.append({"image": f"{i}.png", "caption": f"text {i}"})
    write_json(folder / "pairs.json", records)
    return PairIndex.open(str(folder / "pairs.json"), None, folder / "index")


def test_sampling_is_a_function_of_the_seed(files, tmp_path):
    captioner = capfilt.open_captioner(files / "caption1.pt", {}, torch.device("cpu"))
    pairs = [Pair(f"{i}.png", ("a box",), i) for i in range(3)]
    def texts(seed):
        records = capfilt.caption_and_filter(make_shard(tmp_path, pairs, seed), [captioner], [],
                                             capfilt.CapFiltConfig())
        return [text["caption"] for record in records for text in record["texts"]]
    assert texts(1) == texts(1) != texts(2)
    assert replace(captioner.decoding, method="beam") == Decoding(max_length=12, method="beam")
