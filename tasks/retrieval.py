"""Image-text retrieval: ITC ranks everything, ITM looks at the best candidates (BLIP sec. 5.1).

    encode     a data set -> Gallery: features of all images and texts, tokens of none
    rerank     what ITC and ITM say together of the top k, in blocks
    evaluate   R@1, 5, 10, median and mean rank, both ways, by ITC and re-ranked

The work is shared out over processes in the same batches and blocks as in one, so the numbers are
the same. What is held does not grow with images x tokens: 5,000 images x 25,000 texts at base size
and 384 px need 6 GB of host memory (similarities, matched logits and two results of 0.5 GB each,
the weights) and less than 4 GB on the device (keys and values of 16 images, 512 texts).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blip import BLIP
from config import BLIPConfig, TrainConfig
from data.datasets import Collate, caption_collate
from data.images import prepare_images
from data.text import Tokenizer, clean_caption
from reports.metrics import mean, rank_statistics, ranks, recall, recall_chance
from reports.sheets import (
    BLACK,
    GREEN,
    GREY,
    RED,
    Cell,
    Row,
    Sections,
    pick_examples,
    pictures_of,
)
from tasks.task import (
    FINETUNE,
    OF_BLIP,
    OWN_WORDS,
    TINY,
    EvalSettings,
    Evaluation,
    Task,
    TrainedModel,
    evaluation_batches,
    open_pairs,
    require_readable,
    shared_batches,
    subsets_of,
)
from training import distributed
from world.datasets import World
from world.language import is_true

IMAGES = 16  # images whose keys and values are held at a time while re-ranking
REPEATED = 0.1  # share of texts from which on the evaluation says so
TEXTS = 512  # texts that look at them at a time


# ---- all images and texts, encoded ---------------------------------------------------------------

@dataclass
class Gallery:
    """A data set, encoded: I images, T texts. image_of[t] is the image that text t belongs to."""

    dataset: Dataset  # where the images come from, for encoding again and for the sheets
    index: list[int]  # of each image in it
    texts: list[str]
    image_of: Tensor  # (T,)
    ids: Tensor  # (T, L)
    mask: Tensor  # (T, L)
    image_feat: Tensor  # (I, E), of BLIP-2 (I, Q, E)
    text_feat: Tensor  # (T, E)
    broken: list[str]

    def images(self, rows: list[int]) -> Tensor:
        """-> (len(rows), 3, S, S) uint8."""
        return torch.stack([self.dataset[self.index[row]]["image"] for row in rows])

    def positives(self) -> Tensor:
        """(T, I): which image each text belongs to."""
        return self.image_of[:, None] == torch.arange(len(self.index))

    def sim(self) -> Tensor:
        """(T, I): ITC similarity; where an image has several features (BLIP-2), of the best.

        As blip2.losses.query_similarity has it in training.
        """
        if self.image_feat.ndim == 2:
            return self.text_feat @ self.image_feat.T
        of_each = (self.text_feat @ feat.T for feat in self.image_feat.unbind(1))
        return functools.reduce(torch.maximum, of_each)


@torch.no_grad()
def encode(trained: TrainedModel, dataset: Dataset) -> Gallery:
    """Image and text features of all items; unreadable images are left out.

    Raises InputError where no image can be read.
    """
    model, tokenizer, device = trained.model.eval(), trained.tokenizer, trained.device
    encoded, broken = [], []  # of each batch: indices, captions, features (B, E)
    collate = caption_collate(tokenizer, trained.max_words, trained.max_tokens)
    for batch in evaluation_batches(dataset, collate, trained, "images", broken):
        image_feat = model.encode_image(batch["image"])[1].cpu()
        captions = [example.captions for example in batch["examples"]]
        encoded.append((batch["index"], captions, image_feat))
    encoded, broken = distributed.gather(encoded), distributed.gather(broken)
    require_readable(encoded, dataset, broken)
    encoded.sort(key=lambda batch: batch[0][0])
    index = [number for numbers, _, _ in encoded for number in numbers]
    captions = [of_image for _, of_batch, _ in encoded for of_image in of_batch]
    texts = [text for of_image in captions for text in of_image]
    counts = torch.tensor([len(of_image) for of_image in captions])
    ids, mask = tokenizer.encode([clean_caption(text, trained.max_words) for text in texts],
                                 trained.max_tokens)
    text_feat = []
    for rows in distributed.progress(shared_batches(len(texts)), "texts"):
        some_ids, some_mask = crop_padding(ids[rows], mask[rows])
        feat = model.encode_text(some_ids.to(device), some_mask.to(device))
        text_feat.append((rows[0], feat.cpu()))
    text_feat = sorted(distributed.gather(text_feat), key=lambda batch: batch[0])
    return Gallery(dataset, index, texts, torch.arange(len(index)).repeat_interleave(counts), ids,
                   mask, torch.cat([feat for _, _, feat in encoded]),
                   torch.cat([feat for _, feat in text_feat]), broken)


def crop_padding(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(T, L) -> (T, longest), without the columns in which every text is padding."""
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


@torch.no_grad()
def rerank(model: BLIP, gallery: Gallery, top_k: int, device: torch.device,
           score: str = "released", images: int = IMAGES,
           texts: int = TEXTS) -> tuple[Tensor, Tensor]:
    """What ITC and ITM say together of the top k of each row (`combined_score`).

    -> t2i scores (T, I), i2t scores (I, T). What is not among the top k of a row comes behind them,
    in ITC's order. Grouped by image: each is encoded
    and projected once, for all texts that are to be compared with it in either direction. `images`
    are held at a time, and `texts` look at them at a time.
    """
    model.eval()
    sim = gallery.sim()
    for_text, for_image = torch.zeros_like(sim).bool(), torch.zeros_like(sim).bool()
    for_text.scatter_(1, sim.topk(min(top_k, sim.shape[1]), dim=1).indices, True)
    for_image.scatter_(0, sim.topk(min(top_k, sim.shape[0]), dim=0).indices, True)
    needed = for_text | for_image
    counts = needed.sum(0)  # texts that look at each image
    # Images with about as many texts side by side, so that little is padded.
    order = counts.argsort(descending=True, stable=True)
    blocks, scored = distributed.own_part(order.split(images)), []
    total = sum(int(counts[block].sum()) for block in blocks)
    with distributed.progress(about="re-ranking", unit="pair", total=total) as bar:
        for block in blocks:
            tokens, _ = model.encode_image(prepare_images(gallery.images(block.tolist()), device))
            kv = model.project(tokens)
            for part in texts_of(needed, block).split(max(1, texts // len(block)), dim=1):
                chosen = part.flatten()
                ids, mask = crop_padding(gallery.ids[chosen], gallery.mask[chosen])
                logits = model.match(kv, ids.to(device), mask.to(device)).float().cpu()
                # Copies: a view would be sent to the other ranks with the whole of what it views.
                scored.append((part.clone(), block.clone(), logits.view(*part.shape, 2)))
            bar.update(int(counts[block].sum()))
    both = torch.zeros_like(sim)
    for part, block, logits in distributed.gather(scored):
        rows, columns = part, block[:, None].expand_as(part)
        both[rows, columns] = combined_score(sim[rows, columns], logits, model.temp.item(), score)
    rest = sim + both[needed].min() - 3  # behind every candidate: similarities differ by 2 at most
    return torch.where(for_text, both, rest), torch.where(for_image, both, rest).T


def combined_score(cosine: Tensor, logits: Tensor, temp: float, score: str) -> Tensor:
    """What ITC and ITM say together of pairs: cosine (...), ITM logits (..., 2) -> (...).

    "released": cosine + matched logit (released code; BLIP sec. 5.1). A cosine's range is small
    beside a logit's: ITC is nearly lost. "posterior": cosine / temperature + log-odds of a match,
    the log of ITC's probability times ITM's odds.
    NOTE(differs from salesforce/BLIP): the tiny preset takes "posterior"; released weights and the
    presets base and large keep "released".
    """
    if score == "posterior":
        return cosine / temp + logits[..., 1] - logits[..., 0]
    return cosine + logits[..., 1]


def texts_of(needed: Tensor, block: Tensor) -> Tensor:
    """For each image of a block the texts that look at it: (images, most texts of one).

    needed (T, I). A shorter row repeats its last text.
    """
    rows = [needed[:, image].nonzero().flatten() for image in block]
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])


# ---- evaluation ----------------------------------------------------------------------------------

def evaluate(trained: TrainedModel, dataset: Dataset, settings: EvalSettings) -> Evaluation:
    """t2i_r1, i2t_r1 ... as fractions, median and mean rank, by ITC and with suffix _rerank.

    "chance" holds what a random order would give. In the world also t2i_true1 and i2t_true1: the
    item found first is true, whoever it was written for. Of a data set with subsets also
    t2i_NAME_r1, of the texts of each subset.
    """
    top_k = trained.settings["eval_top_k"] if settings.top_k is None else settings.top_k
    gallery = encode(trained, dataset)
    scores = {"": (gallery.sim(), gallery.sim().T)}
    repeated = 1 - len(set(gallery.texts)) / len(gallery.texts)
    if repeated > REPEATED and not isinstance(dataset, World):
        distributed.print0(f"{repeated:.0%} of the texts repeat another one; R@k counts a text as "
                           "right for its own image alone")
    if top_k > len(gallery.index):
        distributed.print0(f"there are {len(gallery.index)} images: ITM re-ranks them all")
    if top_k:
        how = settings.rerank_score or trained.settings["rerank_score"]
        scores["_rerank"] = rerank(trained.model, gallery, top_k, trained.device, how)
    numbers, positives = {}, gallery.positives()
    for suffix, (t2i, i2t) in scores.items():
        t2i_ranks, i2t_ranks = ranks(t2i, positives), ranks(i2t, positives.T)
        of_suffix = (recall(t2i_ranks, "t2i") | rank_statistics(t2i_ranks, "t2i")
                     | recall(i2t_ranks, "i2t") | rank_statistics(i2t_ranks, "i2t"))
        for name, indices in subsets_of(dataset).items():
            inside = torch.isin(torch.tensor(gallery.index), torch.tensor(indices))
            of_subset = t2i_ranks[inside[gallery.image_of]]
            of_suffix[f"t2i_{name}_r1"] = (of_subset == 0).float().mean().item()
        numbers |= {name + suffix: value for name, value in of_suffix.items()}
    images, texts = len(gallery.index), len(gallery.texts)
    chance = (recall_chance(images, 1, "t2i")
              | recall_chance(texts, round(texts / images), "i2t"))
    chance |= {f"t2i_{name}_r1": chance["t2i_r1"] for name in subsets_of(dataset)}
    is_right = truth_in(gallery)
    if isinstance(dataset, World):
        for suffix, (t2i, i2t) in scores.items():
            best_image, best_text = t2i.argmax(1), i2t.argmax(1)
            numbers[f"t2i_true1{suffix}"] = mean(is_right(t, i) for t, i in enumerate(best_image))
            numbers[f"i2t_true1{suffix}"] = mean(is_right(t, i) for i, t in enumerate(best_text))
        chance |= dict.fromkeys(("t2i_true1", "i2t_true1"), chance_of_truth(dataset))
    numbers |= {"chance": chance, "images": images, "texts": texts, "top_k": top_k,
                "broken": len(gallery.broken)}
    return Evaluation(numbers, sections(gallery, *scores["_rerank" if top_k else ""], is_right))


def truth_in(gallery: Gallery) -> Callable[[int, int], bool]:
    """The test whether text t is right for image i: true in the world, else its own."""
    if isinstance(gallery.dataset, World):
        scenes = [gallery.dataset.scene(i) for i in range(len(gallery.dataset))]
        return lambda t, i: is_true(gallery.texts[t], scenes[i])
    return lambda t, i: bool(gallery.image_of[t] == i)


def chance_of_truth(world: World) -> float:
    """How often a text is true of a picture of the gallery that is drawn at random.

    Its own picture is one of the N; of the others a sample is looked at.
    """
    count = len(world)
    scenes = [world.scene(i) for i in range(count)]
    texts = [world.example(i).captions[0] for i in range(count)]
    of_another = mean(is_true(texts[i], scenes[i - shift])
                      for shift in range(1, min(20, count)) for i in range(shift, count))
    return 1 / count + (1 - 1 / count) * of_another


def sections(gallery: Gallery, t2i: Tensor, i2t: Tensor,
             is_right: Callable[[int, int], bool]) -> Sections:
    """The five best images of some texts, the three best texts of some images.

    First two searches, one that succeeds and one that fails; then the texts whose own image stands
    out best and worst, and random ones.
    """
    def search(t: int) -> Row:
        row = [Cell(None, [(gallery.texts[t], BLACK)])]
        best = t2i[t].topk(min(5, t2i.shape[1]))
        for i, score in zip(best.indices.tolist(), best.values.tolist()):
            row.append(Cell(pictures_of(gallery.dataset, gallery.index[i]),
                            [(f"{score:.2f}", GREY)], GREEN if is_right(t, i) else RED))
        return row

    positives = gallery.positives()
    own = t2i.masked_fill(~positives, float("-inf")).amax(1)
    best_other = t2i.masked_fill(positives, float("-inf")).amax(1)
    margins = pick_examples((own - best_other).tolist(), 4)
    result = [("images found for a text: the text, then the best five (green: right)",
               [search(t) for t in (margins["random"][0], margins["worst"][0])])]
    for title, chosen in margins.items():
        result.append((f"images found for a text, {title} (score below; green: right)",
                       [search(t) for t in chosen]))
    cells = []
    for i in pick_examples([0.0] * len(i2t), 8)["random"]:
        best_texts = i2t[i].topk(min(3, i2t.shape[1])).indices.tolist()
        lines = [(gallery.texts[t], GREEN if is_right(t, i) else RED) for t in best_texts]
        cells.append(Cell(pictures_of(gallery.dataset, gallery.index[i]), lines))
    return [*result, ("texts found for an image, random", [cells])]


def score(numbers: dict) -> float:
    """By what the best epoch is chosen: the mean of the six recalls, re-ranked if they are."""
    suffix = "_rerank" if numbers["top_k"] else ""
    return mean(numbers[f"{way}_r{k}{suffix}"] for way in ("t2i", "i2t") for k in (1, 5, 10))


def collate(tokenizer: Tokenizer, config: TrainConfig, model_config: BLIPConfig) -> Collate:
    """Batches of pairs that tell which texts share an image."""
    return caption_collate(tokenizer, config.max_words, config.max_tokens, image_ids=True)


def inputs(config: TrainConfig, tokenizer: Tokenizer, alpha: float) -> dict:
    """Arguments of BLIP.forward, without the batch's tensors."""
    return {"alpha": alpha, "finetuning": True, "all_negatives": config.all_negatives}


TASK = Task(
    "retrieval", "find images by text and texts by image", BLIP, open_pairs, collate, evaluate,
    score, inputs, needs=("itc", "itm"), reads=(*OF_BLIP, "all_negatives"),
    holds_splits=True, reranks=True,
    settings=dict(FINETUNE, out="runs/retrieval", lr=1e-5, epochs=6, max_tokens=35,
                  alpha_epochs=1.0, lm_weight=0.0, eval_top_k=128),  # k: Flickr; COCO 256
    large=dict(lr=5e-6), tiny=dict(TINY, epochs=2, scenes=6400, lr=5e-4),
    tiny_own=dict(min_steps=400, new_pieces=OWN_WORDS),
    model_settings=dict(image_size=384))
BENCHMARKS = (TASK.benchmark("retrieval", "recall by ITC and after ITM's re-ranking",
                             needs=("itc", "itm"), flags=("top_k", "rerank_score")),)
