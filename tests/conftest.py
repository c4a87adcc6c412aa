"""What several tests need: a toy model, a toy batch, photographs, a pretrained checkpoint, the
reference tensors where they are there."""

import json
import os
from pathlib import Path

# The suite runs on the CPU, also where there is a GPU; on it with CUDA_VISIBLE_DEVICES=0.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import train
from blip import BLIP
from config import BLIPConfig
from world.datasets import World
from world.scenes import render

TOY = dict(image_size=32, vit_width=32, vit_depth=2, vit_heads=2, text_width=48, text_depth=2,
           text_heads=4, text_ffn=96, max_positions=32, dropout=0.0, embed_dim=16, queue_size=10,
           init_std=0.0, vocab_size=40, cls_id=2, sep_id=3, dec_id=38, enc_id=39)
# A model that trains in seconds on anything.
SMALL = ("--image-size 32 --vit-width 16 --vit-depth 1 --vit-heads 2 --text-width 16 --text-depth "
         "1 --text-heads 2 --text-ffn 32 --embed-dim 8 --queue-size 20 --batch-size 8 --min-steps "
         "0 --eval-size 12 --eval-top-k 3 --log-every 2 --warmup-steps 2 --lm-only-steps 2 "
         "--workers 0 --precision fp32").split()
# The same for a finetuning, which takes the sizes from its start and has no steps of LM alone.
FINETUNE = " ".join(SMALL[SMALL.index("--batch-size"):]).replace("--lm-only-steps 2", "").split()
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


# --precision auto is then float32 on every CPU; with AMX it would be bfloat16.
torch.cpu.get_capabilities = dict
torch.set_num_threads(2)  # for the fixtures of a module, which come before the one below


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


class SumsInAnyOrder(TorchDispatchMode):
    """Counts the sums that are not the same in every run.

    On a CPU: threads race for a row in the gradient of x[rows] where a row is repeated. (Two runs
    may be equal by luck; this does not depend on luck.)
    """

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation == torch.ops.aten.index_put.default and len(args) == 4 and args[3]:
            rows = torch.stack([index for index in args[1] if index is not None])
            self.count += rows.shape[1] > rows.unique(dim=1).shape[1]
        return operation(*args, **(kwargs or {}))


def run(out, *flags) -> int:
    return train.main([*SMALL, "--out", str(out), *map(str, flags)])


def finetune(task, init, out, *flags) -> int:
    return train.main([task, "--init", str(init), "--out", str(out), "--batch-size", "8",
                       "--scenes", "32", "--eval-size", "12", "--eval-top-k", "3",
                       "--min-steps", "0", "--log-every", "1", "--workers", "0",
                       *map(str, flags)])


def photographs(folder: Path, count: int = 40, caption: str = "") -> Path:
    """World scenes saved as photographs with a BLIP json: rows of one caption to train, lists to
    evaluate. caption: of each of them, else what is true."""
    folder.mkdir(exist_ok=True)
    world, rows = World("train", count), []
    for i in range(count):
        Image.fromarray(render(world.scene(i), 48).transpose(1, 2, 0)).save(folder / f"{i}.jpg")
        rows += [{"image": f"{i}.jpg", "caption": caption or world.example(i).captions[0],
                  "image_id": i}]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps(
        [{"image": r["image"], "caption": [r["caption"], "a " + r["caption"]]} for r in rows[:10]]))
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """The checkpoint of a run of a few steps."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    assert run(out, "--scenes", 48, "--max-positions", 64, "--text-depth", 2) == 0
    return out / "checkpoint.pt"


def equal_states(a: Path, b: Path) -> bool:
    """Whether two runs' checkpoints are equal in every tensor and counter."""
    a, b = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (a, b))
    assert all(a[k] == b[k] for k in ("step", "seen", "broken", "best"))
    tensors = [(a["model"][k], b["model"][k]) for k in a["model"]] + list(zip(a["rng"], b["rng"]))
    for i, slot in a["optimizer"]["state"].items():
        tensors += [(slot[k], b["optimizer"]["state"][i][k]) for k in slot]
    return all(torch.equal(x, y) for x, y in tensors)
