"""Curves of training runs: a panel for each number of log.jsonl, a colour for each run."""

import json
from pathlib import Path

from data.files import InputError
from reports.charts import COLOURS, LINE, MARGIN, Page, draw_panel

# What has a panel if some run has it, in this order, and what is written above it.
TITLES = {"itc": "ITC loss", "itm": "ITM loss", "lm": "LM loss",
          "itc_i2t_acc": "ITC: own text is the nearest in the batch",
          "itc_t2i_acc": "ITC: own picture is the nearest in the batch",
          "itm_pos_acc": "ITM: own pairs judged rightly",
          "itm_neg_acc": "ITM: negatives judged rightly",
          "lm_nll": "LM: nats a token, without smoothing",
          "grad_norm": "gradient norm, before clipping", "lr": "learning rate",
          "alpha": "alpha, weight of the soft targets", "temp": "temperature of ITC",
          "val_score": "score on the validation split"}
NO_PANEL = {"step", "minutes", "pairs_per_s", "best"}
COLUMNS, WIDTH, HEIGHT = 3, 380, 240  # of panels


def read_log(folder: str | Path) -> list[dict]:
    """The lines of the log.jsonl in a run's folder. Raises InputError."""
    path = Path(folder) / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line["step"], int) for line in lines):
            raise ValueError("a step that is no number")
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} cannot be read; give the folder of a run of train.py")
    if not lines:
        raise InputError(f"{path} is empty: the run has not logged a step yet; wait, or leave it "
                         "out")
    return lines


def panel_titles(logs: dict[str, list[dict]]) -> dict[str, str]:
    """The numbers that the logs hold -> titles; a number of a student's own has its name."""
    names = {name for log in logs.values() for line in log for name in line} - NO_PANEL
    known = {name: title for name, title in TITLES.items() if name in names}
    return known | {name: name for name in sorted(names - set(known))}


def draw_curves(path: str | Path, logs: dict[str, list[dict]],
                levels: dict[str, float] | None = None) -> None:
    """Write a PNG of the curves of one or several runs.

    logs: a run's name -> the lines of its log.jsonl, {step, ...}; after ten runs the colours
    repeat. levels: what chance gives, a dashed line.
    """
    titles, levels = panel_titles(logs), levels or {}
    dashed = "Dashed: what a model has that knows nothing." if levels else ""
    page = Page(2 * MARGIN + COLUMNS * WIDTH, "Training curves", "Across: steps. A point is the "
                f"mean over the steps since the point before. {dashed}")
    page.name_colours(logs)
    across = (0, max(line["step"] for log in logs.values() for line in log))
    for place, (name, title) in enumerate(titles.items()):
        row, column = divmod(place, COLUMNS)
        curves = [(COLOURS[number % len(COLOURS)],
                   [(line["step"], line[name]) for line in log if name in line])
                  for number, log in enumerate(logs.values())]
        draw_panel(page, MARGIN + column * WIDTH, page.y + row * HEIGHT, WIDTH, HEIGHT - LINE,
                   title, curves, levels.get(name), across)
    page.y += -(-len(titles) // COLUMNS) * HEIGHT
    page.save(path)
