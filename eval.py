"""Evaluation: what a model can do, with the level of chance beside each number.

    encode            features of a data set's images and texts
    retrieval         recall by ITC, and after ITM has re-ranked the top k
    caption           beam-search captions
    evaluate_world    all of it on held-out scenes of the built-in world, where every fact can be
                      checked
    evaluate_pairs    the same on photographs, without the truth

Each `evaluate_` function returns the numbers and writes a sheet of examples.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from blip import BLIP
from data import Collate, InputError, Tokenizer, normalise
from metrics import ranks, recall, recall_chance
from sheets import BLACK, GREEN, GREY, RED, Cell, draw_sheet
from world import ATTRIBUTES, World, describe, is_complete, is_true, swap

BATCH = 64  # images at a time: the tokens of so many are held, never those of all
BEHIND = 1e4  # puts what the re-ranking did not look at behind what it did


@dataclass
class Gallery:
    """A data set, encoded: I images, T texts. `image_of[t]` is the image that text t belongs to."""

    images: Tensor  # (I, 3, S, S) uint8, for encoding again and for the sheets
    texts: list[str]
    image_of: Tensor  # (T,)
    ids: Tensor  # (T, L)
    mask: Tensor  # (T, L)
    image_feat: Tensor  # (I, E)
    text_feat: Tensor  # (T, E)
    broken: list[str]

    def positives(self) -> Tensor:
        """(T, I): which image each text belongs to."""
        return self.image_of[:, None] == torch.arange(len(self.images))


@torch.no_grad()
def encode(model: BLIP, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
           max_tokens: int = 30) -> Gallery:
    """Image and text features of all items, each item's `texts` as texts. Unreadable images are
    left out."""
    model.eval()
    images, texts, image_of, image_feat, broken = [], [], [], [], []
    for batch in tqdm(DataLoader(dataset, BATCH, collate_fn=Collate(tokenizer, max_tokens)),
                      "images", leave=False):
        broken += batch["broken"]
        if batch["image"] is None:
            continue
        for number, captions in enumerate(batch["texts"], sum(map(len, images))):
            texts += captions
            image_of += [number] * len(captions)
        images.append(batch["image"])
        image_feat.append(model.encode_image(normalise(batch["image"].to(device)))[1].float().cpu())
    if not images:
        raise InputError(f"none of the {len(dataset)} images could be read; the first: {broken[0]}")
    ids, mask = tokenizer.encode(texts, max_tokens)
    text_feat = []
    for i in range(0, len(texts), BATCH):
        rows = crop_padding(ids[i:i + BATCH], mask[i:i + BATCH])
        text_feat.append(model.encode_text(*(x.to(device) for x in rows)).float().cpu())
    return Gallery(torch.cat(images), texts, torch.tensor(image_of), ids, mask,
                   torch.cat(image_feat), torch.cat(text_feat), broken)


def crop_padding(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(T, L) -> (T, longest), without the columns in which every text is padding."""
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


@torch.no_grad()
def rerank(model: BLIP, gallery: Gallery, top_k: int,
           device: torch.device) -> tuple[Tensor, Tensor]:
    """-> t2i scores (T, I) and i2t scores (I, T): ITC similarity plus, for the top k of each row,
    ITM's matched logit.

    Grouped by image: each is encoded and projected once, for all texts that are to be compared with
    it in either direction (released code's score; BLIP sec. 5.1).
    """
    model.eval()
    sim = gallery.text_feat @ gallery.image_feat.T  # (T, I)
    wanted_t2i, wanted_i2t = (torch.zeros_like(sim, dtype=torch.bool) for _ in range(2))
    wanted_t2i.scatter_(1, sim.topk(min(top_k, sim.shape[1]), dim=1).indices, True)
    wanted_i2t.scatter_(0, sim.topk(min(top_k, sim.shape[0]), dim=0).indices, True)
    matched = torch.zeros_like(sim)
    with tqdm(total=len(gallery.images), desc="re-ranking", leave=False) as bar:
        for start in range(0, len(gallery.images), BATCH):
            tokens = model.vit(normalise(gallery.images[start:start + BATCH].to(device)))
            for i in range(start, start + len(tokens)):
                texts = (wanted_t2i[:, i] | wanted_i2t[:, i]).nonzero().flatten()
                if len(texts):
                    ids, mask = crop_padding(gallery.ids[texts], gallery.mask[texts])
                    kv = model.med.project(tokens[i - start:i - start + 1])
                    matched[texts, i] = model.match(kv, ids.to(device),
                                                    mask.to(device))[:, 1].float().cpu()
                bar.update()
    return (torch.where(wanted_t2i, sim + matched, sim - BEHIND),
            torch.where(wanted_i2t, sim + matched, sim - BEHIND).T)


@torch.no_grad()
def caption(model: BLIP, tokenizer: Tokenizer, images: Tensor, device: torch.device,
            **options) -> list[str]:
    """images (I, 3, S, S) uint8 -> one caption each; options as for `BLIP.generate`."""
    model.eval()
    texts = []
    for start in tqdm(range(0, len(images), BATCH), "captions", leave=False):
        found = model.generate(normalise(images[start:start + BATCH].to(device)), **options)
        texts += [tokenizer.decode(hypotheses[0][0]) for hypotheses in found]
    return texts


def retrieval(model: BLIP, gallery: Gallery, top_k: int,
              device: torch.device) -> tuple[dict[str, float], dict[str, tuple[Tensor, Tensor]]]:
    """-> R@1, 5, 10 both ways as fractions under t2i_r1, i2t_r1, ..., and the scores (T, I), (I, T)
    that they come from under "" (ITC) and, unless top_k is 0, "_rerank", which is also the suffix
    of the names."""
    sim = gallery.text_feat @ gallery.image_feat.T
    scores, positives, numbers = {"": (sim, sim.T)}, gallery.positives(), {}
    if top_k:
        scores["_rerank"] = rerank(model, gallery, top_k, device)
    for suffix, (t2i, i2t) in scores.items():
        found = recall(ranks(t2i, positives), "t2i") | recall(ranks(i2t, positives.T), "i2t")
        numbers |= {name + suffix: value for name, value in found.items()}
    return numbers, scores


def retrieval_chance(gallery: Gallery) -> dict[str, float]:
    """What random orders would score."""
    images, texts = len(gallery.images), len(gallery.texts)
    return (recall_chance(texts, images, 1, "t2i")
            | recall_chance(images, texts, round(texts / images), "i2t"))


@torch.no_grad()
def swap_preference(model: BLIP, tokenizer: Tokenizer, world: World, images: Tensor,
                    device) -> dict[str, float]:
    """For each attribute, how often ITM finds the true caption of a held-out scene likelier than
    the same caption with that one attribute swapped. Chance is one half."""
    model.eval()
    wins = torch.zeros(len(ATTRIBUTES))
    for start in tqdm(range(0, len(images), BATCH), "swaps", leave=False):
        kv = model.med.project(model.vit(normalise(images[start:start + BATCH].to(device))))
        texts = []
        for i in range(start, min(start + BATCH, len(images))):
            scene = world.scene(i)
            versions = [scene] + [swap(scene, attribute, world.rng(i, attribute))
                                  for attribute in ATTRIBUTES]
            texts += [describe(version, world.rng(i, "swap")) for version in versions]
        logits = model.match(kv, *(x.to(device) for x in tokenizer.encode(texts))).float().cpu()
        margin = (logits[:, 1] - logits[:, 0]).view(-1, len(ATTRIBUTES) + 1)
        wins += (margin[:, :1] > margin[:, 1:]).sum(0)
    return dict(zip(ATTRIBUTES, (wins / len(images)).tolist()))


def evaluate_world(model: BLIP, tokenizer: Tokenizer, world: World, device: torch.device,
                   top_k: int = 16, sheet: Path | None = None, max_tokens: int = 30) -> dict:
    """Held-out scenes -> fractions: t2i_r1 i2t_r1 t2i_true1 i2t_true1 (and _rerank), itm_swap
    itm_swap_by, caption_true; "chance" holds what guessing would give under the same names.

    A retrieved item is true when the text holds of the scene, whoever it was written for. A caption
    counts as true when every fact that it states holds and it leaves none out.
    """
    gallery = encode(model, tokenizer, world, device, max_tokens)
    scenes = [world.scene(i) for i in range(len(world))]
    numbers, scores = retrieval(model, gallery, top_k, device)
    for suffix, (t2i, i2t) in scores.items():
        numbers["t2i_true1" + suffix] = mean(is_true(gallery.texts[t], scenes[i])
                                             for t, i in enumerate(t2i.argmax(1).tolist()))
        numbers["i2t_true1" + suffix] = mean(is_true(gallery.texts[t], scenes[i])
                                             for i, t in enumerate(i2t.argmax(1).tolist()))
    numbers["itm_swap_by"] = swap_preference(model, tokenizer, world, gallery.images, device)
    numbers["itm_swap"] = mean(numbers["itm_swap_by"].values())
    captions = caption(model, tokenizer, gallery.images, device, max_length=30)
    facts_hold = [is_true(text, scene) for text, scene in zip(captions, scenes)]
    whole = [holds and is_complete(text, scene)
             for holds, text, scene in zip(facts_hold, captions, scenes)]
    numbers |= {"caption_true": mean(whole), "caption_facts_hold": mean(facts_hold)}
    by_chance = mean(is_true(text, scene) for shift in range(1, min(20, len(scenes)))
                     for text, scene in zip(gallery.texts[shift:], scenes))
    chance = retrieval_chance(gallery) | {"itm_swap": 0.5}
    chance |= {name: by_chance for name in ("t2i_true1", "i2t_true1", "caption_true")}
    if sheet:
        write_sheet(sheet, gallery, captions, scores[""][0],
                    lambda t, i: is_true(gallery.texts[t], scenes[i]), whole)
    return numbers | {"chance": chance, "images": len(gallery.images), "top_k": top_k}


def evaluate_pairs(model: BLIP, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                   top_k: int = 16, sheet: Path | None = None, max_tokens: int = 30) -> dict:
    """Photographs with captions -> recall both ways by ITC and after re-ranking, as fractions;
    "chance" beside them."""
    gallery = encode(model, tokenizer, dataset, device, max_tokens)
    numbers, scores = retrieval(model, gallery, top_k, device)
    if sheet:
        shown = spread(len(gallery.images))
        captions = dict(zip(shown, caption(model, tokenizer, gallery.images[shown], device)))
        write_sheet(sheet, gallery, captions, scores[""][0],
                    lambda t, i: gallery.image_of[t].item() == i)
    return numbers | {"chance": retrieval_chance(gallery), "images": len(gallery.images),
                      "texts": len(gallery.texts), "top_k": top_k, "broken": len(gallery.broken)}


def mean(values) -> float:
    """Of numbers or truth values; 0 for none."""
    values = list(values)
    return sum(values) / max(len(values), 1)


def spread(count: int, shown: int = 16) -> list[int]:
    """Indices of up to `shown` random examples, the same ones every time."""
    return random.Random("examples").sample(range(count), min(shown, count))


def write_sheet(path: Path, gallery: Gallery, captions: list[str] | dict[int, str], t2i: Tensor,
                holds: Callable[[int, int], bool], whole: list[bool] | None = None) -> None:
    """Random images with the captions written for them, and for a few texts the five best
    images by ITC.

    holds(text, image) tells whether a retrieved image is right; `whole[i]` whether caption i is
    true, where that can be known (else a human caption stands under it).
    """
    cells, found = [], []
    for i in spread(len(gallery.images)):
        if whole is None:
            human = gallery.texts[(gallery.image_of == i).nonzero()[0].item()]
            lines = [(captions[i], BLACK), (human, GREY)]
        else:
            verdict, colour = ("true", GREEN) if whole[i] else ("FALSE", RED)
            lines = [(f"{verdict}: {captions[i]}", colour)]
        cells.append(Cell(gallery.images[i], lines))
    for t in spread(len(gallery.texts), 6):
        best = t2i[t].topk(min(5, t2i.shape[1]))
        row = [Cell(gallery.images[i], [(f"{score:.2f}", GREY)], GREEN if holds(t, i) else RED)
               for i, score in zip(best.indices.tolist(), best.values.tolist())]
        found.append([Cell(None, [(gallery.texts[t], BLACK)])] + row)
    about = "" if whole else " (grey: a human's)"
    draw_sheet(path, [
        (f"captions of held-out images{about}", [cells[i:i + 8] for i in range(0, len(cells), 8)]),
        ("images found for a text, best first, with ITC similarity (green: right)", found)])
