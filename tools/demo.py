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
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.files import InputError, make_folder, read_tensors
from data.images import load_image, prepare_images
from data.text import Tokenizer, clean_caption, clean_question
from reports.sheets import BLACK, GREY, Cell, draw_sheet, in_rows
from tasks.captioning import Decoding, write_captions
from tasks.retrieval import combined_score
from tasks.task import BATCH, TrainedModel
from training import checkpoints


def find_pictures(paths: list[str | Path]) -> list[Path]:
    """Files as they are, folders with every picture that lies in them.

    Raises InputError for what is not there.
    """
    endings, pictures = set(Image.registered_extensions()), []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist; check the path")
        if path.is_dir():
            pictures += sorted(p for p in path.rglob("*")
                               if p.suffix.lower() in endings and p.is_file())
        else:
            pictures.append(path)
    if not pictures:
        raise InputError(f"there is no picture in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(pictures))  # a folder and a picture in it: once


def open_picture(path: str | Path, size: int) -> Tensor:
    """-> (3, size, size) uint8, the whole picture; InputError where it cannot be read."""
    try:
        return load_image(path, size)
    except OSError as error:
        raise InputError(f"picture {path} cannot be read ({error}); give another one")


def picture_batches(paths: list[Path], size: int,
                    about: str) -> Iterator[tuple[list[Path], Tensor]]:
    """(paths, images (B, 3, S, S) uint8) of those that can be read.

    What cannot is named on the screen and left out.
    """
    for start in tqdm(range(0, len(paths), BATCH), about, unit="batch", leave=False):
        readable, images = [], []
        for path in paths[start:start + BATCH]:
            try:
                images.append(load_image(path, size))
                readable.append(path)
            except OSError as error:
                tqdm.write(f"left out: {path} ({error})")
        if readable:
            yield readable, torch.stack(images)


@torch.no_grad()
def describe(trained: TrainedModel, paths: list[Path], decoding: Decoding, captions: int = 1,
             samples: int = 3) -> Iterator[dict]:
    """For each readable picture {image, captions, samples}, printed as they come.

    captions: [(text, mean log-probability of a token)], samples: [(text, log-likelihood)]. Raises
    InputError where no picture can be read.
    """
    model, tokenizer = trained.model, trained.tokenizer
    decoding.prompt_ids(model, tokenizer)  # says what is wrong before anything is read
    name_unknown(decoding.prompt, tokenizer)
    beam = replace(decoding, method="beam", beams=max(decoding.beams, captions))
    nucleus = replace(decoding, method="nucleus")
    done = 0
    for readable, images in picture_batches(paths, trained.image_size, "describing"):
        kv = model.project(model.vit(prepare_images(images, trained.device)))
        best = write_captions(model, tokenizer, kv, beam, captions)
        sampled = [[]] * len(readable)
        if samples:
            # Each batch draws its own samples.
            own = replace(nucleus, seed=nucleus.seed + done)
            sampled = write_captions(model, tokenizer, kv, own, samples)
        for path, of_beam, of_nucleus in zip(readable, best, sampled):
            tqdm.write("\n".join(
                [str(path)] + [f"  {score:7.2f}  {text}" for text, score in of_beam]
                + [f"  {score:7.2f}  {text}   (sample)" for text, score in of_nucleus]))
            yield {"image": str(path), "captions": of_beam, "samples": of_nucleus}
        done += len(readable)
    if not done:
        raise InputError(f"none of the {len(paths)} pictures could be read")


@torch.no_grad()
def ask(trained: TrainedModel, picture: str | Path, question: str,
        generate: bool = False) -> str:
    """The likeliest of the model's answers, or a generated one where it has none.

    Raises InputError for a picture that cannot be read or a question that is too long.
    """
    model, tokenizer, max_tokens = trained.model, trained.tokenizer, trained.max_tokens
    ids, mask = tokenize(trained, clean_question(question), max_tokens)
    image = open_picture(picture, trained.image_size)[None]
    kv = model.encode_question(prepare_images(image, trained.device), ids, mask)
    answers = [] if generate else trained.answers
    if not answers:
        ids, _ = model.generate(kv)[0]
        return tokenizer.decode(ids)
    ids, mask = tokenizer.encode(answers, max_tokens)
    candidates, nll = model.rank(kv, ids.to(trained.device), mask.to(trained.device))
    return answers[int(candidates[0, nll[0].argmin()])]


def check_words(text: str, tokenizer: Tokenizer | None) -> None:
    """InputError where a cleaned text has no words; says what the tokenizer has no pieces for."""
    if not text:
        raise InputError("the text has no words; give some, in quotes")
    if tokenizer:
        name_unknown(text, tokenizer)


def name_unknown(text: str, tokenizer: Tokenizer) -> None:
    """Say which words and signs of a text the vocabulary does not have."""
    unknown = tokenizer.unknown(text)
    if unknown:
        print(f"WARNING the model's vocabulary does not have {', '.join(map(repr, unknown))}: read "
              "as [UNK], one unknown word like any other", file=sys.stderr)


def tokenize(trained: TrainedModel, text: str, max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """A text's ids and mask (1, L) on the model's device.

    max_tokens 0: as many as the model has positions. Raises InputError for a text that is longer,
    and for one without words.
    """
    check_words(text, trained.tokenizer)
    most = max_tokens or trained.model.config.max_positions
    length = 2 + len(trained.tokenizer.piece_ids(text))  # [CLS] and [SEP]
    if length > most:
        raise InputError(f"the text has {length} tokens, more than the {most} that the model "
                         "reads; shorten it")
    ids, mask = trained.tokenizer.encode([text], most)
    return ids.to(trained.device), mask.to(trained.device)


def read_features(store: Path) -> dict[str, Tensor]:
    """The kept features of pictures: stamp -> (E,).

    Raises InputError for a file that holds something else.
    """
    try:
        cached = read_tensors(store)
        stamps, features = cached["stamps"], cached["features"]
        if features.ndim != 2 or len(stamps) != len(features):
            raise ValueError("there must be a row of features for each picture")
        return dict(zip(stamps, features))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(f"{store} holds no features of pictures; delete it, and the pictures are "
                         "encoded again")


@torch.no_grad()
def encode_pictures(trained: TrainedModel, paths: list[Path], checkpoint: Path,
                    folder: Path) -> tuple[list[Path], Tensor]:
    """The readable pictures and their unit features (I, E).

    Kept in `folder`, in one file for each checkpoint; a picture is encoded again only when its size
    or time has changed. Raises InputError where no picture can be read.
    """
    def stamp(path: Path) -> str:
        about = path.stat()
        return f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    key = hashlib.sha256(stamp(checkpoint).encode()).hexdigest()[:12]
    store, features = folder / f"features-{key}.pt", {}
    if store.exists():
        features = read_features(store)
    stamps = {path: stamp(path) for path in paths}
    missing = [path for path in paths if stamps[path] not in features]
    try:
        for readable, images in picture_batches(missing, trained.image_size, "encoding"):
            feat = trained.model.encode_image(prepare_images(images, trained.device))[1].cpu()
            features |= zip([stamps[path] for path in readable], feat)
    finally:  # also of those before an interrupt
        if missing and features:
            make_folder(folder)
            checkpoints.save(store, {"stamps": list(features),
                                     "features": torch.stack(list(features.values()))})
    paths = [path for path in paths if stamps[path] in features]
    if not paths:
        raise InputError("none of the pictures could be read")
    return paths, torch.stack([features[stamps[path]] for path in paths])


@torch.no_grad()
def search(trained: TrainedModel, text: str, paths: list[Path], checkpoint: Path, folder: Path,
           top_k: int = 10) -> list[dict]:
    """The `top_k` pictures that fit best by ITC, in the order of ITC and ITM together.

    How they are put together (retrieval.combined_score) is the checkpoint's setting. All pictures
    where there are fewer. As [{image, itc, itm, score}]; writes folder/search.png.
    """
    ids, mask = tokenize(trained, clean_caption(text))
    paths, feats = encode_pictures(trained, paths, checkpoint, folder)
    model = trained.model
    sim = feats @ model.encode_text(ids, mask).cpu()[0]
    hits = []  # (picture, record)
    for i in sim.topk(min(top_k, len(paths))).indices.tolist():
        image = open_picture(paths[i], trained.image_size)
        kv = model.project(model.vit(prepare_images(image[None], trained.device)))
        logits = model.match(kv, ids, mask)[0].float()
        score = combined_score(sim[i], logits.cpu(), model.temp.item(),
                            trained.settings["rerank_score"]).item()
        record = {"image": str(paths[i]), "itc": round(sim[i].item(), 4),
                  "itm": round(logits.softmax(-1)[1].item(), 4), "score": round(score, 4)}
        hits.append((image, record))
    hits.sort(key=lambda hit: -hit[1]["score"])
    cells = [Cell(image, [(f"{record['score']:.2f}: ITC {record['itc']:.3f}, ITM "
                           f"{record['itm']:.3f}", BLACK), (Path(record["image"]).name, GREY)])
             for image, record in hits]
    make_folder(folder)
    draw_sheet(folder / "search.png",
               [(f"{text} (best of {len(paths)} pictures)", in_rows(cells, 5))])
    return [record for _, record in hits]


@torch.no_grad()
def match(trained: TrainedModel, image: Tensor, text: str) -> tuple[float, float]:
    """image (3, S, S) uint8 -> ITC similarity in [-1, 1], ITM probability in [0, 1]."""
    model = trained.model
    tokens, image_feat = model.encode_image(prepare_images(image[None], trained.device))
    ids, mask = tokenize(trained, clean_caption(text))
    logits = model.match(model.project(tokens), ids, mask)
    return ((image_feat @ model.encode_text(ids, mask).T).item(),
            logits.float().softmax(-1)[0, 1].item())


def attention(trained: TrainedModel, image: Tensor, text: str,
              layer: int = 0) -> tuple[list[str], Tensor, float]:
    """Where each word looks: words, maps (words, S, S) in [0, 1], ITM probability.

    image (3, S, S) uint8. The cross-attention map of a layer (1 is the first; 0 chooses two thirds
    of the depth, ALBEF's 8 of 12), each entry times the positive part of its gradient of the
    matched logit, averaged over heads (Grad-CAM; ALBEF sec. 6.4): where the model looks AND what
    argues for a match. Pieces of a word are averaged; each word's map is stretched to its own
    largest value. The last layer has no such maps: ITM reads [ENC] alone, which no word reaches any
    more after it. Raises InputError for it, and for a text without words.
    """
    model, tokenizer = trained.model, trained.tokenizer
    depth, words = model.config.text_depth, clean_caption(text).split()
    layer = layer or min(math.ceil(2 * depth / 3), depth - 1)
    if not 1 <= layer < depth:
        raise InputError(f"--layer {layer} cannot be shown; of the model's {depth} layers 1 to "
                         f"{depth - 1} can (in the last one, ITM reads no word)")
    ids, mask = tokenize(trained, " ".join(words))
    attn_maps = []
    with torch.no_grad():
        kv = model.project(model.vit(prepare_images(image[None], trained.device)))
    with torch.enable_grad():
        states = model.med.encode_grounded(ids, mask, kv, attn_maps=attn_maps)
        logits = model.itm_head(states[:, 0])
        gradient, = torch.autograd.grad(logits[0, 1], attn_maps[layer - 1])
    weighted = (attn_maps[layer - 1] * gradient.clamp(min=0)).mean(1)[0].detach()  # (L, N)
    patches = weighted[:, 1:]  # without [CLS]
    grid = math.isqrt(patches.shape[1])
    start, per_word = 1, []
    for word in words:
        end = start + len(tokenizer.piece_ids(word))
        per_word.append(patches[start:end].mean(0).view(1, grid, grid))
        start = end
    heat = F.interpolate(torch.stack(per_word), size=image.shape[1:], mode="bilinear")[:, 0]
    heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return words, heat.cpu(), logits.float().softmax(-1)[0, 1].item()


def draw_attention(path: Path, image: Tensor, words: list[str], heat: Tensor, title: str) -> None:
    """Write a PNG: the picture, then for each word the picture, dark but for where it looks."""
    lit = (image * (0.2 + 0.8 * heat[:, None])).byte()  # (words, 3, S, S)
    cells = [Cell(image, [("the picture", GREY)])]
    cells += [Cell(shown, [(word, BLACK)]) for shown, word in zip(lit, words)]
    draw_sheet(path, [(title, in_rows(cells, 6))])
