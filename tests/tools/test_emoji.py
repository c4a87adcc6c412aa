"""The lists that are made of emoji packages."""

import json

from PIL import Image

from data.files import read_json
from tools import emoji


def test_lists_of_training_and_held_out_drawings(tmp_path, capsys):
    """Other drawings are held out; half of the web names are another picture's."""
    assert emoji.main([str(tmp_path)]) == 2
    assert "google/emoji.json does not exist; unpack" in capsys.readouterr().err
    (tmp_path / "google").mkdir()
    for foreign, message in (('[{"a": 1}]', "record 0: 'image' is missing"), ("[3]", "it is 3")):
        (tmp_path / "google/emoji.json").write_text(foreign)
        assert emoji.main([str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    for name in (*emoji.TRAIN, emoji.HELD_OUT):
        folder = tmp_path / name / "img" / name / "64"
        folder.mkdir(parents=True)
        records = [{"image": f"{i}.png", "name": f"NAME {i}", "short_name": f"n_{i}"}
                   for i in range(20)] + [{"image": "no.png", "name": "MISSING", "short_name": "m"}]
        records[3]["name"] = None
        for i in range(20):
            Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        (tmp_path / name / "emoji.json").write_text(json.dumps(records))
    assert emoji.main([str(tmp_path)]) == 0
    lists = {name: read_json(tmp_path / f"{name}.json")
             for name in ("train", "held", "human", "web")}
    assert {name: len(records) for name, records in lists.items()} == {
        "train": 60, "held": 20, "human": 6, "web": 54}
    assert {record["image"].split("/")[0] for record in lists["train"]} == set(emoji.TRAIN)
    assert {record["image"].split("/")[0] for record in lists["held"]} == {"apple"}
    true = {record["image"]: record["caption"] for record in lists["train"]}
    assert true["google/img/google/64/3.png"] == "n 3" and true[lists["web"][0]["image"]]
    assert all(true[record["image"]] == record["caption"] for record in lists["human"])
    wrong = sum(true[record["image"]] != record["caption"] for record in lists["web"])
    assert 20 <= wrong <= 27  # 27 were moved; some have the same name by another hand
