"""See what the losses see: one batch of a trained model, as pictures.

    python -m tools.look --checkpoint runs/pretrain/checkpoint.pt                    in the world
    python -m tools.look --checkpoint runs/pretrain/checkpoint.pt --noise 0.5        half bad texts
    python -m tools.look --checkpoint runs/mine/checkpoint.pt --data pairs.json      own pairs

    itc.png         similarities, hard labels, soft targets; which texts share the twins' mass
    negatives.png   the mined hard negatives and with what probability they are drawn
    itm.png         ITM's pairs and verdicts
    lm.png          the distribution of the next word, position by position
    masks.png       who may look at whom in the three modes of MED
    queue.png       how far the features in the queue are from today's (in the world alone)

Nothing is computed a second time here: the model's forward runs once, and what it hands to the
functions of losses.py is noted down (`calls_of`). A loss that you have changed is shown as it is.
"""

import argparse
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
import blip
import losses
import med
from config import TrainConfig, objectives_at
from data.datasets import caption_collate
from data.files import InputError, make_folder, read_tensors
from data.images import batch_to
from tasks.registry import TASKS
from tasks.task import Source, TrainedModel
from tools import look_draw
from training import devices
from training.checkpoints import open_model
from training.program import exit_status
from training.run import EpochBatches, open_datasets
from training.settings import FileFlag, at_least

ALPHAS = (0.0, 0.4)  # whose soft targets are shown; the paper's is 0.4
Call = tuple[dict, object]  # arguments by name, what was returned


@contextmanager
def calls_of(owner: object, name: str) -> Iterator[list[Call]]:
    """Within it, each call of the function `owner.name` is noted in the list."""
    original, calls = getattr(owner, name, None), []
    if original is None:
        raise InputError(f"{owner.__name__} has no {name} any more: look draws what it gets. Call "
                         "your function inside of it")
    signature = inspect.signature(original)

    def noted(*values, **named):
        result = original(*values, **named)
        calls.append((dict(signature.bind(*values, **named).arguments), result))
        return result
    setattr(owner, name, noted)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


@dataclass
class Seen:
    """What the losses saw of one batch. B pairs, C columns (batch, then queue), L tokens.

    images (B, 3, S, S) uint8; sim (B, C) between pictures and text keys, divided by temp;
    targets: alpha -> (B, C); text_weights and image_weights (B, B): in proportion to them a hard
    text (image) was drawn, text_neg and image_neg (B,) were; itm_logits (3B, 2) of own pairs, hard
    texts, hard images, of which `valid` (3B,) count; lm_logits (B, L - 1, V), lm_targets
    (B, L - 1); queue_texts: slot of the queue -> text, where it is known.
    """

    images: Tensor
    texts: list[str]
    ids: Tensor
    vocab: list[str]
    temp: float
    sim: Tensor
    targets: dict[float, Tensor]
    text_weights: Tensor
    image_weights: Tensor
    text_neg: Tensor
    image_neg: Tensor
    itm_logits: Tensor
    valid: Tensor
    lm_logits: Tensor
    lm_targets: Tensor
    queue_texts: dict[int, str] = field(default_factory=dict)


@torch.no_grad()
def see(trained: TrainedModel, batch: dict) -> Seen:
    """Run the model's forward once on a batch (of a collate) and note what its losses get."""
    model, moved, weights = trained.model.eval(), batch_to(batch, trained.device), []

    def draw(row_weights: Tensor) -> Tensor:
        weights.append(row_weights)
        return losses.draw_one(row_weights)
    own_draw, model.draw_negative = model.draw_negative, draw
    with ExitStack() as stack:
        itc, mined, itm, lm = (stack.enter_context(calls_of(blip, name)) for name in (
            "itc_loss", "mine_hard_negatives", "itm_loss", "lm_loss"))
        model(moved["image"], moved["ids"], moved["mask"], alpha=max(ALPHAS),
              image_ids=moved.get("image_ids"))
    model.draw_negative = own_draw
    if not (itc and len(mined) == 2 and itm and lm):
        raise InputError("look draws what itc_loss, mine_hard_negatives, itm_loss and lm_loss get; "
                         "this model does not call all of them by these names of blip.py")
    arguments, targets = itc[0][0], {}
    for alpha in ALPHAS:
        with calls_of(F, "cross_entropy") as calls:
            losses.itc_loss(**(arguments | {"alpha": alpha}))
        if not calls:
            raise InputError("itc_loss does not call F.cross_entropy, so its targets cannot be "
                             "shown; call it there, or draw them yourself")
        sim, targets[alpha] = calls[0][0]["input"].cpu(), calls[0][0]["target"].cpu()
    texts = [example.texts[0] if example.texts else "" for example in batch["examples"]]
    return Seen(batch["image"], texts, batch["ids"], trained.tokenizer.vocab, model.temp.item(),
                sim, targets, weights[0].cpu(), weights[1].cpu(), mined[0][1][0].cpu(),
                mined[1][1][0].cpu(), itm[0][0]["logits"].float().cpu(), itm[0][0]["valid"].cpu(),
                lm[0][0]["logits"].float().cpu(), lm[0][0]["targets"].cpu())


# ---- masks ---------------------------------------------------------------------------------------

@dataclass
class ModeMasks:
    """Who may look at whom in a mode: words (L), self_mask (L, L), cross_mask (L, N) or None."""

    words: list[str]
    self_mask: Tensor
    cross_mask: Tensor | None = None


@torch.no_grad()
def masks_of(trained: TrainedModel, image: Tensor, ids: Tensor,
             mask: Tensor) -> dict[str, ModeMasks]:
    """The masks that the first layer's attention gets in each mode, for one text.

    image (1, 3, S, S) normalised, ids and mask (1, L), all on the model's device.
    """
    model = trained.model
    kv = model.project(model.encode_image(image)[0])
    passes = {"encode_text": lambda: model.med.encode_text(ids, mask),
              "encode_grounded": lambda: model.med.encode_grounded(ids, mask, kv),
              "decode": lambda: model.med.decode(ids[:, :-1], mask[:, :-1], kv)}
    found = {}
    for name, run in passes.items():
        with calls_of(attention, "attend") as calls, calls_of(med, "with_first") as first:
            run()
        read = first[0][1] if first else ids
        cross = whole_mask(calls[1][0]) if name != "encode_text" else None
        found[name] = ModeMasks([trained.tokenizer.vocab[i] for i in read[0].tolist()],
                                whole_mask(calls[0][0]), cross)
    return found


def whole_mask(arguments: dict) -> Tensor:
    """The mask (L, N) of a call of `attend`; all True where it got none."""
    queries, keys = arguments["q"].shape[2], arguments["k"].shape[2]
    mask = arguments.get("mask")
    if mask is None:
        return torch.ones(queries, keys, dtype=torch.bool)
    return mask.expand(1, 1, queries, keys)[0, 0].cpu()


# ---- the queue -----------------------------------------------------------------------------------

@dataclass
class QueuePairs:
    """The training pairs whose features are in the queue: slots and items, newest first."""

    slots: list[int]
    items: list[dict]
    batch_size: int


def queue_pairs(trained: TrainedModel, state: dict, most: int = 2048) -> QueuePairs | None:
    """Which pairs the queue of a checkpoint holds: the data's order is known (EpochBatches).

    state: the checkpoint. None where it cannot be told: own data (their pictures were augmented),
    several processes, no run, no queue, a queue that was not filled with whole batches.
    """
    names = {name: value for name, value in trained.settings.items()
             if name in TrainConfig.__dataclass_fields__}
    size = trained.model.config.queue_size
    if not size or "optimizer" not in state or names.get("data") or len(state["rng"]) > 1:
        return None
    config = TrainConfig(**names)
    train = open_datasets(TASKS[config.task], config, trained.image_size).train
    steps_per_epoch, slot = len(train) // config.batch_size, int(trained.model.queue_ptr)
    itc_steps = sum("itc" in objectives_at(config, step) for step in range(state["step"]))
    if slot != itc_steps * config.batch_size % size:  # somebody has changed `enqueue`
        return None
    slots, items = [], []
    for step in range(state["step"] - 1, -1, -1):
        if "itc" not in objectives_at(config, step) or len(items) >= min(size, most):
            break
        epoch, number = divmod(step, steps_per_epoch)
        train.set_epoch(epoch)
        batches = iter(EpochBatches(len(train), config.batch_size, config.seed, epoch, number))
        for index in reversed(next(batches)):
            slot = (slot - 1) % size
            slots.append(slot)
            items.append(train[index])
    return QueuePairs(slots[:size], items[:size], config.batch_size)


@torch.no_grad()
def staleness(trained: TrainedModel, pairs: QueuePairs) -> dict[str, list[tuple[float, float]]]:
    """How close the queue's features are to what is said today of the same pairs.

    For pictures and texts: points (age in steps, mean cosine), by today's twin and by the online
    encoder.
    """
    model = trained.model
    model.set_objectives(("itc",))  # the others have no queue
    collate = caption_collate(trained.tokenizer, trained.max_words, trained.max_tokens)
    curves = {}
    for start in range(0, len(pairs.items), pairs.batch_size):
        batch = batch_to(collate(pairs.items[start:start + pairs.batch_size]), trained.device)
        slots = pairs.slots[start:start + pairs.batch_size]
        with calls_of(blip, "itc_loss") as calls:
            model(batch["image"], batch["ids"], batch["mask"])
        seen, age = calls[0][0], start // pairs.batch_size + 1
        for kind, queue in (("image", model.image_queue), ("text", model.text_queue)):
            for who, today in (("twin", seen[f"{kind}_keys"][:len(slots)]),
                               ("online", seen[f"{kind}_feat"])):
                cosine = (queue[slots] * today).sum(1).mean().item()
                curves.setdefault(f"{kind}, {who}", []).append((age, cosine))
    return curves


# ---- command line --------------------------------------------------------------------------------

def open_batch(trained: TrainedModel, o: argparse.Namespace) -> dict:
    """The batch that is looked at. Raises InputError where it has fewer than two pairs."""
    given = {} if o.noise is None else {"noise": o.noise}
    settings = TrainConfig(**(trained.settings | given))
    source = Source(o.data, o.image_root, "train" if o.data else "held-out", o.batch,
                    trained.image_size, noise=settings.noise, each_caption=True)
    dataset = TASKS["pretrain"].open_data(source)
    collate = TASKS["pretrain"].collate(trained.tokenizer, settings, trained.model.config)
    batch = collate([dataset[index] for index in range(min(o.batch, len(dataset)))])
    if len(batch["examples"]) < 2:
        raise InputError(f"{o.data or '--batch'} gives fewer than two pairs with a readable "
                         "picture; ITC and ITM need at least two: give more pairs")
    return batch


def look(o: argparse.Namespace) -> None:
    """Draw all pictures into --out. Raises InputError."""
    torch.manual_seed(o.seed)
    trained = open_model(o.checkpoint, ("itc", "itm", "lm"), o.vocab, devices.start(o.device),
                         to_train=True)  # with twins and queue
    batch = open_batch(trained, o)
    seen, pairs = see(trained, batch), queue_pairs(trained, read_tensors(o.checkpoint))
    out = make_folder(o.out)
    if pairs:
        seen.queue_texts = {slot: item["example"].texts[0]
                            for slot, item in zip(pairs.slots, pairs.items)}
    look_draw.draw_itc(out / "itc.png", seen)
    look_draw.draw_negatives(out / "negatives.png", seen)
    look_draw.draw_itm(out / "itm.png", seen)
    look_draw.draw_lm(out / "lm.png", seen)
    moved = batch_to(batch, trained.device)
    # The shortest text with its padding, cut to two positions of it.
    row = int(moved["mask"].sum(1).argmin())
    length = int(moved["mask"][row].sum()) + 2
    look_draw.draw_masks(out / "masks.png", masks_of(
        trained, moved["image"][row:row + 1], moved["ids"][row:row + 1, :length],
        moved["mask"][row:row + 1, :length]))
    written = ["itc.png", "negatives.png", "itm.png", "lm.png", "masks.png"]
    if pairs and pairs.items:
        written.append("queue.png")
        look_draw.draw_queue(out / "queue.png", staleness(trained, pairs), len(pairs.items))
    else:
        print("no queue.png: it needs a checkpoint of one process in the picture world with a "
              "queue; elsewhere the pictures behind the queue's features are not known")
    print(f"wrote {out}/{', '.join(written)}")


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of a pretraining, or released weights")
    parser.add_argument("--vocab", default="", help="vocab.txt, for released weights")
    parser.add_argument("--data", default="", action=FileFlag,
                        help="json of pairs (default: the picture world)")
    parser.add_argument("--image-root", default="", help="default: the folder of the json")
    parser.add_argument("--noise", type=float, default=None,
                        help="share of bad texts in the world (default: the checkpoint's)")
    parser.add_argument("--batch", type=at_least(2), default=24, help="pairs (default 24)")
    parser.add_argument("--seed", type=at_least(0), default=0,
                        help="of the drawn negatives (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--out", default="runs/look", help="folder (default runs/look)")
    o = parser.parse_args(arguments)
    return exit_status(lambda: look(o))


if __name__ == "__main__":
    sys.exit(main())
