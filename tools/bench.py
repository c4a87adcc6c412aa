"""What training and generation cost.

    python -m tools.bench flops      operations of one pretraining step at full size, counted, not
                                     timed (with --device cpu computed as well; --batch 2: less
                                     memory)
    python -m tools.bench generate   seconds of captioning and matching at 384 px against the ViT
    python -m tools.bench answer     seconds of ranking 128 answers (VQA, 480 px) against generating
                                     one; of 100 candidates of a dialog
    python -m tools.bench step       seconds, pairs a second, memory and share of the machine's
                                     matrix peak of a whole training step (--size --batch --device
                                     --bf16 --compile --grad-checkpoint)
    python -m tools.bench blip2      BLIP-2's second stage: a step, what is spent outside the frozen
                                     models; captions beside the transformers library's
    python -m tools.bench data --data D    decoded and augmented pairs a second on one core

flops are counted as the paper's model was: ViT-B/16 at 224 px, BERT-base, queue 57,600, training
mode, captions of 12 to 14 ids. The released code needs 306.6 GFLOP a pair: it projects an image's
keys and values again for each of four passes, and pads every text to 30 ids. Captions are timed
with random weights, 20 tokens each ([DEC] included), none ending earlier.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip import BLIP
from config import SIZES, BLIPConfig, TrainConfig
from data.datasets import ImageDataset
from data.sources import open_mixture
from tasks.visdial import VisDial
from tasks.vqa import VQA
from tools.bench_blip2 import blip2_seconds
from tools.timing import fastest
from training import devices
from training.devices import compile_forward
from training.precision import autocast, speed_up_generation
from training.program import exit_status
from training.run import make_optimizer
from training.settings import at_least
from weights.transformers_library import transformers_configs

RELEASED_GFLOP = 306.6  # a pair, forward and backward, counted the same way


def step_gflop(size: str = "base", batch: int = 8, device: str = "") -> float:
    """GFLOP a pair of one forward and backward pass of all three objectives.

    The attention runs unfused, since the counter does not see into a fused kernel. Without a device
    nothing is computed, only counted.
    """
    config = BLIPConfig(**SIZES[size])
    computed = contextlib.nullcontext() if device else FakeTensorMode()
    with computed, torch.device(device or "cpu"):
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
    """Seconds (the fastest of `repeats`) of the ViT, of captioning and of matching.

    A caption of each image by beam search and by nucleus sampling; 16 texts matched with one image,
    the ViT included.
    """
    config = BLIPConfig(**{**SIZES[size], **({} if size == "tiny" else {"image_size": 384})})
    model = speed_up_generation(BLIP(config).eval().to(device))
    image = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    ids = torch.randint(5, config.vocab_size - 2, (16, 14), device=device)
    length = dict(min_length=20, max_length=20)
    jobs = {
        "vit": lambda: model.vit(image),
        "beam 3": lambda: model.generate(image, beams=3, **length),
        "nucleus": lambda: model.generate(image, method="nucleus", top_p=0.9, **length),
        "vit, one image": lambda: model.vit(image[:1]),
        "match 16 texts": lambda: model.match(model.project(model.vit(image[:1])), ids,
                                              torch.ones_like(ids)),
    }
    seconds = dict.fromkeys(jobs, float("inf"))
    for _ in range(repeats):  # the jobs take turns, so that a slow moment hits all of them
        for name, job in jobs.items():
            seconds[name] = min(seconds[name], fastest(job, device, 1))
    return seconds


@torch.no_grad()
def transformers_seconds(size: str, batch: int, device: str, repeats: int = 2) -> dict[str, float]:
    """The same jobs in the transformers library, if it is installed; else nothing."""
    try:
        from transformers import (
            BlipConfig,
            BlipForConditionalGeneration,
            BlipForImageTextRetrieval,
        )
    except ImportError:
        return {}
    c = BLIPConfig(**{**SIZES[size], **({} if size == "tiny" else {"image_size": 384})})
    text, vision = transformers_configs(c)
    config = BlipConfig(text_config=text, vision_config=vision)
    image = torch.randn(batch, 3, c.image_size, c.image_size, device=device)
    ids = torch.randint(5, c.vocab_size - 2, (16, 14), device=device)
    jobs, length = {}, dict(min_length=20, max_length=20)
    captioner = BlipForConditionalGeneration(config).eval().to(device)
    jobs["transformers: beam 3"] = lambda: captioner.generate(image, num_beams=3, **length)
    jobs["transformers: nucleus"] = lambda: captioner.generate(image, do_sample=True, top_p=0.9,
                                                               top_k=0, **length)
    matcher = BlipForImageTextRetrieval(config).eval().to(device)
    jobs["transformers: match 16 texts"] = lambda: matcher(input_ids=ids, pixel_values=image[:1])
    return {name: fastest(job, device, repeats) for name, job in jobs.items()}


@torch.no_grad()
def answering_seconds(size: str = "base", device: str = "cpu", repeats: int = 2) -> dict:
    """Seconds of answering a question of 12 ids about one image, end to end.

    An answer of 3 ids generated by 3 beams; 128 of 3,128 answers of 2 to 4 ids ranked; 100
    candidates with a history of 60 ids at 384 px.
    """
    sizes = BLIPConfig(**SIZES[size])
    def image(model):
        return torch.randn(1, 3, model.config.image_size, model.config.image_size, device=device)
    def texts(count, length):
        return torch.randint(5, sizes.vocab_size - 2, (count, length), device=device)
    vqa = VQA(replace(sizes, **({} if size == "tiny" else {"image_size": 480})))
    dialog = VisDial(replace(sizes, **({} if size == "tiny" else {"image_size": 384})))
    vqa = speed_up_generation(vqa.eval().to(device))
    dialog = speed_up_generation(dialog.eval().to(device))
    picture, question, answers = image(vqa), texts(1, 12), texts(3128, 6)
    lengths = torch.randint(4, 7, (3128, 1), device=device)  # with [CLS] and [SEP]
    mask = (torch.arange(6, device=device) < lengths).long()
    caption, candidates = texts(1, 12), texts(100, 60)
    def read():
        return vqa.encode_question(picture, question, torch.ones_like(question))
    def judge():
        kv = dialog.encode_context(image(dialog), caption, torch.ones_like(caption))
        return dialog.logits(kv, candidates, torch.ones_like(candidates))
    jobs = {"image and question": read,
            "generate": lambda: vqa.generate(read(), max_length=4, min_length=4),
            "rank 128": lambda: vqa.rank(read(), answers, mask, 128),
            "dialog: image and caption": lambda: dialog.encode_context(image(dialog), caption,
                                                             torch.ones_like(caption)),
            "dialog: 100 candidates": judge}
    return {name: fastest(job, device, repeats) for name, job in jobs.items()}


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """GFLOP a second of a large matrix product: what this machine can do at best."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / fastest(lambda: a @ b, device, 5) / 1e9


def step_speed(size: str, batch: int, device: str, bf16: bool, compiled: bool,
               grad_checkpoint: bool, repeats: int = 5) -> dict:
    """A whole training step, optimizer, twins and queues included, on random pairs of 14 ids."""
    config = BLIPConfig(**SIZES[size], grad_checkpoint=grad_checkpoint)
    model = BLIP(config).train().to(device)
    optimizer = make_optimizer(model, TrainConfig())
    if compiled:
        compile_forward(model, torch.device(device))
    image = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    ids = torch.randint(5, config.vocab_size - 2, (batch, 14), device=device)
    mask = torch.ones_like(ids)

    def step():
        with autocast(torch.device(device), "bf16" if bf16 else "fp32"):
            losses, keys = model(image, ids, mask, 0.4)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_momentum()
        model.enqueue(keys)
        model.clamp_temperature()
    seconds = fastest(step, device, repeats)
    gflop = step_gflop(size, batch) * batch
    peak = matrix_peak(device, torch.bfloat16 if bf16 else torch.float32)
    if device.startswith("cuda"):
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource  # not on Windows
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"size": size, "batch": batch, "device": device, "bf16": bf16, "compile": compiled,
            "seconds": round(seconds, 4), "pairs_per_s": round(batch / seconds, 2),
            "gflop_per_s": round(gflop / seconds, 1), "matrix_peak_gflop_per_s": round(peak, 1),
            "share_of_peak": round(gflop / seconds / peak, 3), "gigabytes": round(memory / 1e9, 2)}


def data_speed(data: str, image_size: int, count: int = 500) -> dict:
    """Pairs a second that one core reads, decodes and augments."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = ImageDataset(open_mixture(data, "", Path(folder)), "", image_size, augment=True,
                               replace_broken=True)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        start = time.perf_counter()
        for i in order[:count]:
            dataset[i]
        seconds = time.perf_counter() - start
    done = min(count, len(dataset))
    return {"data": data, "image_size": image_size, "pairs": done,
            "pairs_per_s": round(done / seconds, 1)}


def main() -> int:
    """Print what was measured as json -> exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["flops", "generate", "answer", "step", "blip2", "data"])
    parser.add_argument("--size", choices=list(SIZES), default="base", help="default base")
    parser.add_argument("--batch", type=at_least(1),
                        help="default: flops 8 pairs, generate 4 images")
    parser.add_argument("--device", help="flops: default none, counts without computing; else "
                                         "default cpu")
    parser.add_argument("--bf16", action="store_true", help="step: bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="step: torch.compile")
    parser.add_argument("--grad-checkpoint", action="store_true", help="step: of the ViT")
    parser.add_argument("--data", help="data: as for train.py")
    parser.add_argument("--image-size", type=at_least(1), default=224,
                        help="data: pixels, default 224")
    options = parser.parse_args()
    if options.what == "data" and not options.data:
        parser.error("data needs --data")
    return exit_status(lambda: measure(options))


def measure(options: argparse.Namespace) -> None:
    """Print what was measured."""
    if options.device:
        devices.start(options.device)
    if options.what == "step":
        print(json.dumps(step_speed(options.size, options.batch or 8, options.device or "cpu",
                                    options.bf16, options.compile, options.grad_checkpoint)))
        return
    if options.what == "blip2":
        print(json.dumps(blip2_seconds(), indent=1))
        return
    if options.what == "data":
        torch.set_num_threads(1)
        print(json.dumps(data_speed(options.data, options.image_size)))
        return
    if options.what == "answer":
        seconds = answering_seconds(options.size, options.device or "cpu")
        print(json.dumps({name: round(value, 3) for name, value in seconds.items()} | {
            "rank 128 / generate": round(seconds["rank 128"] / seconds["generate"], 2)}, indent=1))
        return
    if options.what == "generate":
        settings = options.size, options.batch or 4, options.device or "cpu"
        seconds = generation_seconds(*settings) | transformers_seconds(*settings)
        print(json.dumps({name: round(value, 3) for name, value in seconds.items()} | {
            "beam 3 / vit": round(seconds["beam 3"] / seconds["vit"], 2),
            "nucleus / vit": round(seconds["nucleus"] / seconds["vit"], 2),
            "match 16 texts / vit": round(seconds["match 16 texts"] / seconds["vit, one image"],
                                          2)}, indent=1))
        return
    options.batch = options.batch or 8
    gflop = step_gflop(options.size, options.batch, options.device or "")
    result = {"size": options.size, "batch": options.batch, "gflop_per_pair": round(gflop, 2)}
    if options.size == "base":
        result |= {"released_gflop_per_pair": RELEASED_GFLOP,
                   "ratio": round(gflop / RELEASED_GFLOP, 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
