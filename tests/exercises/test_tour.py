"""The tour runs from its first cell to its last, and the notebook has the same cells."""

import ast
import subprocess
import sys
from pathlib import Path

from exercises.make_notebook import HERE, cells, notebook

ROOT = Path(__file__).parents[2]


def test_the_notebook_is_made_of_the_script():
    """Run `python -m exercises.make_notebook` after an edit of the tour."""
    assert (HERE / "tour.ipynb").read_text(encoding="utf-8") == notebook()
    code = ["".join(c["source"]) for c in cells((HERE / "tour.py").read_text())
            if c["cell_type"] == "code"]
    assert len(code) >= 10
    for text in code:
        ast.parse(text)


def test_the_tour_runs(pretrained, tmp_path):
    """On a model that has learnt nothing the numbers are bad, but every cell comes to its end."""
    done = subprocess.run([sys.executable, "-m", "exercises.tour", str(pretrained)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said in ("-> tokens (8, ", "own text is nearest in", "nucleus:", "looks most at row",
                 "margin 0.3"):
        assert said in done.stdout, done.stdout
