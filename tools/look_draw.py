"""The pictures of tools/look.py: each has a title and says in words what is to be seen."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from decoding import top_p_filter
from reports.charts import (
    BLUE,
    COLOURS,
    MARGIN,
    PALE,
    Page,
    draw_heat,
    draw_panel,
    draw_scale,
    fit,
)
from reports.sheets import BLACK, FONT, GREEN, GREY, LINE, RED, Cell, draw_sheet, in_rows

QUEUE_COLUMNS = 16  # of the queue that the matrices show
ANCHORS = 6  # pairs whose negatives and verdicts are shown
TOP, NUCLEUS = 8, 0.9  # words of each position; the mass of the nucleus (BLIP sec. 4.3)


# ---- ITC -----------------------------------------------------------------------------------------

def draw_itc(path: Path, seen) -> None:
    """The matrix of similarities, the soft targets beside it, and two pictures' targets.

    seen: a tools.look.Seen.
    """
    pairs, columns = len(seen.images), shown_columns(seen)
    labels = seen.targets[0.0] > 0  # alpha 0: the hard labels alone
    cell = max(4, min(9, 360 // len(columns)))
    side = len(columns) * cell
    page = Page(max(900, 3 * (side + 2 * MARGIN) + MARGIN),
                "ITC: what each picture is compared with, and what the loss wants",
                f"Rows: the {pairs} pictures of the batch. Columns: their texts in the same order, "
                f"and right of the black line those {len(columns) - pairs} of the "
                f"{seen.sim.shape[1] - pairs} texts in the queue that the twins give most to. An "
                "orange frame is a hard label: the picture's own text. The darker a cell, the "
                "larger its number.")
    cosine = (seen.sim * seen.temp)[:, columns]
    low, high = cosine.min().item(), cosine.max().item()
    soft = max(seen.targets)
    panels = [("cosine of picture and text key", ((cosine - low) / max(high - low, 1e-9)),
               [(0, f"{low:.2f}"), (1, f"{high:.2f}")]),
              *((f"target with alpha {alpha:g}", target[:, columns].sqrt(),
                 [(share ** 0.5, f"{share:g}") for share in (0, 0.01, 0.1, 0.4, 1)])
                for alpha, target in seen.targets.items())]
    for place, (title, shares, scale) in enumerate(panels):
        x = MARGIN + place * (side + 2 * MARGIN)
        page.write(x, page.y, fit(title, side), BLACK, FONT + 1)
        _, bottom = draw_heat(page, x, page.y + LINE + 12, cell, shares.numpy(),
                              labels[:, columns].numpy(), gap_after=pairs)
        draw_scale(page, x, bottom + 16, side, scale)
    page.y = bottom + 16 + 4 * LINE
    page.paragraph(f"Momentum distillation: with alpha {soft:g} the twins may give {100 * soft:g} "
                   "% of the mass to texts that they find fitting. Below, the two pictures whose "
                   "own text has lost most of it.")
    kept = (seen.targets[soft] * labels).sum(1)
    for row in kept.argsort()[:2].tolist():
        draw_shares(page, seen, row, seen.targets[soft][row], labels[row])
    page.save(path)


def shown_columns(seen) -> list[int]:
    """The batch's columns and those of the queue that have most of the soft targets' mass."""
    pairs = len(seen.images)
    mass = seen.targets[max(seen.targets)][:, pairs:].sum(0)
    most = mass.topk(min(QUEUE_COLUMNS, len(mass))).indices.tolist()
    return [*range(pairs), *(pairs + slot for slot in most)]


def column_text(seen, column: int) -> str:
    """The text of a column, as far as it is known."""
    if column < len(seen.texts):
        return seen.texts[column]
    return "(queue) " + seen.queue_texts.get(column - len(seen.texts), "its text is not known")


def draw_shares(page: Page, seen, row: int, target: Tensor, labels: Tensor) -> None:
    """A picture and the texts that share its target mass, the largest first."""
    top = page.y
    page.paste(seen.images[row].numpy(), MARGIN, top, 112)
    x, page.y = MARGIN + 130, top
    page.write(x, page.y, fit(f"row {row + 1}, its own text: {seen.texts[row]}",
                              page.width - x - MARGIN))
    page.y += LINE + 6
    best = target.topk(min(6, len(target)))
    for share, column in zip(best.values.tolist(), best.indices.tolist()):
        colour = COLOURS[1] if labels[column] else BLUE
        page.draw.rectangle((x, page.y + 2, x + 1 + 120 * share, page.y + LINE - 3), fill=colour)
        page.write(x + 128, page.y, f"{100 * share:5.2f} %", GREY)
        page.write(x + 186, page.y, fit(column_text(seen, column), page.width - x - 200), colour)
        page.y += LINE
    page.y = max(page.y, top + 112) + LINE


# ---- hard negatives and ITM ----------------------------------------------------------------------

def chance_of(weights: Tensor, row: int, column: int) -> str:
    """With what probability a negative is drawn: "drawn with 43.2 %"."""
    return f"drawn with {100 * (weights[row, column] / weights[row].sum()).item():.1f} %"


def draw_negatives(path: Path, seen) -> None:
    """For some pairs the mined hard text and hard image, with their probability."""
    cells = []
    for row in range(min(ANCHORS, len(seen.texts))):
        text, image = int(seen.text_neg[row]), int(seen.image_neg[row])
        likeliest = (seen.text_weights[row] / seen.text_weights[row].sum()).topk(
            min(3, len(seen.texts) - 1)).values.tolist()
        cells += [Cell(seen.images[row], [("own: " + seen.texts[row], BLACK)], GREEN),
                  Cell(None, [("hard text:", RED), (seen.texts[text], RED),
                              (chance_of(seen.text_weights, row, text), BLACK), ("", GREY),
                              ("the three likeliest texts have "
                               + ", ".join(f"{100 * share:.1f}" for share in likeliest) + " %",
                               GREY)]),
                  Cell(seen.images[image], [("hard image: " + seen.texts[image], RED),
                                            (chance_of(seen.image_weights, row, image), BLACK)],
                       RED)]
    negatives = len(seen.texts) - 1
    draw_sheet(path, [
        ("ITM's hard negatives: a pair (green), the wrong text and the wrong picture that were "
         "drawn for it (red)", []),
        ("The more alike, the likelier it is drawn (mine_hard_negatives). If all "
         f"{negatives} were equally likely: {100 / negatives:.1f} % each", in_rows(cells, 6))])


def draw_itm(path: Path, seen) -> None:
    """The verdicts on own text, hard text and hard image of some pairs."""
    pairs, cells = len(seen.texts), []
    probability = seen.itm_logits.softmax(1)[:, 1].tolist()
    for row in range(min(ANCHORS, pairs)):
        text, image = int(seen.text_neg[row]), int(seen.image_neg[row])
        for kind, place, shown, words in (("own text", row, row, row),
                                          ("hard text", pairs + row, row, text),
                                          ("hard image", 2 * pairs + row, image, row)):
            right = (probability[place] > 0.5) == (kind == "own text")
            colour = GREEN if right else RED
            if not seen.valid[place]:
                colour = GREY
            cells.append(Cell(seen.images[shown], [
                (f"{kind}: matched with {100 * probability[place]:.1f} %", colour),
                (seen.texts[words], BLACK)], colour))
    draw_sheet(path, [("ITM: does this text match this picture? green: judged rightly, red: "
                       "wrongly (own text must be above 50 %, the others below)",
                       in_rows(cells, 6))])


# ---- LM ------------------------------------------------------------------------------------------

def draw_lm(path: Path, seen, row: int = 0) -> None:
    """The distribution of the next word at each position of one text."""
    columns, width, height = 4, 285, (TOP + 4) * LINE
    page = Page(2 * MARGIN + columns * width, "LM: which word comes next?",
                f"One panel for each position: what was read so far, and the {TOP} likeliest next "
                "words. Green: the word that comes (the target). Blue: in the nucleus, the fewest "
                f"words that together reach p = {NUCLEUS:g}, which sampling draws from. Grey: "
                "outside of it.")
    page.paste(seen.images[row].numpy(), MARGIN, page.y, 112)
    page.write(MARGIN + 130, page.y, seen.texts[row])
    page.y += 112 + LINE
    positions = [t for t in range(seen.lm_targets.shape[1]) if seen.lm_targets[row, t] >= 0]
    for place, position in enumerate(positions):
        y, x = (part * size for part, size in zip(divmod(place, columns), (height, width)))
        so_far = " ".join(["[DEC]", *(seen.vocab[i] for i in seen.ids[row, 1:position + 1])])
        draw_next_words(page, MARGIN + x, page.y + y, width - 16, so_far,
                        seen.lm_logits[row, position], int(seen.lm_targets[row, position]),
                        seen.vocab)
    page.y += -(-len(positions) // columns) * height
    page.save(path)


def draw_next_words(page: Page, x: int, y: int, width: int, so_far: str, logits: Tensor,
                    target: int, vocab: list[str]) -> None:
    """One position: bars of the likeliest tokens, and the target's where it is not among them."""
    probability = logits.softmax(0)
    in_nucleus = top_p_filter(logits[None], NUCLEUS)[0] > float("-inf")
    # The end of what was read is what matters.
    while so_far != fit(so_far, width):
        so_far = "... " + so_far.removeprefix("... ").partition(" ")[2]
    page.write(x, y, so_far)
    page.write(x, y + LINE, f"nucleus: {int(in_nucleus.sum())} of {len(vocab)} words", GREY)
    tokens = probability.topk(min(TOP, len(vocab))).indices.tolist()
    if target not in tokens:
        tokens[-1] = target
    for place, token in enumerate(tokens):
        top, share = y + (2 + place) * LINE, probability[token].item()
        colour = GREEN if token == target else BLUE if in_nucleus[token] else GREY
        bar = PALE if colour == GREY else colour
        page.write(x, top, fit(vocab[token], 86), colour)
        page.draw.rectangle((x + 92, top + 2, x + 93 + (width - 150) * share, top + LINE - 3),
                            fill=bar)
        page.write(x + 100 + (width - 150) * share, top, f"{100 * share:.1f} %", colour)


# ---- masks ---------------------------------------------------------------------------------------

EXPLAINED = {
    "encode_text": ("Unimodal encoder, for ITC", "Every word looks at every word (bidirectional). "
                    "The picture plays no part. [PAD] is looked at by nobody."),
    "encode_grounded": ("Image-grounded encoder, for ITM", "Every word looks at every word, then "
                        "at every token of the picture (cross-attention)."),
    "decode": ("Image-grounded decoder, for LM", "A word looks at itself and at those before it "
               "(causal): it must not see what it predicts. Then at every token of the picture.")}


def draw_masks(path: Path, masks: dict) -> None:
    """The attention masks of the three modes as grids. masks: mode -> tools.look.ModeMasks."""
    cell, side = 17, 92
    most = max(len(mode.words) for mode in masks.values())
    tokens = min(24, max(mode.cross_mask.shape[1] for mode in masks.values()
                         if mode.cross_mask is not None))
    page = Page(2 * MARGIN + side + (most + tokens) * cell + 120,
                "Who may look at whom (the masks of med.py)",
                "Rows: the word that looks. Columns: what it may look at. Dark: it may. White: it "
                "may not. Left: self-attention, over the words. Right: cross-attention, over the "
                "tokens of the picture ([CLS], then patches p1, p2 ... in reading order).")
    for name, mode in masks.items():
        title, words = EXPLAINED[name]
        page.write(MARGIN, page.y, f"{title}: med.{name}", BLACK, FONT + 2)
        page.y += LINE + 6
        page.paragraph(words)
        x, y = MARGIN + side, page.y + 64
        draw_mask(page, x, y, cell, mode.self_mask, mode.words, mode.words)
        if mode.cross_mask is not None:
            across = ["[CLS]", *(f"p{i}" for i in range(1, tokens))]
            draw_mask(page, x + (most + 1) * cell + side, y, cell, mode.cross_mask[:, :tokens],
                      mode.words, across)
        page.y = y + len(mode.words) * cell + 2 * LINE
    page.save(path)


def draw_mask(page: Page, x: int, y: int, cell: int, mask: Tensor, rows: list[str],
              columns: list[str]) -> None:
    """A mask with the words at its left and, written upwards, above it."""
    font = ImageFont.load_default(FONT)
    for i, word in enumerate(rows):
        page.write(x - 6, y + i * cell + cell // 2, fit(word, 84), BLACK, FONT, "rm")
    for j, word in enumerate(columns):
        label = Image.new("RGB", (60, cell), "white")
        ImageDraw.Draw(label).text((2, cell // 2), fit(word, 56), BLACK, font, anchor="lm")
        page.image.paste(label.rotate(90, expand=True), (x + j * cell, y - 62))
    draw_heat(page, x, y, cell, mask.numpy().astype(np.float32) * 0.8)
    for i in range(1, len(rows)):
        page.draw.line((x, y + i * cell - 1, x + len(columns) * cell, y + i * cell - 1), PALE)
    for j in range(1, len(columns)):
        page.draw.line((x + j * cell - 1, y, x + j * cell - 1, y + len(rows) * cell), PALE)


# ---- the queue -----------------------------------------------------------------------------------

def draw_queue(path: Path, curves: dict[str, list], count: int) -> None:
    """How close queued features are to today's. curves: tools.look.staleness."""
    page = Page(820, "The queue: how old are its features?",
                f"For the {count} newest entries of the queue: the cosine between the feature that "
                "was put there, and what today's momentum twin (or the online encoder) makes of "
                "the same picture or text. Across: how many steps ago the feature was made. 1 is "
                "a feature that is as good as new. The faster the model learns, the sooner "
                "a feature is out of date; late in a run, with a small learning rate, hardly any "
                "is.")
    for place, (name, _) in enumerate(curves.items()):
        page.draw.line((MARGIN, page.y + 8, MARGIN + 30, page.y + 8), COLOURS[place], 4)
        page.write(MARGIN + 38, page.y, name)
        page.y += LINE + 2
    draw_panel(page, MARGIN, page.y + LINE, 780, 320, "mean cosine with today's feature",
               list(zip(COLOURS, curves.values())))
    page.y += LINE + 330
    page.save(path)
