"""A table of an experiment over seeds: mean and spread, the paper's numbers, which order came out.
"""

import statistics

from reports.statistics import LEVEL, mean_and_spread, paired_test, smallest_visible, verdict

Cells = dict[str, list[dict]]  # cell -> the numbers of each seed
CANNOT = "–"  # where a model has no such number: one without a decoder writes no captions


def verdicts(claims: tuple[tuple[str, str], ...], measures: dict[str, str],
             cells: Cells) -> list[dict]:
    """For each claim (better, worse) and measure: the difference, the paired test, the order.

    A measure that one of the two cells does not have gives none.
    """
    results = []
    for better, worse in claims:
        for measure in measures:
            if measure not in cells[better][0] or measure not in cells[worse][0]:
                continue
            differences = [a[measure] - b[measure] for a, b in zip(cells[better], cells[worse])]
            results.append({"better": better, "worse": worse, "measure": measure,
                            "difference": statistics.mean(differences),
                            "p": paired_test(differences), "verdict": verdict(differences),
                            "smallest_visible": smallest_visible(differences)})
    return results


def markdown_row(cells: list) -> str:
    """| a | b |"""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def cell_table(cells: Cells, measures: dict[str, str],
               paper: dict[str, tuple[float, ...]]) -> list[str]:
    """Mean and standard deviation of each cell, with the paper's numbers beside them."""
    columns = ["paper: COCO IR@1, finetuned, re-ranked", "TR@1", "CIDEr"] if paper else []
    lines = [markdown_row(["", *measures.values(), "minutes", *columns]),
             "|---" * (len(measures) + 2 + len(columns)) + "|"]
    for cell, rows in cells.items():
        minutes = statistics.mean(row["minutes"] for row in rows)
        ours = [mean_and_spread([row[measure] for row in rows]) if measure in rows[0] else CANNOT
                for measure in measures]
        lines.append(markdown_row([cell, *ours, f"{minutes:.1f}",
                                   *paper.get(cell, [""] * len(columns))]))
    return lines


def parameter_table(cells: Cells, paper: dict[str, float]) -> list[str]:
    """Parameters of each cell's model, in millions, beside the paper's."""
    lines = [markdown_row(["parameters, millions", "here", "paper"]), "|---|---|---|"]
    for cell, rows in cells.items():
        lines.append(markdown_row([cell, f"{rows[0]['parameters'] / 1e6:.2f}", paper[cell]]))
    return lines


def set_table(cells: Cells, paper_rejected: dict[str, float]) -> list[str]:
    """What the filter did to the texts of the cells' bootstrapped sets.

    paper_rejected: cell -> percent of the synthetic texts that the paper's filter rejects.
    """
    columns = {"true": "true before filtering", "reject_rate": "rejected",
               "kept_true": "true among the kept", "true_kept": "kept of the true ones",
               "distinct": "distinct texts"}
    lines = [markdown_row(["bootstrapped set", "texts", *columns.values(), "paper: rejected"]),
             "|---" * (len(columns) + 3) + "|"]
    for cell, rows in cells.items():
        for source in ("web", "synthetic"):
            ours = [mean_and_spread([row["set"][f"{source}_{column}"] for row in rows])
                    for column in columns]
            paper = paper_rejected.get(cell, "") if source == "synthetic" else ""
            lines.append(markdown_row([cell, source, *ours, paper]))
    return lines


def set_verdict_table(claims: tuple[tuple[str, str], ...], cells: Cells) -> list[str]:
    """How the bootstrapped sets of two cells differ, for the claims whose cells both have one.

    It begins with an empty line, or is [] where there is no such claim.
    """
    measures = {"synthetic_reject_rate": "rejected", "synthetic_true": "true before filtering",
                "synthetic_kept_true": "true among the kept",
                "synthetic_distinct": "distinct texts"}
    sets = {cell: [row["set"] for row in rows] for cell, rows in cells.items()}
    of_sets = tuple(claim for claim in claims if {*claim} <= sets.keys())
    if not of_sets:
        return []
    return ["", *verdict_table(of_sets, measures, sets,
                               "synthetic texts: has the first's set a greater share?")]


def verdict_table(claims: tuple[tuple[str, str], ...], measures: dict[str, str], cells: Cells,
                  heading: str) -> list[str]:
    """Which claims came out, by how much, and how surely."""
    lines = [markdown_row([heading, *measures.values()]), "|---" * (len(measures) + 1) + "|"]
    for claim in claims:
        words = {result["measure"]: verdict_words(result)
                 for result in verdicts((claim,), measures, cells)}
        row = [words.get(measure, CANNOT) for measure in measures]
        lines.append(markdown_row([" > ".join(claim), *row]))
    return lines


def verdict_words(result: dict) -> str:
    """"yes: +5.1 (p 0.012)", "tie: +0.3 (3.2 would be seen)": difference in points."""
    difference = f"{result['verdict']}: {100 * result['difference']:+.1f}"
    if result["smallest_visible"] is None:  # one seed
        return difference
    if result["p"] >= LEVEL:
        return f"{difference} ({100 * result['smallest_visible']:.1f} would be seen)"
    p = f"p {result['p']:.3f}" if result["p"] >= 0.001 else "p below 0.001"
    return f"{difference} ({p})"
