"""What several tests need: a toy model, a toy batch, the reference tensors where they are there."""

from pathlib import Path

import pytest
import torch

from blip import BLIP, BLIPConfig

TOY = dict(image_size=32, vit_width=32, vit_depth=2, vit_heads=2, text_width=48, text_depth=2,
           text_heads=4, text_ffn=96, max_positions=32, dropout=0.0, embed_dim=16, queue_size=10,
           vocab_size=40, cls_id=2, sep_id=3, dec_id=38, enc_id=39)
REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


def toy_model(**changes) -> BLIP:
    torch.manual_seed(0)
    return BLIP(BLIPConfig(**{**TOY, **changes}))


def toy_batch(size: int = 4, length: int = 7) -> dict:
    """Texts of different lengths: the last tokens of some rows are padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 38, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.long)
    for row in range(size):
        real = length - row % 3
        ids[row, 0], ids[row, real - 1] = 2, 3
        ids[row, real:], mask[row, real:] = 0, 0
    return {"image": torch.randn(size, 3, 32, 32, generator=generator), "ids": ids, "mask": mask}


def reference(name: str) -> dict:
    """A file of tensors that the released code produced; the test is skipped where it is absent."""
    if not (REFERENCE / name).exists():
        pytest.skip(f"no reference tensors at {REFERENCE}")
    return torch.load(REFERENCE / name, weights_only=True)


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
