"""What the first paper claims without a table, as experiments for `ablate.py`.

Which loss does what, on clean and on noisy texts; whether CapFilt does more than momentum
distillation; where CapFilt begins to pay as the web gets noisier; larger web sets and models; how
other papers' losses do in the same trainer; and what the paper leaves to future work: several
rounds, captions, captioners and filters.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.experiments import Cell, Experiment, both, capfilt_set, on_set
from tools.judge import MEASURES
from world.web import WorldSets

# Setting a part aside: what a cell is called -> its settings of train.py.
PARTS = {"without ITC": dict(itc_weight=0.0), "without ITM": dict(itm_weight=0.0),
         "without LM": dict(lm_weight=0.0), "without momentum distillation": dict(alpha=0.0),
         "without queue": dict(queue_size=0), "without hard negatives": dict(hard_negatives=False),
         "without LM alone first": dict(lm_only_steps=0),
         "with label smoothing": dict(label_smoothing=0.1),
         "with the released initialisation": dict(init_std=0.02)}
NOISE = (0.0, 0.5, 0.8)  # share of web texts that are bad; 0.5 is that of the other tables
WEB = (1, 2, 4)  # times as many web images
LARGE = dict(vit_width=192, vit_heads=6, text_width=192, text_heads=6, text_ffn=768)


def on_clean(**given) -> Cell:
    """`python train.py` with these settings."""
    return lambda cache: cache.clean(**given)


def on_noisy(**given) -> Cell:
    """The same on the world's web texts, half of which are bad, and its human texts."""
    return lambda cache: cache.pretrain(cache.raw(), **given)


def parts(cell) -> dict[str, Cell]:
    """All parts, and each of PARTS set aside."""
    return {"all": cell()} | {name: cell(**given) for name, given in PARTS.items()}


def on_web(cell: Callable, **web) -> Callable:
    """A cell, or a set, in a world with another web set."""
    return lambda cache: cell(cache.with_world(**web))


def raw_and_capfilt(name: str, **web) -> dict[str, Cell]:
    """The raw texts of this web set, and its bootstrapped set."""
    return {f"raw, {name}": on_web(on_noisy(), **web), f"CapFilt, {name}": on_web(both, **web)}


def large_set(cache) -> Path:
    """The set of a large captioner and a large filter."""
    return cache.capfilt(init=cache.pretrain(cache.raw(), **LARGE))


def by_large(cache, **given) -> str:
    """A model on the set of a large captioner and a large filter."""
    return on_set(cache, large_set(cache), **given)


def on_capfilt(**given) -> Cell:
    """A model with these settings on the set of the base captioner and filter."""
    return lambda cache: on_set(cache, cache.capfilt(), **given)


def rounds_set(count: int) -> Callable[[Any], Path]:
    """The set of round `count`: captioner and filter start from the model of the round before."""
    def make_set(cache) -> Path:
        model = cache.pretrain(cache.raw())
        for _ in range(count - 1):
            model = on_set(cache, cache.capfilt(init=model))
        return cache.capfilt(init=model)
    return make_set


def captions_set(count: int, keep: str) -> Callable[[Any], Path]:
    """A set for which the captioner writes several texts an image."""
    return lambda cache: cache.capfilt({"captions": count, "keep": keep})


def ensemble_set(captioners: int, filters: int, agree: str = "mean") -> Callable[[Any], Path]:
    """A set of several captioners and filters: one model, finetuned with several seeds."""
    def models(cache, task: str, count: int) -> list[str]:
        more = [cache.finetune(task, seed=cache.seed + 1000 * n) for n in range(1, count)]
        return [cache.finetune(task), *more]
    return lambda cache: cache.bootstrap(models(cache, "caption", captioners),
                                         models(cache, "retrieval", filters), {"agree": agree})


def on_sets(sets: dict[str, Callable[[Any], Path]]) -> dict[str, Cell]:
    """A new model on each of these sets."""
    def cell(make_set) -> Cell:
        return lambda cache: on_set(cache, make_set(cache))
    return {name: cell(make_set) for name, make_set in sets.items()}


def asked_about_pictures(pretrained: Cell) -> Cell:
    """A model finetuned to answer questions, from what another cell pretrained."""
    return lambda cache: cache.clean(task="vqa", init=pretrained(cache))


PLAIN = "CapFilt"  # as the paper has it: one round, one caption, one captioner and one filter
ROUNDS = {PLAIN: capfilt_set, "2 rounds": rounds_set(2), "3 rounds": rounds_set(3)}
CAPTIONS = {PLAIN: capfilt_set} | {f"{count} captions, keep {keep}": captions_set(count, keep)
                                   for count in (2, 4, 8) for keep in ("all", "best", "sample")}
ENSEMBLES = {PLAIN: capfilt_set, "two captioners": ensemble_set(2, 1),
             "two filters, their mean": ensemble_set(1, 2),
             "two filters, both": ensemble_set(1, 2, "all"), "two of each": ensemble_set(2, 2)}

AGAINST_ALL = tuple(("all", name) for name in PARTS)
RECIPES = {"BLIP": on_clean(), **{name: on_clean(task=f"pretrain-{name.lower()}")
                                 for name in ("CLIP", "SigLIP", "ALBEF", "SimVLM")}}
AGAINST_BLIP = tuple(("BLIP", name) for name in RECIPES if name != "BLIP")
RECIPE_MEASURES = {name: words for name, words in MEASURES.items() if name != "itm_swap"}

CLAIM_EXPERIMENTS = {
    "losses": Experiment(
        "Each part of the objective and of the tiny recipe set aside, on clean texts (not in the "
        "paper)", parts(on_clean), claims=AGAINST_ALL),
    "losses-noisy": Experiment(
        "Each part set aside, on texts of which half of the web's are bad (not in the paper)",
        parts(on_noisy), claims=AGAINST_ALL),
    "distillation": Experiment(
        "CapFilt and momentum distillation, each against bad texts (not in the paper)",
        {"raw": on_noisy(alpha=0.0), "raw, distillation": on_noisy(),
         "CapFilt": on_capfilt(alpha=0.0), "CapFilt, distillation": both},
        claims=(("raw, distillation", "raw"), ("CapFilt", "raw, distillation"),
                ("CapFilt, distillation", "CapFilt"))),
    "noise": Experiment(
        "CapFilt as the web gets noisier (not in the paper)",
        {name: cell for noise in NOISE for name, cell in raw_and_capfilt(
            f"{noise:.0%} bad", world_noise=noise).items()},
        claims=tuple((f"CapFilt, {noise:.0%} bad", f"raw, {noise:.0%} bad") for noise in NOISE)),
    "web": Experiment(
        "A larger web set, for as many steps (Table 1's rows of 14M and 129M images)",
        {name: cell for times in WEB for name, cell in raw_and_capfilt(
            f"web x {times}", world_web=WorldSets.world_web * times).items()},
        claims=(("raw, web x 4", "raw, web x 1"), ("CapFilt, web x 4", "CapFilt, web x 1"),
                *((f"CapFilt, web x {times}", f"raw, web x {times}") for times in WEB)),
        sets={f"CapFilt, web x {times}": on_web(capfilt_set, world_web=WorldSets.world_web * times)
              for times in WEB}),
    "models": Experiment(
        "A larger captioner and filter, a larger model (Table 1's rows of ViT-B and ViT-L)",
        {"base": on_noisy(), "base, CapFilt by base": both, "base, CapFilt by large": by_large,
         "large": on_noisy(**LARGE), "large, CapFilt by base": on_capfilt(**LARGE),
         "large, CapFilt by large": lambda cache: by_large(cache, **LARGE)},
        claims=(("base, CapFilt by large", "base, CapFilt by base"), ("large", "base"),
                ("large, CapFilt by large", "large"),
                ("large, CapFilt by large", "base, CapFilt by large")),
        sets={"base, CapFilt by base": capfilt_set, "base, CapFilt by large": large_set}),
    "recipes": Experiment(
        "How other papers do it, in the same trainer on the same clean texts (not in the paper)",
        RECIPES, claims=AGAINST_BLIP, measures=RECIPE_MEASURES, evaluated=True),
    "recipes-vqa": Experiment(
        "How other papers do it, finetuned for questions (not in the paper)",
        {name: asked_about_pictures(pretrained) for name, pretrained in RECIPES.items()},
        claims=AGAINST_BLIP, measures={"accuracy": "questions answered"}, evaluated=True),
    # ---- the future work of section 7: nothing is published on it ----
    "rounds": Experiment(
        "CapFilt again, with the model that it gave (left to future work, sec. 7)",
        {"raw": on_noisy()} | on_sets(ROUNDS),
        claims=((PLAIN, "raw"), ("2 rounds", PLAIN), ("3 rounds", "2 rounds")), sets=ROUNDS),
    "captions": Experiment(
        "Several synthetic captions an image, for as many steps (left to future work, sec. 7)",
        on_sets(CAPTIONS), claims=tuple((name, PLAIN) for name in CAPTIONS if name != PLAIN),
        sets=CAPTIONS),
    "ensembles": Experiment(
        "Two captioners, two filters, for as many steps (left to future work, sec. 7)",
        on_sets(ENSEMBLES), claims=tuple((name, PLAIN) for name in ENSEMBLES if name != PLAIN),
        sets=ENSEMBLES),
}
