"""The tables: every cell made once, means, verdicts and the paper's claims right."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, toy_batch, toy_model

import ablate
import blip
import train
from capfilt import CapFiltConfig, training_flags
from data.files import read_json, write_json
from reports.tables import set_verdict_table, verdict_words, verdicts
from tools import workers
from tools.experiments import Experiment
from tools.experiments_claims import LARGE, PARTS
from tools.judge import MEASURES
from world.web import WorldSets

TINY = " ".join(SMALL[:SMALL.index("--eval-size")]) + (
    " --log-every 2 --augment false --workers 0 --warmup-steps 2 --lm-only-steps 2")
FINE = "--batch-size 8 --epochs 1 --augment false --workers 0"


def regime(out: Path) -> ablate.Regime:
    return ablate.Regime(str(out), WorldSets(24, 16, 0.5, 10), 32, training_flags(TINY),
                         training_flags(FINE), training_flags(TINY + " --scenes 32"))


def test_verdicts_and_the_table():
    def cell(*values):
        return [{**dict.fromkeys(MEASURES, value), "minutes": 2.0} for value in values]
    experiment = ablate.Experiment("A table", {"a": None, "b": None}, {"a": (60.7, 78.4, 127.8)},
                                   (("a", "b"),))
    cells = {"a": cell(0.5, 0.6, 0.7), "b": cell(0.4, 0.4, 0.4)}
    found = verdicts(experiment.claims, MEASURES, cells)
    assert len(found) == len(MEASURES) and all(v["verdict"] == "a look" for v in found)
    assert found[0]["difference"] == pytest.approx(0.2)
    assert found[0]["p"] == pytest.approx(1 - 12 ** 0.5 / 14 ** 0.5)
    out = Path("somewhere")
    text = ablate.markdown(experiment, cells, "python ablate.py x", regime(out), [0, 1, 2])
    assert f"| a |{' 60.0 ± 10.0 |' * len(MEASURES)} 2.0 | 60.7 | 78.4 | 127.8 |" in text
    assert "| a > b | a look: +20.0 (24.8 would be seen) |" in text  # 4.303 x 10 / sqrt(3)
    for a, b, expected in ((0.9, 0.4, "yes"), (0.1, 0.4, "no"), (0.4, 0.4, "tie")):
        five = {"a": cell(a, a + 0.01, a - 0.01, a, a), "b": cell(b, b, b, b, b)}
        assert {v["verdict"] for v in verdicts(experiment.claims, MEASURES, five)} == {expected}


def test_a_cell_without_a_measure_has_a_dash_and_no_verdict(tmp_path):
    """A model without a decoder writes no captions: the other columns stand where they belong."""
    measures = {"t2i_r1": "R@1", "caption_true": "captions"}
    experiment = ablate.Experiment("A table", {"a": None, "b": None}, claims=(("a", "b"),),
                                   measures=measures)
    cells = {"a": [{"t2i_r1": 0.5, "caption_true": 0.7, "minutes": 1.0}] * 2,
             "b": [{"caption_true": 0.2, "minutes": 1.0}] * 2}
    text = ablate.markdown(experiment, cells, "python ablate.py x", regime(tmp_path), [0, 1])
    assert "| b | – | 20.0 ± 0.0 | 1.0 |" in text
    assert "| a > b | – | a look: +50.0 (p below 0.001) |" in text
    assert [v["measure"] for v in verdicts(experiment.claims, measures, cells)] == ["caption_true"]


def test_without_locks_there_is_one_job(tmp_path, monkeypatch, capsys):
    """On Windows two cells could train the same model into the same folder."""
    monkeypatch.setattr(ablate, "fcntl", None)
    assert ablate.main(["table1", "--jobs", "2", "--out", str(tmp_path), "--results",
                        str(tmp_path)]) == 2
    assert "--jobs: on Windows" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["yes", "a look"])
@pytest.mark.parametrize("p, words", [(0.0497, "p 0.050"), (0.001, "p 0.001"),
                                      (0.00099, "p below 0.001"), (0.05, "1.0 would be seen")])
def test_a_verdict_says_how_sure_it_is(kind, p, words):
    result = {"verdict": kind, "difference": 0.05, "p": p, "smallest_visible": 0.01}
    assert verdict_words(result) == f"{kind}: +5.0 ({words})"
    one_seed = {"verdict": "a look", "difference": 0.05, "p": 1.0, "smallest_visible": None}
    assert verdict_words(one_seed) == "a look: +5.0"


@pytest.mark.parametrize("name", ablate.EXPERIMENTS)
def test_each_experiment_becomes_a_table(name, tmp_path):
    """After hours of training: columns, verdicts and rates of whatever the experiment has."""
    experiment = ablate.EXPERIMENTS[name]
    row = {**dict.fromkeys(experiment.measures, 0.5), "minutes": 2.0, "parameters": 1_234_567}
    rates = {f"{source}_{rate}": 0.5 for source in ("web", "synthetic")
             for rate in ("true", "reject_rate", "kept_true", "true_kept", "distinct")}
    cells = {cell: [row | ({"set": rates} if cell in experiment.sets else {})] * 5
             for cell in experiment.cells}
    text = ablate.markdown(experiment, cells, "python ablate.py x", regime(tmp_path), [*range(5)])
    assert all(f"| {cell} | 50.0 ± 0.0 |" in text for cell in experiment.cells)
    assert all(f"| {' > '.join(claim)} | tie" in text for claim in experiment.claims)
    for cell, millions in experiment.paper_parameters.items():
        assert f"| {cell} | 1.23 | {millions} |" in text
    for cell in experiment.sets:
        assert f"| {cell} | web |{' 50.0 ± 0.0 |' * 5}  |" in text
        paper = experiment.paper_rejected.get(cell, "")
        assert f"| {cell} | synthetic |{' 50.0 ± 0.0 |' * 5} {paper} |" in text


def test_bootstrapped_sets_are_compared():
    """Table 2's cause: whether the captions of one cell's set are rejected more often."""
    def cell(*rejected: float) -> list[dict]:
        rates = dict.fromkeys(("synthetic_true", "synthetic_kept_true", "synthetic_distinct"), 0.5)
        return [{"set": rates | {"synthetic_reject_rate": share}} for share in rejected]
    cells = {"a": cell(0.31, 0.30, 0.31, 0.30, 0.31), "b": cell(0.11, 0.10, 0.11, 0.10, 0.11)}
    same = "tie: +0.0 (0.0 would be seen)"
    claims = (("a", "b"), ("a", "without a set"))
    assert set_verdict_table(claims, cells)[-1] == (
        f"| a > b | yes: +20.0 (p below 0.001) | {same} | {same} | {same} |")
    assert set_verdict_table(claims[1:], cells) == []


def test_numbers_of_a_bootstrapped_set(tmp_path):
    def texts(source: str, *captions: str) -> list[dict]:
        return [{"image": "1.png", "caption": caption, "source": source} for caption in captions]
    write_json(tmp_path / "bootstrapped.json", texts("synthetic", "a", "b") + texts("human", "c"))
    write_json(tmp_path / "rejected.json", texts("synthetic", "a", "a") + texts("web", "d"))
    write_json(tmp_path / "report.json", {"image_root": "x", "synthetic_kept_rate": 0.5,
                                          "web_kept_rate": 0.0})
    assert ablate.set_numbers(tmp_path) == {
        "synthetic_kept_rate": 0.5, "synthetic_reject_rate": 0.5, "synthetic_distinct": 0.5,
        "web_kept_rate": 0.0, "web_reject_rate": 1.0, "web_distinct": 1.0}


def test_a_worker_that_was_interrupted_begins_nothing_more(monkeypatch):
    """The pool has given it its next cell already."""
    monkeypatch.setattr(workers, "stopped", [])
    def interrupted():
        raise KeyboardInterrupt
    assert workers.unless_stopped(max, 1, 2) == 2
    for work in (interrupted, lambda: 1 / 0):
        with pytest.raises(KeyboardInterrupt):
            workers.unless_stopped(work)


def test_the_papers_numbers_follow_its_claims():
    for experiment in ablate.EXPERIMENTS.values():
        assert experiment.paper.keys() <= experiment.cells.keys() >= experiment.sets.keys()
        for better, worse in experiment.claims:
            if {better, worse} <= experiment.paper.keys():  # by text-to-image R@1
                assert experiment.paper[better][0] > experiment.paper[worse][0]
            assert {better, worse} <= experiment.cells.keys()


def test_sets_and_models_are_made_once(tmp_path, monkeypatch):
    """Table 1's cells learn from what they say that they learn from, and share what they can."""
    cache, made = ablate.ExperimentCache(regime(tmp_path), 0), []
    original = train.train_into
    def counting(folder, given):
        made.append(given)
        return original(folder, given)
    monkeypatch.setattr(train, "train_into", counting)
    monkeypatch.setattr(ablate, "CapFiltConfig", lambda: CapFiltConfig(threshold=0.35))
    cells = ablate.EXPERIMENTS["table1"].cells
    paths = {name: cell(cache) for name, cell in cells.items()}
    assert len(set(paths.values())) == 4
    assert sorted(given.get("task", "pretrain") for given in made) == [
        "caption", *["pretrain"] * 4, "retrieval"]
    count = len(made)
    again = ablate.ExperimentCache(regime(tmp_path), 0)
    assert {name: cell(again) for name, cell in cells.items()} == paths
    assert len(made) == count
    folder = cache.capfilt()
    assert ablate.set_numbers(folder).keys() >= {"web_reject_rate", "synthetic_distinct"}
    kept, rejected = (read_json(folder / f"{n}.json") for n in ("bootstrapped", "rejected"))
    def of(web, synthetic):
        texts = read_json(cache.texts(folder, web, synthetic)[0])
        return sorted((t["image"], t["caption"], t["source"]) for t in texts)
    def pick(records, *sources):
        return [(t["image"], t["caption"], t["source"]) for t in records if t["source"] in sources]
    assert of("kept", "kept") == sorted(pick(kept, "human", "web", "synthetic"))
    assert of("kept", "none") == sorted(pick(kept, "human", "web"))
    assert of("all", "all") == sorted(pick(kept + rejected, "human", "web", "synthetic"))
    sizes = {name: read_json(Path(path).with_name("metrics.json"))["steps"]
             for name, path in paths.items()}
    assert set(sizes.values()) == {4}  # the same number of steps whatever the set


def test_the_claims_cells_are_made_of_what_their_names_say(tmp_path):
    """Noise and size of the web, who makes the set and how often, and what is set aside."""
    made = []

    class Recorder(ablate.ExperimentCache):
        def train(self, kind, given, *more):
            made.append((self.regime.world, kind, given))
            return f"{kind} {len(made)}"

        def pretrain(self, sources, times=1, **given):
            return self.train("pretrain", {"sources": sources} | given)

        def finetune(self, task, init="", **given):
            return self.train("finetune", {"task": task, "init": init} | given)

        def bootstrap(self, captioners, filters, settings=None, **decoding):
            return Path(f"set of {captioners}, {filters}, {settings}")

        def texts(self, folder, web, synthetic):
            return [str(folder), web, synthetic]

        def raw(self):
            return ["raw"]

        def with_world(self, **web):
            other = super().with_world(**web)
            return Recorder(other.regime, self.seed)

    def last(experiment: str, cell: str) -> tuple:
        made.clear()
        ablate.EXPERIMENTS[experiment].cells[cell](Recorder(regime(tmp_path), 0))
        return made[-1]

    world, _, given = last("noise", "CapFilt, 80% bad")
    assert world.world_noise == 0.8 and given["sources"][0].startswith("set of ['fine")
    assert last("noise", "raw, 0% bad")[0].world_noise == 0
    assert last("web", "raw, web x 4")[0].world_web == 4 * WorldSets.world_web
    assert last("losses", "without queue")[2]["queue_size"] == 0
    assert last("losses-noisy", "without ITM")[2] == {"sources": ["raw"], "itm_weight": 0.0}
    assert last("distillation", "CapFilt")[2]["alpha"] == 0
    assert "alpha" not in last("distillation", "CapFilt, distillation")[2]
    assert "vit_width" not in last("models", "base, CapFilt by large")[2]
    large = [given for _, _, given in made if "vit_width" in given]
    assert len(large) == 1 and large[0] == {"sources": ["raw"]} | LARGE
    assert [g["init"] for _, kind, g in made if kind == "finetune"] == ["pretrain 1"] * 2
    assert last("models", "large, CapFilt by base")[2]["vit_width"] == LARGE["vit_width"]
    assert last("recipes", "CLIP")[2]["task"] == "pretrain-clip"
    assert "'captions': 4, 'keep': 'best'" in last("captions", "4 captions, keep best")[2][
        "sources"][0]
    assert last("rounds", "2 rounds")[2]["sources"][0].startswith(
        "set of ['finetune 5'], ['finetune 6']")  # 1: raw; 2, 3: round 1; 4: its model
    assert [g["init"] for _, kind, g in made if kind == "finetune"] == [
        "pretrain 1", "pretrain 1", "pretrain 4", "pretrain 4"]
    pair = last("ensembles", "two filters, both")[2]["sources"][0]
    seeds = [(g["task"], g["seed"]) for _, kind, g in made if kind == "finetune" and "seed" in g]
    assert seeds == [("retrieval", 1000)] and pair.endswith("{'agree': 'all'}")
    assert pair.count("finetune") == 3


class Recorder:
    """A cache that trains nothing: it notes the settings of each training on clean texts."""

    def __init__(self):
        self.calls = []

    def clean(self, **given) -> str:
        self.calls.append(given)
        return given.get("task", "pretrain")

    def with_seed(self, seed: int):
        assert seed == 0  # one encoder-decoder for all
        return self


def calls(experiment: str, cell: str) -> list[dict]:
    recorder = Recorder()
    ablate.EXPERIMENTS[experiment].cells[cell](recorder)
    return recorder.calls


def test_the_parts_of_the_objective_that_are_set_aside():
    given = {cell: calls("losses", cell) for cell in ablate.EXPERIMENTS["losses"].cells}
    assert given == {
        "all": [{}], "without ITC": [{"itc_weight": 0}], "without ITM": [{"itm_weight": 0}],
        "without LM": [{"lm_weight": 0}], "without momentum distillation": [{"alpha": 0}],
        "without queue": [{"queue_size": 0}], "without hard negatives": [{"hard_negatives": False}],
        "without LM alone first": [{"lm_only_steps": 0}],
        "with label smoothing": [{"label_smoothing": 0.1}],
        "with the released initialisation": [{"init_std": 0.02}]}


def test_blip2s_cells_are_made_of_what_their_names_say():
    """Each cell's own training, and those that it starts from, are the right ones."""
    with_stage1 = calls("blip2-figure5", "with stage 1, 300 steps")
    without = calls("blip2-figure5-t5", "without, 2000 steps")
    assert with_stage1[-1] | {"scenes": 0} == {
        "task": "blip2-stage2", "init": "blip2-stage1", "language_model": "language-model",
        "scenes": 0, "new_layers": 0}
    assert calls("blip2-figure5", "with stage 1, two layers new, 300 steps")[-1] == with_stage1[
        -1] | {"new_layers": 2}
    assert with_stage1[-1]["scenes"] == 300 * 16 and without[-1]["scenes"] == 2000 * 16
    assert without[-1]["init"] == "pretrain"
    assert [call["kind"] for call in without if "kind" in call] == ["encoder-decoder"]
    assert [call for call in calls("blip2-table6", "ITC + ITM") if "lm_weight" in call] == [
        {"task": "blip2-stage1", "init": "pretrain", "lm_weight": 0.0}]
    assert calls("blip2-queries", "8 queries")[-1]["queries"] == 8
    preset = calls("blip2-queries", "32 queries")  # the same settings, so it is trained once
    assert preset == calls("blip2-sizes", "both large") == calls("blip2-blip", "BLIP-2, stage 2")
    small = calls("blip2-sizes", "small image encoder")
    assert small[0]["vit_width"] == 64 and "vit_width" not in small[-1]


def test_what_is_made_again_because_the_code_changed_is_said(tmp_path, monkeypatch):
    cache = ablate.ExperimentCache(regime(tmp_path / "runs"), 0)
    def make(kind: str, clean: str = "clean-0-0123456789") -> str:
        return cache.make(kind, ["lr", f"{tmp_path}/{clean}/run"], lambda folder: "x")
    make("model")
    make("model", "clean-0-abcdefabcd")  # another start, not other code
    assert not cache.made_again
    monkeypatch.setattr(ablate, "digest_of_code", lambda: "other code")
    make("model")
    assert len(cache.made_again) == 1 and "is of other code" in cache.made_again[0]
    make("model")  # it is there by now
    assert len(cache.made_again) == 1


def test_the_command(tmp_path, capsys):
    """Two cells in two processes, in a table of their own; the second command trains nothing."""
    results = tmp_path / "results"
    flags = ["losses", "--seeds", "1", "--jobs", "2", "--device", "cpu", "--out",
             str(tmp_path / "runs"), "--results", str(results), "--held-out", "10",
             "--losses", TINY + " --scenes 32", "--cells", "all", "without ITM"]
    assert ablate.main(flags) == 0
    table, printed = (results / "losses-all-without_ITM.md").read_text(), capsys.readouterr()
    assert "| all |" in table and "| without ITM |" in table and "| without LM |" not in table
    assert "| all > without ITM | a look" in table and table in printed.out
    assert "is made anew" not in printed.err
    measured = results / "losses-all-without_ITM.json"
    assert [len(rows) for rows in read_json(measured)["cells"].values()] == [1, 1]
    configs = [read_json(p)["settings"] for p in (tmp_path / "runs").glob("*/run/metrics.json")]
    assert sorted(c["itm_weight"] for c in configs) == [0, 1]
    # A table of more seeds is not written over.
    measured.write_text(measured.read_text().replace('"seeds": [\n  0\n ]', '"seeds": [0, 1]'))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoint.pt")}
    assert len(before) == 2 and ablate.main(flags) == 0 and read_json(measured)["seeds"] == [0, 1]
    assert (results / "losses-all-without_ITM-seeds_1.md").exists()
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoint.pt")}
    assert ablate.main([*flags[:-1], "without ITN"]) == 2
    assert "no cell 'without ITN'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_table(tmp_path):
    """Every cell of the experiment is trained with its own settings, in a file of its name."""
    flags = ["losses", "--seeds", "1", "--jobs", "2", "--device", "cpu", "--out",
             str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--held-out", "10",
             "--losses", TINY + " --scenes 32"]
    assert ablate.main(flags) == 0
    assert "| without hard negatives |" in (tmp_path / "results" / "losses.md").read_text()
    cells = read_json(tmp_path / "results" / "losses.json")["cells"]
    assert len(cells) == 1 + len(PARTS) and all(len(rows) == 1 for rows in cells.values())
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 1 + len(PARTS)
    configs = [read_json(p)["settings"] for p in (tmp_path / "runs").glob("*/run/metrics.json")]
    assert {(c["itc_weight"], c["itm_weight"], c["lm_weight"], c["alpha"]) for c in configs} == {
        (1, 1, 1, 0.4), (0, 1, 1, 0.4), (1, 0, 1, 0.4), (1, 1, 0, 0.4), (1, 1, 1, 0.0)}


def test_random_negatives_instead_of_hard_ones(monkeypatch):
    """--hard-negatives false: every other item of the batch is drawn alike."""
    seen = []
    original = blip.mine_hard_negatives
    def mine(sim, *rest):
        seen.append(sim)
        return original(sim, *rest)
    for hard in (True, False):
        monkeypatch.setattr(blip, "mine_hard_negatives", mine)
        toy_model(hard_negatives=hard)(**toy_batch())
    assert all(sim.std() > 0 for sim in seen[:2]) and all((sim == 0).all() for sim in seen[2:])
    assert torch.equal(seen[2], torch.zeros(4, 4))


def test_a_claim_about_a_cell_that_is_not_there_is_told_at_once():
    with pytest.raises(ValueError, match="names a cell that is none of 'a', 'b'"):
        Experiment("Mine", {"a": str, "b": str}, claims=(("a", "c"),))


def test_settings_for_all_cells_go_where_they_are_read(tmp_path):
    """`--losses "--alpha 0.2"`: pretrain-clip has no alpha."""
    taken = []
    shared = {"alpha": 0.2, "lr": 0.1}
    regime = ablate.Regime(str(tmp_path), WorldSets(24, 16, 0.5, 10), 32, {}, {}, shared)
    cache = ablate.ExperimentCache(regime, 0)
    cache.train = lambda kind, given, *more: taken.append(given)
    cache.clean()
    cache.clean(task="pretrain-clip")
    assert taken[0]["alpha"] == 0.2 and "alpha" not in taken[1] and taken[1]["lr"] == 0.1
