"""CapFilt in the picture world: its sets, its recipe, the whole loop."""

import json
import re
from argparse import Namespace
from pathlib import Path

import torch
from conftest import SMALL

import capfilt
from data.files import read_json
from data.images import load_image
from training.settings import training_flags
from world.datasets import World
from world.language import is_true
from world.web import WORLD_FINETUNE, WORLD_PRETRAIN, WorldSets, stand_in, truth_of_set


def test_flags_change_the_worlds_recipe_and_do_not_replace_it(tmp_path):
    """One setting of a finetuning is given: pictures of the world are still not cropped."""
    options = Namespace(seed=0, captioner=[], filter=[], pairs=0, vocab="", pretrain=None, web="",
                        human="", image_root="", finetune=training_flags("--label-smoothing 0.2"))
    stand_in(options, WorldSets(4, 4, 0.5, 4), tmp_path)
    assert options.finetune == WORLD_FINETUNE | {"label_smoothing": 0.2}
    assert options.pretrain.items() > WORLD_PRETRAIN.items() and not options.finetune["augment"]


def test_the_worlds_vocabulary_is_for_what_is_pretrained_alone(tmp_path):
    """A start, given with --init, has its own: finetuning it with another one is refused."""
    options = Namespace(seed=0, captioner=[], filter=[], pairs=0, vocab="", pretrain=None, web="",
                        human="", image_root="", finetune={})
    stand_in(options, WorldSets(4, 4, 0.5, 4), tmp_path)
    assert options.vocab == "" and Path(options.pretrain["vocab"]).read_text().startswith("[PAD]")


def test_human_pairs_without_web_pairs_are_not_dropped_in_silence(tmp_path, capsys):
    assert capfilt.main(["--human", "h.json", "--out", str(tmp_path / "out")]) == 2
    assert "--human is of own data: give --web too" in capsys.readouterr().err


def test_two_rounds_in_the_world(tmp_path, capsys):
    """Each round's captioner and filter start from the model before; the second command finds all
    done."""
    small = " ".join(SMALL[:SMALL.index("--eval-size")]) + " --log-every 2 --augment false"
    flags = ["--out", str(tmp_path), "--world-web", "24", "--world-human", "16", "--held-out", "10",
             "--pairs", "32", "--pretrain", f"{small} --lm-only-steps 2 --workers 0", "--finetune",
             "--batch-size 8 --epochs 1 --augment false --workers 0", "--rounds", "2",
             "--threshold", "0.3", "--device", "cpu"]
    assert capfilt.main(flags) == 0
    out = capsys.readouterr().out
    assert re.search(r"raw +round 1 +round 2\n.*text-to-image R@1", out)
    assert len(re.findall("% true before", out)) == 4
    assert len(re.findall("filter: of 1[0-6] human pairs", out)) == 2
    second = read_json(tmp_path / "round2" / "captioner" / "metrics.json")["settings"]
    assert second["init"] == str(tmp_path / "round1" / "model" / "checkpoint.pt")
    base = read_json(tmp_path / "base" / "metrics.json")
    assert base["steps"] == 4  # --pairs 32, though there are 40
    trained = read_json(tmp_path / "round2" / "model" / "metrics.json")
    assert trained["steps"] == 4 and "round2/bootstrapped.json" in trained["settings"]["data"]
    assert capfilt.main([*flags, "--seed", "1"]) == 2
    assert "data holds the sets of another seed or world" in capsys.readouterr().err
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoint.pt")}
    assert capfilt.main(flags) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == out.splitlines()[-5:]
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoint.pt")}


def test_the_world_knows_what_is_true(tmp_path):
    sets = WorldSets(40, 5, 0.5)
    web = sets.web(0)
    sets.save(tmp_path, 0)
    records = read_json(tmp_path / "web.json")
    assert 10 < sum(is_true(r["caption"], web.scene(i)) for i, r in enumerate(records)) < 30
    wrong = next(i for i, r in enumerate(records) if not is_true(r["caption"], web.scene(i)))
    right = [i for i, r in enumerate(records) if is_true(r["caption"], web.scene(i))][:3]
    def write(name, rows):
        (tmp_path / f"{name}.json").write_text(json.dumps(
            [{**records[i], "source": source} for i, source in rows]))
    write("bootstrapped", [(wrong, "web"), (right[0], "web"), (right[1], "synthetic")])
    write("rejected", [(right[2], "web")])
    assert truth_of_set(tmp_path, web) == {
        "web_true": 2 / 3, "web_kept_true": 1 / 2, "web_true_kept": 1 / 2,
        "synthetic_true": 1.0, "synthetic_kept_true": 1.0, "synthetic_true_kept": 1.0}


def test_the_files_show_the_worlds_scenes(tmp_path):
    path = World("train", 5, noise=0.5).save(tmp_path, "web")
    records, world = read_json(path), World("train", 5, noise=0.5)
    assert [r["caption"] for r in records] == [world[i]["example"].captions[0] for i in range(5)]
    image = load_image(tmp_path / records[3]["image"], 64)
    assert torch.equal(image, world[3]["image"])
