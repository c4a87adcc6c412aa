"""What training costs.

    python bench.py flops               operations of one pretraining step at full size, counted,
                                        not timed
    python bench.py flops --device cpu  the same, actually computed; add --batch 2 for less memory

Counted as the paper's model was: ViT-B/16 at 224 px, BERT-base, queue 57,600, training mode,
captions of 12 to 14 ids. The released code needs 306.6 GFLOP a pair: it projects an image's keys
and values again for each of four passes, and pads every text to 30 ids.
"""

import argparse
import json

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["flops"])
    parser.add_argument("--size", choices=list(SIZES), default="base", help="default base")
    parser.add_argument("--batch", type=int, default=8, help="pairs, default 8")
    parser.add_argument("--device", default="meta",
                        help="meta counts without computing (default); cpu or cuda computes")
    options = parser.parse_args()
    gflop = step_gflop(options.size, options.batch, options.device)
    result = {"size": options.size, "batch": options.batch, "gflop_per_pair": round(gflop, 2)}
    if options.size == "base":
        result |= {"released_gflop_per_pair": RELEASED_GFLOP,
                   "ratio": round(gflop / RELEASED_GFLOP, 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
