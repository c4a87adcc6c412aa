"""Writes exercises/tour.ipynb from exercises/tour.py: `python -m exercises.make_notebook`."""

import json
from pathlib import Path

HERE = Path(__file__).parent


def cells(source: str) -> list[dict]:
    """The cells of a script that "# %%" lines part; a title becomes a heading."""
    made = []
    for part in source.split("# %%")[1:]:
        title, _, body = part.partition("\n")
        body = body.strip("\n")
        if "[markdown]" in title:
            made.append(cell("markdown", body.strip('"')))
        else:
            made += [cell("markdown", f"### {title.strip()}"), cell("code", body)]
    for number, made_cell in enumerate(made):
        made_cell["id"] = f"cell-{number}"
    return made


def cell(kind: str, text: str) -> dict:
    """A notebook's cell, without output."""
    content = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    return content | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook() -> str:
    """The notebook as json."""
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells((HERE / "tour.py").read_text(encoding="utf-8")), "metadata": about,
               "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    (HERE / "tour.ipynb").write_text(notebook(), encoding="utf-8")
