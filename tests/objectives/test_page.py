"""docs/losses.md: what it says to add a loss is all that is needed."""

import json
import re
from pathlib import Path

import train
from tasks import registry

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_the_example_trains(tmp_path, monkeypatch):
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)[1]
    (tmp_path / "filip_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry.register("filip_example")
    try:
        out = tmp_path / "run"
        assert train.main(["pretrain-filip", "--scenes", "96", "--eval-size", "8", "--eval-top-k",
                           "4", "--lm-only-steps", "0", "--log-every", "1", "--out", str(out)]) == 0
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert all({"itc", "itm", "lm", "filip"} <= line.keys() for line in lines)
    finally:
        del registry.TASKS["pretrain-filip"]


def test_every_recipe_stands_on_the_page():
    text = PAGE.read_text()
    for name in registry.TASKS:
        if name.startswith("pretrain-"):
            assert f"`python train.py {name}`" in text
