"""The plots of results/, drawn from the json beside them.

    python -m tools.plots results/noise.json         CapFilt as the web gets noisier
    python -m tools.plots results/sampling.json      truth and variety of captions
"""

import argparse
import sys
from pathlib import Path

from data.files import InputError, read_json
from reports.charts import COLOURS, MARGIN, Page, draw_panel
from reports.metrics import mean
from training.program import exit_status

WIDTH, HEIGHT = 420, 320  # of a panel
NOISE = {"t2i_r1_rerank": "text-to-image R@1, re-ranked", "itm_swap": "ITM prefers the true text",
         "caption_true": "captions wholly true"}


def percent(rows: list[dict], measure: str) -> float:
    """Mean over seeds."""
    return 100 * mean(row[measure] for row in rows)


def draw_noise(path: Path, result: dict) -> None:
    """Raw and bootstrapped texts over the share of bad ones; result: noise.json."""
    levels = sorted({int(cell.split(", ")[1].removesuffix("% bad")) for cell in result["cells"]})
    page = Page(2 * MARGIN + len(NOISE) * WIDTH, "CapFilt as the web gets noisier",
                f"Across: bad texts on the web, percent. Up: percent, on held-out scenes. Mean of "
                f"{len(result['seeds'])} seeds.")
    page.name_colours(["raw", "CapFilt"])
    for column, (measure, title) in enumerate(NOISE.items()):
        curves = [(colour, [(level, percent(result["cells"][f"{kind}, {level}% bad"], measure))
                            for level in levels])
                  for kind, colour in zip(("raw", "CapFilt"), COLOURS)]
        draw_panel(page, MARGIN + column * WIDTH, page.y, WIDTH, HEIGHT, title, curves)
    page.y += HEIGHT
    page.save(path)


def draw_sampling(path: Path, experiments: dict[str, dict[str, list[dict]]]) -> None:
    """Truth against variety: a curve over p and a point for beam search, for each captioner."""
    page = Page(2 * MARGIN + 2 * WIDTH, "How captions are sampled",
                "Across: distinct-4, percent: how varied the wording is. Up: captions that are "
                "wholly true, percent. A curve is nucleus sampling, from its smallest p (left) to "
                "its largest (right).")
    curves, names = [], []
    for name, ways in experiments.items():
        places = {way: (percent(rows, "distinct"), percent(rows, "true"))
                  for way, rows in ways.items()}
        over_p = [at for way, at in places.items() if way.startswith("p ") and "," not in way]
        curves += [over_p, [places["beam search"]]]
        names += [f"{name}: nucleus sampling", f"{name}: beam search"]
    page.name_colours(names)
    draw_panel(page, MARGIN, page.y, 2 * WIDTH, HEIGHT, "", list(zip(COLOURS, curves)))
    page.y += HEIGHT
    page.save(path)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("json", help="noise.json or sampling.json")
    path = Path(p.parse_args(arguments).json)

    def run() -> None:
        draw = {"noise": draw_noise, "sampling": draw_sampling}.get(path.stem)
        if draw is None:
            raise InputError(f"{path}: there is a plot of noise.json and of sampling.json alone")
        draw(path.with_suffix(".png"), read_json(path))
        print(f"wrote {path.with_suffix('.png')}")
    return exit_status(run, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
