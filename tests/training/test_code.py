"""Which files a result depends on: what is trained with, a student's own files too."""

import ast
from pathlib import Path

from training import code


def test_what_is_imported_counts_and_what_only_shows_does_not(tmp_path, monkeypatch):
    files = {"train.py": "import os\nfrom losses import itc_loss\nfrom tasks import vqa\n"
                         "from reports.sheets import draw\n",
             "losses.py": "def itc_loss():\n    import my_losses.margin\n",
             "my_losses/margin.py": "", "my_losses/unused.py": "", "tasks/__init__.py": "",
             "tasks/vqa.py": "from reports import metrics\n", "reports/metrics.py": "",
             "reports/sheets.py": "import hidden\n", "hidden.py": "", "scratch.py": "no python"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    monkeypatch.setattr(code, "STARTS", ("train",))
    found = {path.relative_to(tmp_path).as_posix() for path in code.code_files()}
    assert found == {"train.py", "losses.py", "my_losses/margin.py", "tasks/__init__.py",
                     "tasks/vqa.py", "reports/metrics.py"}


def test_the_files_of_this_project():
    found = {path.relative_to(code.ROOT).as_posix() for path in code.code_files()}
    root = {path.name for path in Path(code.ROOT).glob("*.py")} - {"ablate.py", "eval.py"}
    assert root <= found
    assert {"objectives/losses.py", "blip2/qformer.py", "weights/starting.py", "world/scenes.py",
            "reports/metrics.py", "tools/judge.py"} <= found
    assert not found & {"reports/sheets.py", "tools/look.py", "tests/conftest.py"}


def test_docstrings_are_not_code_and_all_else_is():
    def of(about, sign, comment):
        text = f'def f(x):\n    """{about}"""\n    return x {sign} 1  # {comment}'
        return code.code_of(ast.parse(text))
    assert of("a", "+", "b") == of("c", "+", "d") != of("a", "-", "b")
