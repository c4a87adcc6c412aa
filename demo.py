"""What a person asks of a model: describe a picture, search a folder, match a text, show where it
looks.

    describe      captions with scores: beam search, and samples with their likelihoods
    ask           an answer to a question about a picture
    search        the pictures of a folder that fit a text best; features are cached on disk
    match         ITC similarity and ITM probability of a picture and a text
    attention     word by word, where cross-attention looks (gradient-weighted)

`python eval.py describe|ask|search|match|attend` calls these.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoints
from blip import BLIP
from captioning import Decoding, captions_of
from data import InputError, Tokenizer, clean_caption, clean_question, load_image, normalise
from retrieval import BATCH
from sheets import BLACK, GREY, Cell, draw_sheet
from tasks import VQA


def pictures_in(paths: list[str | Path]) -> list[Path]:
    """Files as they are, folders with every picture that lies in them. InputError for what is not
    there."""
    known, found = set(Image.registered_extensions()), []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist; check the path")
        found += sorted(p for p in path.rglob("*") if p.suffix.lower() in known
                        and p.is_file()) if path.is_dir() else [path]
    if not found:
        raise InputError(f"there is no picture in {', '.join(map(str, paths))}")
    return found


def open_picture(path: str | Path, size: int) -> Tensor:
    """-> (3, size, size) uint8, the whole picture; InputError where it cannot be read."""
    try:
        return load_image(path, size)
    except OSError as error:
        raise InputError(f"picture {path} cannot be read ({error}); give another one")


def batches(paths: list[Path], size: int, about: str):
    """-> (paths, images (B, 3, S, S)) of those that can be read; what cannot is named on the
    screen and left out."""
    for start in tqdm(range(0, len(paths), BATCH), about, unit="batch", leave=False):
        some = {}
        for path in paths[start:start + BATCH]:
            try:
                some[path] = load_image(path, size)
            except OSError as error:
                tqdm.write(f"left out: {path} ({error})")
        if some:
            yield list(some), torch.stack(list(some.values()))


def describe(model: BLIP, tokenizer: Tokenizer, paths: list[Path], device: torch.device,
             how: Decoding, captions: int = 1, samples: int = 3) -> list[dict]:
    """-> for each readable picture {image, captions: [(text, mean log-probability of a token)],
    samples: [(text, log-likelihood)]}; printed as they come."""
    how.check(model, tokenizer)
    beam = replace(how, method="beam", beams=max(how.beams, captions))
    records = []
    for some, images in batches(paths, model.config.image_size, "describing"):
        with torch.no_grad():
            kv = model.med.project(model.vit(normalise(images.to(device))))
        found = captions_of(model, tokenizer, kv, device, beam, captions)
        drawn = ([[]] * len(some) if not samples else
                 captions_of(model, tokenizer, kv, device, replace(how, method="nucleus"), samples))
        for path, best, sampled in zip(some, found, drawn):
            records.append({"image": str(path), "captions": best, "samples": sampled})
            tqdm.write("\n".join(
                [str(path)] + [f"  {score:7.2f}  {text}" for text, score in best]
                + [f"  {score:7.2f}  {text}   (sample)" for text, score in sampled]))
    if not records:
        raise InputError(f"none of the {len(paths)} pictures could be read")
    return records


@torch.no_grad()
def ask(model: VQA, tokenizer: Tokenizer, image: Tensor, question: str, answers: list[str],
        max_tokens: int = 35) -> str:
    """image (1, 3, S, S) -> the answer: the likeliest of `answers`, or generated where there are
    none."""
    length = 2 + len(tokenizer.pieces_of(clean_question(question)))
    if length > max_tokens:
        raise InputError(f"the question has {length} tokens, more than the {max_tokens} that the "
                         "model reads; shorten it")
    ids, mask = (x.to(image.device) for x in tokenizer.encode([clean_question(question)]))
    kv = model.read(image, ids, mask)
    if not answers:
        return tokenizer.decode(model.generate(kv)[0][0])
    known = (x.to(image.device) for x in tokenizer.encode(answers, max_tokens))
    chosen, nll = model.rank(kv, *known)
    return answers[int(chosen[0, nll[0].argmin()])]


@torch.no_grad()
def features(model: BLIP, paths: list[Path], device: torch.device, checkpoint: Path,
             folder: Path) -> tuple[list[Path], Tensor]:
    """-> the readable pictures and their unit features (I, E).

    Kept in `folder`, in one file for each checkpoint; a picture is encoded again only when its size
    or time has changed.
    """
    def stamp(path):
        about = path.stat()
        return f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    key = hashlib.sha256(stamp(checkpoint).encode()).hexdigest()[:12]
    store, known = folder / f"features-{key}.pt", {}
    if store.exists():
        cached = checkpoints.read(store)
        known = dict(zip(cached["stamps"], cached["features"]))
    stamps = {path: stamp(path) for path in paths}
    missing = [path for path in paths if stamps[path] not in known]
    for some, images in batches(missing, model.config.image_size, "encoding"):
        feats = model.encode_image(normalise(images.to(device)))[1].cpu()
        known |= zip((stamps[path] for path in some), feats)
    if missing:
        os.makedirs(folder, exist_ok=True)
        checkpoints.save(store, {"stamps": list(known), "features": torch.stack([*known.values()])})
    paths = [path for path in paths if stamps[path] in known]
    if not paths:
        raise InputError("none of the pictures could be read")
    return paths, torch.stack([known[stamps[path]] for path in paths])


@torch.no_grad()
def search(model: BLIP, tokenizer: Tokenizer, text: str, paths: list[Path], device: torch.device,
           checkpoint: Path, folder: Path, top_k: int = 10) -> list[dict]:
    """-> the `top_k` pictures that fit best by ITC, ordered by ITC similarity + ITM's matched logit
    as [{image, itc, itm}]; writes folder/search.png."""
    paths, feats = features(model, paths, device, checkpoint, folder)
    if top_k > len(paths):
        raise InputError(f"--top-k {top_k} is larger than the gallery of {len(paths)} pictures; "
                         f"give at most {len(paths)}")
    ids, mask = (x.to(device) for x in tokenizer.encode([clean_caption(text)],
                                                        model.config.max_positions))
    sim = feats @ model.encode_text(ids, mask).cpu()[0]
    found = []
    for i in sim.topk(top_k).indices.tolist():
        image = open_picture(paths[i], model.config.image_size)
        kv = model.med.project(model.vit(normalise(image[None].to(device))))
        logits = model.match(kv, ids, mask)[0].float()
        found.append((sim[i].item() + logits[1].item(), image,
                      {"image": str(paths[i]), "itc": round(sim[i].item(), 4),
                       "itm": round(logits.softmax(-1)[1].item(), 4)}))
    found.sort(key=lambda hit: -hit[0])
    cells = [Cell(image, [(f"ITC {hit['itc']:.3f}  ITM {hit['itm']:.3f}", BLACK),
                          (Path(hit["image"]).name, GREY)]) for _, image, hit in found]
    folder.mkdir(parents=True, exist_ok=True)
    draw_sheet(folder / "search.png", [(f"{text} (best of {len(paths)} pictures)",
                                        [cells[i:i + 5] for i in range(0, len(cells), 5)])])
    return [hit for *_, hit in found]


@torch.no_grad()
def match(model: BLIP, tokenizer: Tokenizer, image: Tensor, text: str,
          device: torch.device) -> tuple[float, float]:
    """image (3, S, S) uint8 -> ITC similarity in [-1, 1], ITM probability in [0, 1]."""
    tokens, image_feat = model.encode_image(normalise(image[None].to(device)))
    ids, mask = (x.to(device) for x in tokenizer.encode([clean_caption(text)],
                                                        model.config.max_positions))
    logits = model.match(model.med.project(tokens), ids, mask)
    return ((image_feat @ model.encode_text(ids, mask).T).item(),
            logits.float().softmax(-1)[0, 1].item())


def attention(model: BLIP, tokenizer: Tokenizer, image: Tensor, text: str, device: torch.device,
              layer: int = 0) -> tuple[list[str], Tensor, float]:
    """image (3, S, S) uint8 -> words, maps (words, S, S) in [0, 1], ITM probability.

    The cross-attention map of a layer (1 is the first; 0 chooses two thirds of the depth, ALBEF's 8
    of 12), each entry times the positive part of its gradient of the matched logit, averaged over
    heads (Grad-CAM; ALBEF sec. 6.5): where the model looks AND what argues for a match. Pieces of a
    word are averaged; each word's map is stretched to its own largest value. The last layer has no
    such maps: ITM reads [ENC] alone, which no word reaches any more after it.
    """
    depth, words = model.config.text_depth, clean_caption(text).split()
    layer = layer or min(-(-2 * depth // 3), depth - 1)
    if not 1 <= layer < depth:
        raise InputError(f"--layer {layer} cannot be shown; of the model's {depth} layers 1 to "
                         f"{depth - 1} can (in the last one, ITM reads no word)")
    if not words:
        raise InputError(f"the text {text!r} has no words")
    ids, mask = tokenizer.encode([" ".join(words)], model.config.max_positions)
    with torch.no_grad():
        kv = model.med.project(model.vit(normalise(image[None].to(device))))
    maps = []
    with torch.enable_grad():
        states = model.med.encode_grounded(ids.to(device), mask.to(device), kv, probabilities=maps)
        logits = model.itm_head(states[:, 0])
        gradient, = torch.autograd.grad(logits[0, 1], maps[layer - 1])
    weighted = (maps[layer - 1] * gradient.clamp(min=0)).mean(1)[0, :, 1:].detach()  # (L, N - 1)
    grid = model.config.image_size // model.config.patch_size
    start, per_word = 1, []
    for word in words:
        end = start + len(tokenizer.pieces_of(word))
        per_word.append(weighted[start:end].mean(0).view(1, grid, grid))
        start = end
    heat = F.interpolate(torch.stack(per_word), size=image.shape[1:], mode="bilinear")[:, 0]
    heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return words, heat.cpu(), logits.float().softmax(-1)[0, 1].item()


def draw_attention(path: Path, image: Tensor, words: list[str], heat: Tensor, title: str) -> None:
    """Write a PNG: the picture, then for each word the picture dark but for where it looks."""
    lit = (image * (0.2 + 0.8 * heat[:, None])).byte()  # (words, 3, S, S)
    cells = [Cell(image, [("the picture", GREY)])] + [
        Cell(shown, [(word, BLACK)]) for shown, word in zip(lit, words)]
    draw_sheet(path, [(title, [cells[i:i + 6] for i in range(0, len(cells), 6)])])
