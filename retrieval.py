"""Retrieval: every text against every image by ITC, then ITM looks at the best candidates (BLIP
sec. 5.1).

    encode     a data set -> Gallery: features of all images and texts, tokens of none
    rerank     ITC similarity + ITM's matched logit for the top k, in blocks
    retrieval  R@1, 5, 10, median and mean rank, both ways, by ITC and re-ranked

The work is split over processes in the same batches and blocks as in one, so the numbers are the
same.

What is held does not grow with images x tokens. 5,000 images x 25,000 texts at base size and 384
px: similarities, matched logits and the two results 4 x 0.5 GB with as much again for a moment in
between, the weights 1.8 GB: 6 GB of host memory. On the device 16 images' keys and values in 12
layers (16 x 43 MB in float32) and 512 short texts' activations (0.5 GB): with the weights under 4
GB.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import distributed
from blip import BLIP
from data import Collate, InputError, Tokenizer, clean_caption, normalise
from metrics import rank_statistics, ranks, recall, recall_chance

BATCH = 64  # images or texts that are encoded at a time
IMAGES = 16  # images whose keys and values are held at a time while re-ranking
TEXTS = 512  # texts that look at them at a time
BEHIND = 1e3  # puts what the re-ranking did not look at behind what it did


@dataclass
class Gallery:
    """A data set, encoded: I images, T texts. `image_of[t]` is the image that text t belongs to."""

    dataset: Dataset  # where the images come from, for encoding again and for the sheets
    index: list[int]  # of each image in it
    texts: list[str]
    image_of: Tensor  # (T,)
    ids: Tensor  # (T, L)
    mask: Tensor  # (T, L)
    image_feat: Tensor  # (I, E)
    text_feat: Tensor  # (T, E)
    broken: list[str]

    def images(self, rows: list[int]) -> Tensor:
        """-> (len(rows), 3, S, S) uint8."""
        return torch.stack([self.dataset[self.index[i]]["image"] for i in rows])

    def positives(self) -> Tensor:
        """(T, I): which image each text belongs to."""
        return self.image_of[:, None] == torch.arange(len(self.index))

    def sim(self) -> Tensor:
        """(T, I): ITC similarity."""
        return self.text_feat @ self.image_feat.T


@torch.no_grad()
def encode(model: BLIP, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
           max_tokens: int = 30) -> Gallery:
    """Image and text features of all items, each item's `texts` as texts. Unreadable images are
    left out."""
    model.eval()
    found, broken = [], []
    loader = DataLoader(dataset, collate_fn=Collate(tokenizer, max_tokens),
                        batch_sampler=shared_batches(
                            len(dataset), max(1, BATCH // getattr(dataset, "frames", 1))))
    for batch in distributed.progress(loader, "images"):
        broken += batch["broken"]
        if batch["image"] is not None:
            feat = model.encode_image(normalise(batch["image"].to(device)))[1].cpu()
            found += zip(batch["index"], batch["texts"], feat)
    found, broken = distributed.gather(found), distributed.gather(broken)
    if not found:
        raise InputError(f"none of the {len(dataset)} images could be read; the first: {broken[0]}")
    found.sort(key=lambda item: item[0])
    index, captions, image_feat = zip(*found)
    texts = [text for known in captions for text in known]
    ids, mask = tokenizer.encode([clean_caption(text) for text in texts], max_tokens)
    text_feat = []
    for rows in distributed.progress(shared_batches(len(texts)), "texts"):
        some = (x.to(device) for x in crop_padding(ids[rows], mask[rows]))
        text_feat += zip(rows, model.encode_text(*some).cpu())
    text_feat = sorted(distributed.gather(text_feat), key=lambda item: item[0])
    image_of = torch.arange(len(index)).repeat_interleave(torch.tensor([*map(len, captions)]))
    return Gallery(dataset, list(index), texts, image_of, ids, mask, torch.stack(image_feat),
                   torch.stack([feat for _, feat in text_feat]), broken)


def shared_batches(count: int, batch: int = BATCH) -> list[list[int]]:
    """This rank's share of the batches of 0 ... count - 1, which are the same whatever the number
    of ranks."""
    return distributed.share([rows.tolist() for rows in torch.arange(count).split(batch)])


def crop_padding(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(T, L) -> (T, longest), without the columns in which every text is padding."""
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


@torch.no_grad()
def rerank(model: BLIP, gallery: Gallery, top_k: int, device: torch.device, images: int = IMAGES,
           texts: int = TEXTS) -> tuple[Tensor, Tensor]:
    """-> t2i scores (T, I) and i2t scores (I, T): ITC similarity plus, for the top k of each row,
    ITM's matched logit (released code's score; BLIP sec. 5.1).

    Grouped by image: each is encoded and projected once, for all texts that are to be compared with
    it in either direction. `images` are held at a time, and `texts` look at them at a time.
    """
    model.eval()
    sim = gallery.sim()
    for_text, for_image = (torch.zeros_like(sim, dtype=torch.bool) for _ in range(2))
    for_text.scatter_(1, sim.topk(min(top_k, sim.shape[1]), dim=1).indices, True)
    for_image.scatter_(0, sim.topk(min(top_k, sim.shape[0]), dim=0).indices, True)
    wanted, matched = for_text | for_image, torch.zeros_like(sim)
    counts = wanted.sum(0)
    # Images with about as many texts side by side, so that little is padded.
    order = counts.argsort(descending=True, stable=True)
    blocks, found = distributed.share(order.split(images)), []
    with distributed.progress(about="re-ranking", unit="pair",
                              total=sum(int(counts[block].sum()) for block in blocks)) as bar:
        for block in blocks:
            tokens, _ = model.encode_image(normalise(gallery.images(block.tolist()).to(device)))
            kv = model.med.project(tokens)
            rows = [wanted[:, i].nonzero().flatten() for i in block]
            longest = len(rows[0])
            # (images, longest): a shorter row repeats its last text
            table = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))])
                                 for row in rows])
            for part in table.split(max(1, texts // len(block)), dim=1):
                chosen = part.flatten()
                ids, mask = crop_padding(gallery.ids[chosen], gallery.mask[chosen])
                logits = model.match(kv, ids.to(device), mask.to(device))[:, 1].float().cpu()
                found.append((part, block, logits.view(part.shape)))
            bar.update(int(counts[block].sum()))
    for part, block, logits in distributed.gather(found):
        matched[part, block[:, None]] = logits
    return (torch.where(for_text, sim + matched, sim - BEHIND),
            torch.where(for_image, sim + matched, sim - BEHIND).T)


def retrieval(model: BLIP, gallery: Gallery, top_k: int,
              device: torch.device) -> tuple[dict[str, float], dict[str, tuple[Tensor, Tensor]]]:
    """-> R@1, 5, 10 both ways as fractions under t2i_r1, i2t_r1, ..., median and mean rank, and the
    scores (T, I), (I, T) that they come from under "" (ITC) and, unless top_k is 0, "_rerank",
    which is also the suffix of the names."""
    sim, positives, numbers = gallery.sim(), gallery.positives(), {}
    scores = {"": (sim, sim.T)}
    if top_k:
        scores["_rerank"] = rerank(model, gallery, top_k, device)
    for suffix, (t2i, i2t) in scores.items():
        for way, rank in (("t2i", ranks(t2i, positives)), ("i2t", ranks(i2t, positives.T))):
            found = recall(rank, way) | rank_statistics(rank, way)
            numbers |= {name + suffix: value for name, value in found.items()}
    return numbers, scores


def retrieval_chance(gallery: Gallery) -> dict[str, float]:
    """What random orders would score."""
    images, texts = len(gallery.index), len(gallery.texts)
    return (recall_chance(texts, images, 1, "t2i")
            | recall_chance(images, texts, round(texts / images), "i2t"))
