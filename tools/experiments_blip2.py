"""The second paper's findings as experiments for `ablate.py` (BLIP-2, arXiv 2301.12597).

Image encoder: the ViT of `python train.py`. Language model: that of `train.py language-model`. All
cells of an experiment get the same number of steps, unless their names say otherwise. They are
judged by their own trainings' evaluation on held-out scenes.
"""

from tools.experiments import Cell, Experiment
from tools.experiments_claims import asked_about_pictures, on_clean
from tools.judge import MEASURES

RETRIEVAL = {name: MEASURES[name] for name in ("t2i_r1", "i2t_r1", "t2i_r1_rerank",
                                               "i2t_r1_rerank")}
STAGE1 = RETRIEVAL | {"caption_true": "captions wholly true (ITG)"}
STAGE2 = {"caption_true": "captions wholly true", "accuracy": "questions answered, zero-shot",
          "dialog_accuracy": "the same, behind three others"}
STEPS = (300, 2000)  # of stage 2, for Figure 5; 2,000 are the tiny preset's
BATCH = 16  # of the tiny preset of stage 2
BLIP_SCENES = 41600  # of `python train.py`
QUESTIONS = 16000  # BLIP-2 is finetuned on so many in the minutes in which BLIP is on its 128,000


def stage1(cache, **given) -> str:
    """Stage 1 on the ViT of `python train.py`."""
    return cache.clean(task="blip2-stage1", init=cache.clean(), **given)


def stage2(cache, init: str, kind: str = "decoder", language_given: dict | None = None,
           **given) -> str:
    """Stage 2 from `init` in front of a language model.

    Each seed has a decoder of its own, but one encoder-decoder serves all: it takes long to train.
    """
    of = cache if kind == "decoder" else cache.with_seed(0)
    model = of.clean(task="language-model", kind=kind, **(language_given or {}))
    return cache.clean(task="blip2-stage2", init=init, language_model=model, **given)


def with_stage1(**given) -> Cell:
    """A cell of stage 2 that starts from stage 1."""
    return lambda cache: stage2(cache, stage1(cache), **given)


def without_stage1(**given) -> Cell:
    """A cell of stage 2 with a new Q-Former."""
    return lambda cache: stage2(cache, cache.clean(), **given)


def asked(cache) -> str:
    """A BLIP-2 of both stages, finetuned to answer questions."""
    first = stage1(cache)
    return cache.clean(task="blip2-vqa", init=stage2(cache, first), text_from=first,
                       scenes=QUESTIONS)


def figure5(kind: str) -> Experiment:
    """Stage 2 with and without stage 1, for short and long trainings."""
    cells, claims = {}, []
    for steps in STEPS:
        given = dict(kind=kind, scenes=steps * BATCH)
        paper, new, without = (f"{name}, {steps} steps" for name in (
            "with stage 1", "with stage 1, two layers new", "without"))
        cells |= {paper: with_stage1(new_layers=0, **given),
                  new: with_stage1(new_layers=2, **given), without: without_stage1(**given)}
        claims += [(paper, without), (new, without), (new, paper)]
    return Experiment(f"BLIP-2, Figure 5: stage 2 with and without stage 1 (language model: "
                      f"{kind})", cells, claims=tuple(claims), measures=STAGE2, evaluated=True)


SMALL_LANGUAGE = dict(width=64, heads=4, near_heads=2, ffn=256)
SMALL_VISION = dict(vit_width=64, vit_heads=2)

BLIP2_EXPERIMENTS = {
    "blip2-figure5": figure5("decoder"),
    "blip2-figure5-t5": figure5("encoder-decoder"),
    "blip2-table6": Experiment(
        "BLIP-2, Table 6: ITG helps retrieval (stage 1)",
        {"ITC + ITM": lambda cache: stage1(cache, lm_weight=0.0),
         "ITC + ITM + ITG": stage1},
        claims=(("ITC + ITM + ITG", "ITC + ITM"),), judged=tuple(RETRIEVAL), measures=STAGE1,
        evaluated=True),
    "blip2-sizes": Experiment(
        "BLIP-2, Table 2: a larger language model, a larger image encoder (stage 2)",
        {"small language model": without_stage1(language_given=SMALL_LANGUAGE),
         "small image encoder": lambda cache: stage2(cache, cache.clean(**SMALL_VISION)),
         "both large": without_stage1()},
        claims=(("both large", "small language model"), ("both large", "small image encoder")),
        measures=STAGE2, evaluated=True),
    "blip2-queries": Experiment(
        "BLIP-2: the number of queries (stage 2 alone; not in the paper)",
        {"8 queries": without_stage1(queries=8), "16 queries": without_stage1(queries=16),
         "32 queries": without_stage1()},
        claims=(("32 queries", "16 queries"), ("16 queries", "8 queries")), measures=STAGE2,
        evaluated=True),
    "blip2-share": Experiment(
        "BLIP-2: what a small trained share of the parameters reaches (stage 2 alone)",
        {"1 layer": without_stage1(depth=1, new_layers=1),
         "2 layers": without_stage1(depth=2), "3 layers": without_stage1()},
        claims=(("3 layers", "2 layers"), ("2 layers", "1 layer")), judged=tuple(STAGE2),
        measures=STAGE2 | {"trained_share": "parameters trained, of all"}, evaluated=True),
    # A BLIP-2's minutes begin with those of the BLIP whose ViT it takes: with stage 1 they are two
    # to three times a BLIP's, with stage 2 alone up to twice. The language model is not counted: it
    # is there already, as in the paper.
    "blip2-blip": Experiment(
        "BLIP against BLIP-2 in equal time (not in the paper)",
        {"BLIP": on_clean(), "BLIP, twice as long": on_clean(scenes=2 * BLIP_SCENES),
         "BLIP-2, stage 2": without_stage1(),
         "BLIP, three times as long": on_clean(scenes=3 * BLIP_SCENES),
         "BLIP-2, stage 1": stage1, "BLIP, questions": asked_about_pictures(on_clean()),
         "BLIP-2, questions": asked},
        claims=(("BLIP, twice as long", "BLIP-2, stage 2"),
                ("BLIP, twice as long", "BLIP-2, stage 1"),
                ("BLIP, three times as long", "BLIP-2, stage 1"),
                ("BLIP, questions", "BLIP-2, questions")),
        measures=STAGE1 | {"accuracy": "questions answered"}, evaluated=True),
}
