"""Pretraining: ITC + ITM + LM on image-text pairs (BLIP sec. 3.2, 4.1).

It is judged as retrieval and captioning are, and in the world by captions with one attribute
swapped.
"""

import torch
from torch.utils.data import Dataset

from blip import BLIP
from data.datasets import caption_collate
from reports.metrics import mean
from tasks import captioning, retrieval
from tasks.task import (
    OF_BLIP,
    OWN_WORDS,
    TINY,
    EvalSettings,
    Evaluation,
    Task,
    TrainedModel,
    collate_pairs,
    evaluation_batches,
    open_pairs,
)
from training import distributed
from world.datasets import World
from world.language import describe
from world.scenes import ATTRIBUTES, swap


@torch.no_grad()
def swap_preference(trained: TrainedModel, world: World) -> dict[str, float]:
    """For each attribute, how often ITM prefers the true caption to one with it swapped.

    Both captions are worded the same. Chance is one half.
    """
    model, tokenizer = trained.model.eval(), trained.tokenizer
    wins = []
    for batch in evaluation_batches(world, caption_collate(tokenizer, trained.max_words,
                                                             trained.max_tokens),
                                    trained, "swaps"):
        texts = []
        for index in batch["index"]:
            scene = world.scene(index)
            versions = [scene] + [swap(scene, attribute, world.rng(index, attribute))
                                  for attribute in ATTRIBUTES]
            texts += [describe(version, world.rng(index, "swap")) for version in versions]
        ids, mask = tokenizer.encode(texts, trained.max_tokens)
        kv = model.project(model.encode_image(batch["image"])[0])
        logits = model.match(kv, ids.to(trained.device), mask.to(trained.device)).float().cpu()
        margin = (logits[:, 1] - logits[:, 0]).view(-1, len(versions))
        wins += (margin[:, :1] > margin[:, 1:]).tolist()
    wins = distributed.gather(wins)
    return {attribute: mean(row[number] for row in wins)
            for number, attribute in enumerate(ATTRIBUTES)}


def evaluate(trained: TrainedModel, dataset: Dataset, settings: EvalSettings) -> Evaluation:
    """Retrieval, captions and, in the world, swaps (itm_swap, itm_swap_by)."""
    searched = retrieval.evaluate(trained, dataset, settings)
    captioned = captioning.evaluate(trained, dataset, settings)
    numbers = captioned.numbers | searched.numbers
    if isinstance(dataset, World):
        swaps = swap_preference(trained, dataset)
        numbers |= {"itm_swap_by": swaps, "itm_swap": mean(swaps.values())}
        numbers["chance"]["itm_swap"] = 0.5
    # What tells most stands first: captions right and wrong, two searches.
    sections = [captioned.sections[0], *searched.sections[:1], *captioned.sections[1:],
                *searched.sections[1:]]
    return Evaluation(numbers, sections)


FOUND_IMAGE = "paper, among 5,000 of COCO, finetuned and re-ranked: 64.3"
FOUND_TEXT = "paper: 81.9"
TASK = Task(
    "pretrain", "all three objectives on image-text pairs", BLIP, open_pairs, collate_pairs,
    evaluate, inputs=captioning.inputs, reads=(*OF_BLIP, "equal_texts"), start_is_needed=False,
    holds_splits=True, reranks=True,
    large=dict(lr=2e-4, batch_size=2400),  # BLIP sec. 4.1
    # 1,300 steps, of which alpha ramps up over 0.077 x 1,300 = 100.
    tiny=dict(TINY, epochs=1, scenes=41600, lr=1.2e-3, alpha_epochs=0.077, lm_only_steps=260,
              vocab_pieces=4000),
    tiny_own=dict(min_steps=1600, new_pieces=OWN_WORDS, crop_min=0.5, equal_texts=True),
    highlights=(
        (("t2i_true1", "% of texts find a picture first of which they are true (ITC)", FOUND_IMAGE),
         ("t2i_r1", "% of texts find their own picture first (ITC)", FOUND_IMAGE)),
        (("i2t_true1", "% of pictures find a text first that is true of them (ITC)", FOUND_TEXT),
         ("i2t_r1", "% of pictures find a text of their own first (ITC)", FOUND_TEXT)),
        (("t2i_r1_rerank", "% of texts find their own picture first when ITM has looked at the "
          "best", ""),),
        (("itm_swap", "% of true captions are preferred by ITM to one with a word swapped", ""),),
        (("caption_true", "% of generated captions have every fact right and none left out",
          "paper, on COCO: CIDEr 133.3"),
         ("cider", "CIDEr of generated captions", "paper, on COCO, finetuned: 133.3"))))
