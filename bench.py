"""What training and generation cost.

    python bench.py flops               operations of one pretraining step at full size, counted,
                                        not timed
    python bench.py flops --device cpu  the same, actually computed; add --batch 2 for less memory
    python bench.py generate            seconds of captioning and matching at 384 px against the ViT

flops are counted as the paper's model was: ViT-B/16 at 224 px, BERT-base, queue 57,600, training
mode, captions of 12 to 14 ids. The released code needs 306.6 GFLOP a pair: it projects an image's
keys and values again for each of four passes, and pads every text to 30 ids. Captions are timed
with random weights, 20 tokens each ([DEC] included), none ending earlier.
"""

import argparse
import json
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip import BLIP, SIZES, BLIPConfig

RELEASED_GFLOP = 306.6  # a pair, forward and backward, counted the same way


def step_gflop(size: str = "base", batch: int = 8, device: str = "meta") -> float:
    """GFLOP a pair of one forward and backward pass of all three objectives. The attention runs
    unfused, since the counter does not see into a fused kernel. On "meta" nothing is computed,
    only counted."""
    config = BLIPConfig(**SIZES[size])
    with torch.device(device):
        model = BLIP(config).train()
        image = torch.randn(batch, 3, config.image_size, config.image_size)
        ids = torch.randint(1000, 30000 if config.vocab_size > 30000 else config.vocab_size,
                            (batch, 14))
        mask = torch.ones(batch, 14, dtype=torch.long)
        for row in range(batch):
            mask[row, 12 + row % 3:] = 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses, _ = model(image, ids, mask, alpha=0.4)
        sum(losses.values()).backward()
    return counter.get_total_flops() / batch / 1e9


@torch.no_grad()
def generation_seconds(size: str = "base", batch: int = 4, device: str = "cpu",
                       repeats: int = 3) -> dict[str, float]:
    """Seconds (the fastest of `repeats`) for the ViT alone, for a caption of each image by beam
    search and by nucleus sampling, and for 16 texts matched with one image, ViT included."""
    config = BLIPConfig(**{**SIZES[size], **({} if size == "tiny" else {"image_size": 384})})
    model = BLIP(config).eval().to(device)
    image = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    ids = torch.randint(5, config.vocab_size - 2, (16, 14), device=device)
    length = dict(min_length=20, max_length=20)
    jobs = {
        "vit": lambda: model.vit(image),
        "beam 3": lambda: model.generate(image, beams=3, **length),
        "nucleus": lambda: model.generate(image, method="nucleus", top_p=0.9, **length),
        "vit, one image": lambda: model.vit(image[:1]),
        "match 16 texts": lambda: model.match(model.med.project(model.vit(image[:1])), ids,
                                              torch.ones_like(ids)),
    }
    seconds = dict.fromkeys(jobs, float("inf"))
    for _ in range(repeats + 1):  # the jobs take turns, so that a slow moment hits all of them
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["flops", "generate"])
    parser.add_argument("--size", choices=list(SIZES), default="base", help="default base")
    parser.add_argument("--batch", type=int, help="default: flops 8 pairs, generate 4 images")
    parser.add_argument("--device", help="flops: meta counts without computing (default); "
                                         "generate: default cpu")
    options = parser.parse_args()
    if options.what == "generate":
        seconds = generation_seconds(options.size, options.batch or 4, options.device or "cpu")
        print(json.dumps({name: round(value, 3) for name, value in seconds.items()} | {
            "beam 3 / vit": round(seconds["beam 3"] / seconds["vit"], 2),
            "nucleus / vit": round(seconds["nucleus"] / seconds["vit"], 2),
            "match 16 texts / vit": round(seconds["match 16 texts"] / seconds["vit, one image"],
                                          2)}, indent=1))
        return
    options.batch, options.device = options.batch or 8, options.device or "meta"
    gflop = step_gflop(options.size, options.batch, options.device)
    result = {"size": options.size, "batch": options.batch, "gflop_per_pair": round(gflop, 2)}
    if options.size == "base":
        result |= {"released_gflop_per_pair": RELEASED_GFLOP,
                   "ratio": round(gflop / RELEASED_GFLOP, 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
