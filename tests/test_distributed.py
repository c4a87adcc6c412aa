"""Two processes on gloo against the same arithmetic in one process."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import toy_batch, toy_model

import distributed

WORLD, EACH = 2, 3


def rank_batch(rank: int) -> dict:
    """Rows of this rank, cropped to a length of its own, with an image id for each."""
    rows = slice(rank * EACH, (rank + 1) * EACH)
    batch = {name: x[rows] for name, x in toy_batch(WORLD * EACH, 9).items()}
    longest = (9, 6)[rank]
    batch["ids"], batch["mask"] = batch["ids"][:, :longest], batch["mask"][:, :longest]
    return batch | {"image_ids": torch.tensor([[5, 6, 7], [8, 5, 9]])[rank]}


def draw_first(weights: torch.Tensor, count: int) -> torch.Tensor:
    """In place of torch.multinomial: the first column that may be drawn."""
    return (weights > 0).float().argmax(1, keepdim=True)


def itm_gradient(rank: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    torch.multinomial = draw_first
    model = toy_model()
    model.set_objectives(("itm",))
    losses, _ = model(**rank_batch(rank), all_negatives=True)
    losses["itm"].backward()
    gradient = model.vit.patch_embed.weight.grad / WORLD
    dist.all_reduce(gradient)  # the mean over ranks, as DistributedDataParallel takes it
    if rank == 0:
        torch.save(gradient, out)
    distributed.finish()


def test_negatives_from_all_ranks_with_gradient_through_the_images(tmp_path):
    mp.spawn(itm_gradient, (29543, str(tmp_path / "g.pt")), WORLD)
    model, batches = toy_model(), [rank_batch(rank) for rank in range(WORLD)]
    image, image_ids = (torch.cat([b[name] for b in batches]) for name in ("image", "image_ids"))
    texts = [(b["ids"][i:i + 1], b["mask"][i:i + 1]) for b in batches for i in range(EACH)]
    kv = model.med.project(model.vit(image))
    def score(i, t):
        return model.match(kv.select(torch.tensor([i])), *texts[t])
    losses = []
    for rank in range(WORLD):
        logits, matched = [], []
        for own in range(rank * EACH, (rank + 1) * EACH):
            other = next(j for j in range(WORLD * EACH) if image_ids[j] != image_ids[own])
            logits += [score(own, own), score(own, other), score(other, own)]
            matched += [1, 0, 0]
        losses.append(torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(matched)))
    expected, = torch.autograd.grad(sum(losses) / WORLD, model.vit.patch_embed.weight)
    assert torch.allclose(torch.load(tmp_path / "g.pt"), expected, atol=1e-6)
