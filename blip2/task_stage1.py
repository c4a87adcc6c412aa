"""The tasks `blip2-stage1` and `blip2-retrieval`: image and text by way of the queries.

They are judged as BLIP's pretraining is: retrieval by ITC and re-ranked by ITM, captions by the
Q-Former's own text stream, in the world also swaps.
"""

from dataclasses import replace

from blip2.config import Blip2Config
from blip2.stage1 import Stage1
from config import TrainConfig
from data.text import Tokenizer
from tasks import pretraining, retrieval
from tasks.task import FINETUNE, LOSSES, OWN_WORDS, TINY, Task, collate_pairs, open_pairs

# What stage 1 and stage 2 are like with each preset. The image encoder's sizes come from --init: it
# is this project's pretrained ViT. (EVA's and CLIP's are for use from Python: blip2/README.md.)
SIZES = {
    "base": {},  # a Q-Former of BERT-base's size, as the paper's
    "large": {},
    "tiny": dict(vision="vit", queries=32, width=128, depth=3, heads=4, ffn=512, max_positions=64,
                 look_every=1, dropout=0.0, init_std=0.0, embed_dim=64, itg_smoothing=0.0),
}
# Blocks of a ViT that keeps its last one (what that is worth: results/blip2_tried.md).
SMALL = 4
# BLIP-2 sec. 3.4: AdamW (0.9, 0.98), cosine to 5e-5 (stage 2), warm-up of 2,000 steps. The paper
# counts 250,000 steps of stage 1 and 80,000 of stage 2; the released settings 10 epochs.
RECIPE = dict(schedule="cosine", lr=1e-4, beta2=0.98, warmup_steps=2000, batch_size=1680,
              crop_min=0.5, rand_augment=False, max_words=50, max_tokens=32)
READ = (*LOSSES, "hard_negatives", "label_smoothing", "itg_smoothing")
# BLIP-2 Tables 7 to 9. NOTE(differs from salesforce/LAVIS): the same learning rate in all of the
# image encoder's layers; the layer decay of the paper has no effect in the released code either.
FINETUNED = FINETUNE | dict(lr=1e-5, epochs=5, warmup_steps=1000, rand_augment=False)
FOUND = "paper, ViT-g, finetuned on COCO, ITM re-ranks: "  # BLIP-2 Table 5


def complete(config: Blip2Config, tokenizer: Tokenizer) -> Blip2Config:
    """The configuration with what the tokenizer decides."""
    return replace(config, **tokenizer_fields(tokenizer))


def tokenizer_fields(tokenizer: Tokenizer) -> dict:
    """The fields of Blip2Config that a tokenizer decides."""
    fields = tokenizer.config()
    del fields["enc_id"]  # the Q-Former has no [ENC]
    return fields


def vision_of(start: dict, recipe: dict) -> dict:
    """A start's model configuration -> fields of Blip2Config.

    Of a BLIP: its ViT without the last block (BLIP-2 sec. 3.4), but a small ViT keeps it. Of a
    BLIP-2: all.
    """
    if "queries" in start:
        return start
    depth = start["vit_depth"]
    return dict(vision="vit", image_size=start["image_size"], patch_size=start["patch_size"],
                vit_width=start["vit_width"], vit_depth=depth if depth <= SMALL else depth - 1,
                vit_heads=start["vit_heads"], vit_ffn=4 * start["vit_width"])


def trained_vision(start: dict, recipe: dict) -> dict:
    """As `vision_of`; the image encoder is trained (BLIP-2 sec. 4.2 to 4.4)."""
    return vision_of(start, recipe) | dict(train_vision=True)


def inputs(config: TrainConfig, tokenizer: Tokenizer, alpha: float) -> dict:
    """Arguments of Stage1.forward, without the batch's tensors: [DEC] gives no loss."""
    return {"prompt_length": 1}


TASKS = (
    Task("blip2-stage1", "BLIP-2: queries learn to extract what a text needs", Stage1, open_pairs,
         collate_pairs, pretraining.evaluate, inputs=inputs, reads=(*READ, "equal_texts"),
         config=Blip2Config, sizes=SIZES, starts_from=("pretrain",), from_start=vision_of,
         complete=complete, holds_splits=True, reranks=True,
         settings=dict(RECIPE, out="runs/blip2-stage1", epochs=10, min_lr=1e-5),  # (released code)
         tiny=dict(TINY, epochs=1, scenes=32000, lr=2e-3, min_lr=1e-6, itm_from=350),
         tiny_own=dict(min_steps=1000, crop_min=0.5, equal_texts=True, new_pieces=OWN_WORDS),
         highlights=(
             (("t2i_r1", "% of texts find their own picture first (ITC)", ""),),
             (("i2t_r1", "% of pictures find a text of their own first (ITC)", ""),),
             (("t2i_r1_rerank", "% of texts find their own picture first when ITM has looked at "
               "the best", f"{FOUND}68.3"),),
             (("i2t_r1_rerank", "% of pictures find a text of their own first, the same",
               f"{FOUND}85.4"),),
             (("itm_swap", "% of true captions are preferred by ITM to one with a word swapped",
               ""),),
             (("caption_true", "% of captions by ITG have every fact right and none left out", ""),
              ("cider", "CIDEr of captions by ITG", "")))),
    Task("blip2-retrieval", "BLIP-2: find images by text, finetuned", Stage1, open_pairs,
         retrieval.collate, retrieval.evaluate, retrieval.score, inputs, reads=READ,
         config=Blip2Config, sizes=SIZES, starts_from=("blip2-stage1",), from_start=trained_vision,
         complete=complete, needs=("itc", "itm"), holds_splits=True, reranks=True,
         settings=dict(FINETUNED, out="runs/blip2-retrieval", batch_size=224, max_tokens=35,
                       eval_top_k=128),  # BLIP-2 Table 9
         tiny=dict(TINY, epochs=2, scenes=6400, lr=5e-4), tiny_own=dict(min_steps=400),
         model_settings=dict(image_size=364)),
)
BENCHMARKS = (
    TASKS[1].benchmark("blip2-retrieval", "BLIP-2: recall by ITC and after ITM's re-ranking",
                       needs=("itc", "itm"), flags=("top_k", "rerank_score")),)
