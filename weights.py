"""Weights from elsewhere, and out again: ViT, BERT, released BLIP models, the transformers library.

    read(path)                     a state dict, without running any code in the file
    start_from(model, vit, text)   starting weights of a pretraining: ImageNet ViT, BERT (sec. 4.1)
    load_released(path)            a released pretraining, retrieval, ITM, caption, VQA or NLVR2
                                   model, with the released or transformers' key names
                                   -> (model, report)
    export(model, kind)            -> state dict with the released key names
    export_transformers(...)       a folder that the transformers library loads

Every mapping is a list of (our name, foreign names joined along dim 0): query, key and value are
one linear layer here. The decoder's shared parts are stored twice there.
"""

import json
import pickle
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from blip import BLIP, BLIPConfig
from data import InputError, Tokenizer
from tasks import MODELS, make_model
from vit import resize_positions

Names = list[tuple[str, list[str]]]


def read(path: str | Path) -> dict:
    """torch.load with weights_only=True: a file that holds anything but tensors and plain values
    is refused. A .safetensors file needs the package of that name."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors, or give "
                         "the .bin or .pth file")
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist; check the path")
    except pickle.UnpicklingError:
        raise InputError(f"checkpoint {path} holds pickled code or is no checkpoint: refused, "
                         "because loading it could run that code; save a plain state dict of "
                         "tensors instead")
    except Exception as error:  # whatever a cut or damaged file makes the readers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"checkpoint {path} cannot be read ({reason}); it may be cut short")


@dataclass
class Report:
    """What a foreign state dict did not hold (`missing`, our names), what was not used
    (`left_over`, its names), and what it was trained for."""

    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    kind: str = "pretrain"  # pretrain, retrieval (also ITM), caption, vqa or nlvr2

    def settings(self) -> dict:
        """What is known of its training, as a checkpoint's train_config tells it."""
        return {"pretrain": {}, "retrieval": {"task": "retrieval", "lm_weight": 0.0},
                "caption": {"task": "caption", "itc_weight": 0.0, "itm_weight": 0.0,
                            "prompt": "a picture of"},
                "vqa": {"task": "vqa"}, "nlvr2": {"task": "nlvr2"}}[self.kind] | {"preset": "base"}

    def __str__(self) -> str:
        lines = ([f"missing, left at their initial values: {shorten(self.missing)}"]
                 if self.missing else [])
        lines += [f"left over, not used: {shorten(self.left_over)}"] if self.left_over else []
        return "\n".join(lines) or "every weight found its place"


def fused(released: str, ours: str, parts: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Our one linear layer for several released ones (query, key, value), weights and biases."""
    return [(f"{ours}.{kind}", [f"{released}.{part}.{kind}" for part in parts])
            for kind in ("weight", "bias")]


def same(released: str, ours: str) -> list[tuple[str, list[str]]]:
    """A layer that has the same two tensors here and there."""
    return [(f"{ours}.{kind}", [f"{released}.{kind}"]) for kind in ("weight", "bias")]


def vit_names(released: str, ours: str, depth: int) -> list[tuple[str, list[str]]]:
    """(our name, released names) of a ViT; timm's naming."""
    pairs = [(f"{ours}{name}", [f"{released}{name}"]) for name in ("cls_token", "pos_embed")]
    pairs += (same(f"{released}patch_embed.proj", f"{ours}patch_embed")
              + same(f"{released}norm", f"{ours}norm"))
    for i in range(depth):
        there, here = f"{released}blocks.{i}", f"{ours}blocks.{i}"
        for a, b in (("norm1", "norm1"), ("attn.qkv", "attn.qkv"), ("attn.proj", "attn.out"),
                     ("norm2", "norm2"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2")):
            pairs += same(f"{there}.{a}", f"{here}.{b}")
    return pairs


def embedding_names(released: str, ours: str) -> list[tuple[str, list[str]]]:
    """BERT's embeddings."""
    return [(f"{ours}.word.weight", [f"{released}.word_embeddings.weight"]),
            (f"{ours}.position.weight", [f"{released}.position_embeddings.weight"])] + same(
                f"{released}.LayerNorm", f"{ours}.norm")


def self_attention_names(released: str, ours: str) -> list[tuple[str, list[str]]]:
    """BERT's self-attention with its output projection and LayerNorm."""
    return (fused(f"{released}.self", f"{ours}.attn.qkv", ("query", "key", "value"))
            + same(f"{released}.output.dense", f"{ours}.attn.out")
            + same(f"{released}.output.LayerNorm", f"{ours}.add.norm"))


def rest_of_layer_names(released: str, ours: str, cross: str, ffn: str,
                        twin: bool = False) -> list[tuple[str, list[str]]]:
    """Cross-attention (under our name `cross`, where there is one; `twin`: two of them) and
    feed-forward (under `ffn`) of a layer."""
    pairs = (same(f"{released}.intermediate.dense", f"{ours}.{ffn}.fc1")
             + same(f"{released}.output.dense", f"{ours}.{ffn}.fc2")
             + same(f"{released}.output.LayerNorm", f"{ours}.{ffn}.add.norm"))
    if cross:
        there, here = f"{released}.crossattention", f"{ours}.{cross}"
        # NLVR2 has two of them (self0, self1), which are put together behind their projections.
        for which, place in ((("", "attn"),) if not twin else (("0", "attn.twins.0"),
                                                               ("1", "attn.twins.1"))):
            pairs += (same(f"{there}.self{which}.query", f"{here}.{place}.q")
                      + fused(f"{there}.self{which}", f"{here}.{place}.kv", ("key", "value"))
                      + same(f"{there}.output.dense{which}", f"{here}.{place}.out"))
        pairs += same(f"{there}.output.LayerNorm", f"{here}.add.norm")
        pairs += same(f"{there}.output.merge_layer", f"{here}.attn.merge") if twin else []
    return pairs


def encoder_names(released: str, ours: str, depth: int, cross: str = "cross_attn",
                  twin: bool = False) -> list[tuple[str, list[str]]]:
    """An encoder: embeddings, bidirectional self-attention and the rest of each layer."""
    pairs = embedding_names(f"{released}.embeddings", f"{ours}.embeddings")
    for i in range(depth):
        there, here = f"{released}.encoder.layer.{i}", f"{ours}.layers.{i}"
        pairs += self_attention_names(f"{there}.attention", f"{here}.attn_bi")
        pairs += rest_of_layer_names(there, here, cross, "ffn", twin)
    return pairs


def pretrain_names(config: BLIPConfig) -> list[tuple[str, list[str]]]:
    """(our name, released names joined along dim 0) for every tensor of the released
    pretraining model."""
    pairs = [("temp", ["temp"])]
    for twin in ("", "_m"):
        pairs += vit_names(f"visual_encoder{twin}.", f"vit{twin}.", config.vit_depth)
        pairs += encoder_names(f"text_encoder{twin}", f"med{twin}", config.text_depth,
                               "" if twin else "cross_attn")
        pairs += (same(f"vision_proj{twin}", f"vision_proj{twin}")
                  + same(f"text_proj{twin}", f"text_proj{twin}"))
    pairs += same("itm_head", "itm_head")
    return pairs + decoder_names("text_decoder", config.text_depth)


def decoder_names(released: str, depth: int, ours: str = "med") -> list[tuple[str, list[str]]]:
    """(our name, released names) of a decoder. Its self-attention is its own; the rest is the
    encoder's, stored twice (in VQA all is its own)."""
    there, head = f"{released}.bert", f"{released}.cls.predictions"
    pairs = embedding_names(f"{there}.embeddings", f"{ours}.embeddings_dec")
    for i in range(depth):
        layer, here = f"{there}.encoder.layer.{i}", f"{ours}.layers.{i}"
        pairs += self_attention_names(f"{layer}.attention", f"{here}.attn_causal")
        pairs += rest_of_layer_names(layer, here, "cross_attn_dec", "ffn_dec")
    return (pairs + same(f"{head}.transform.dense", f"{ours}.lm_head.dense")
            + same(f"{head}.transform.LayerNorm", f"{ours}.lm_head.norm")
            + [(f"{ours}.lm_head.bias", [f"{head}.bias"])])


def names_of(kind: str, config: BLIPConfig) -> Names:
    """(our name, released names) for every tensor of a released model of this kind."""
    vit, depth = vit_names("visual_encoder.", "vit.", config.vit_depth), config.text_depth
    if kind == "vqa":
        return (vit + encoder_names("text_encoder", "question", depth)
                + decoder_names("text_decoder", depth, "answer"))
    if kind == "nlvr2":
        return (vit + encoder_names("text_encoder", "med", depth, twin=True)
                + same("cls_head.0", "head.0") + same("cls_head.2", "head.2"))
    return pretrain_names(config)


def kind_of(weights: dict[str, Tensor]) -> str:
    """What a released model was trained for."""
    encodes = "text_encoder.embeddings.word_embeddings.weight" in weights
    if "cls_head.0.weight" in weights:
        return "nlvr2"
    if "text_decoder.cls.predictions.bias" not in weights:
        return "retrieval"
    if not encodes:
        return "caption"
    return "pretrain" if "vision_proj.weight" in weights else "vqa"


def fill(model: BLIP, weights: dict[str, Tensor], names: Names, path) -> tuple[set, set]:
    """Copy what `weights` holds into the model, positions resized, word embeddings possibly more
    than given ([DEC] and [ENC] come after BERT's) -> data pointers of the parameters that were set,
    names that were used. Raises InputError where a size does not fit."""
    ours, found, used = model.state_dict(), set(), set()  # state_dict() aliases the parameters
    for name, sources in names:
        if not all(source in weights for source in sources):
            continue
        value = (torch.cat([weights[s] for s in sources]) if len(sources) > 1
                 else weights[sources[0]])
        if name.endswith("pos_embed"):
            value = resize_positions(value, ours[name].shape[1])
        target = ours[name]
        if name.endswith(("word.weight", "lm_head.bias")) and len(value) == len(target) - 2:
            target = target[:-2]
        if target.shape != value.shape:
            raise InputError(f"{path}: {sources[0]} makes {tuple(value.shape)} where the model has "
                             f"{tuple(target.shape)}; give weights of the model's size")
        target.copy_(value)
        found.add(ours[name].data_ptr())
        used.update(sources)
    return found, used


# ---- starting weights ----------------------------------------------------------------------------

def state_dict_of(path: str) -> dict[str, Tensor]:
    """The tensors of a file: a state dict, or one under "model" or "state_dict"."""
    weights = read(path)
    for key in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not weights or not all(
            isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} is not a state dict of tensors")
    return weights


def bert_names(config: BLIPConfig) -> Names:
    """(our name, released BERT names): encoder and decoder both start from it; cross-attention
    stays as it is."""
    pairs = embedding_names("embeddings", "med.embeddings")
    pairs += embedding_names("embeddings", "med.embeddings_dec")
    for i in range(config.text_depth):
        there, here = f"encoder.layer.{i}", f"med.layers.{i}"
        for attention, ffn in (("attn_bi", "ffn"), ("attn_causal", "ffn_dec")):
            pairs += self_attention_names(f"{there}.attention", f"{here}.{attention}")
            pairs += rest_of_layer_names(there, here, "", ffn)
    return (pairs + same("cls.predictions.transform.dense", "med.lm_head.dense")
            + same("cls.predictions.transform.LayerNorm", "med.lm_head.norm")
            + [("med.lm_head.bias", ["cls.predictions.bias"])])


def start_from(model: BLIP, vit: str = "", text: str = "") -> str:
    """Starting weights, and the momentum twins made equal to them -> what was used, what was not.

    vit: a DeiT or timm state dict of the model's width and depth, positions resized. text: a BERT
    state dict with the released key names. Raises InputError.
    """
    lines = []
    for path, names in ((vit, vit_names("", "vit.", model.config.vit_depth)),
                        (text, bert_names(model.config))):
        if not path:
            continue
        weights = {re.sub(r"^bert\.", "", name).replace("gamma", "weight").replace("beta", "bias"):
                   value for name, value in state_dict_of(path).items()}
        _, used = fill(model, weights, names, path)
        absent = [source for _, sources in names for source in sources if source not in weights]
        if len(used) < len(names) / 2:
            raise InputError(f"{path} lacks {absent[0]} and {len(absent) - 1} more: it is no "
                             f"{'ViT' if path == vit else 'BERT'} state dict")
        lines.append(f"{path}: {len(used)} tensors used; absent: {shorten(absent)}; left over: "
                     f"{shorten([name for name in weights if name not in used])}")
    model.update_momentum(0.0)
    return "\n".join(lines)


def shorten(names: list[str]) -> str:
    """The first names and how many more."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "none") + more


# ---- released models in --------------------------------------------------------------------------

# Released names of the ViT, and the transformers library's; the text's are the same.
VISION = (("visual_encoder.blocks.", "vision_model.encoder.layers."),
          ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
          ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
          ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
          ("visual_encoder.norm", "vision_model.post_layernorm"))
IN_A_BLOCK = ((".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."),
              (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."))


def translate(name: str, to_transformers: bool) -> str:
    """A key of one library -> the other's; a key that is the target's already stays."""
    pairs = VISION + (IN_A_BLOCK if ".blocks." in name or ".encoder.layers." in name else ())
    for pair in pairs:
        old, new = pair if to_transformers else pair[::-1]
        if new not in name:
            name = name.replace(old, new)
    return name


def infer_config(weights: dict[str, Tensor], path, vit_heads: int | None,
                 text_heads: int | None) -> BLIPConfig:
    """Sizes from the tensors' shapes. Heads leave no trace there: width / 64, as in BERT and ViT,
    unless given."""
    text = "text_encoder." if "text_encoder.embeddings.word_embeddings.weight" in weights else (
        "text_decoder.bert.")
    def size(name, dim):
        if name not in weights:
            raise InputError(f"{path} lacks {name}: this is not a released BLIP model of a "
                             "task that is known here")
        return weights[name].shape[dim]
    def heads(given, width, flag):
        if given is None and width % 64:
            raise InputError(f"the model's width {width} is no multiple of 64, so its number of "
                             f"attention heads cannot be told from the weights; give {flag}")
        if given is not None and width % given:
            raise InputError(f"{flag}={given} does not divide the model's width {width}")
        return given or width // 64
    def depth(pattern):
        return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, weights) if m),
                       default=-1)
    width, vocab = (size("visual_encoder.cls_token", 2),
                    size(f"{text}embeddings.word_embeddings.weight", 0))
    text_width = size(f"{text}embeddings.word_embeddings.weight", 1)
    patch, grid = (size("visual_encoder.patch_embed.proj.weight", 3),
                   round((size("visual_encoder.pos_embed", 1) - 1) ** 0.5))
    return BLIPConfig(
        image_size=grid * patch, patch_size=patch, vit_width=width,
        vit_depth=depth(r"visual_encoder\.blocks\.(\d+)\."),
        vit_heads=heads(vit_heads, width, "vit_heads"), text_width=text_width,
        text_depth=depth(re.escape(text) + r"encoder\.layer\.(\d+)\."),
        text_heads=heads(text_heads, text_width, "text_heads"),
        text_ffn=size(f"{text}encoder.layer.0.intermediate.dense.weight", 0),
        max_positions=size(f"{text}embeddings.position_embeddings.weight", 0),
        embed_dim=len(weights.get("vision_proj.weight", range(256))),
        queue_size=weights["image_queue"].shape[1] if "image_queue" in weights else 57600,
        vocab_size=vocab, dec_id=vocab - 2, enc_id=vocab - 1)


def load_released(path: str | Path, image_size: int | None = None, vit_heads: int | None = None,
                  text_heads: int | None = None,
                  tokenizer: Tokenizer | None = None) -> tuple[nn.Module, Report]:
    """A released BLIP model, or one with transformers' key names -> model of its task in eval mode,
    report.

    Positions are resized when `image_size` (pixels) differs from the stored grid. The special ids
    are BERT's unless a tokenizer is given. Raises InputError where the file or a size does not fit.
    """
    weights = {translate(name, False): value for name, value in state_dict_of(str(path)).items()}
    config = infer_config(weights, path, vit_heads, text_heads)
    if image_size is not None:
        config = replace(config, image_size=image_size)
    if tokenizer is not None:
        if len(tokenizer.vocab) != config.vocab_size:
            raise InputError(f"the vocabulary has {len(tokenizer.vocab)} tokens with [DEC] and "
                             f"[ENC], the word embeddings of {path} have {config.vocab_size}; give "
                             "the vocab.txt that it was trained with")
        config = replace(config, **tokenizer.config())
    kind = kind_of(weights)
    model = make_model(kind, config, weights)
    found, used = fill(model, weights, names_of(kind, config), path)
    if kind not in MODELS:
        found, used = fill_twins(model, weights, found, used)
    # Stored a second time, or constant: not information.
    redundant = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    left_over = [name for name in weights if name not in used and not name.endswith(redundant)]
    missing = [name for name, p in model.named_parameters() if p.data_ptr() not in found]
    return model.eval(), Report(missing, left_over, kind)


def fill_twins(model: BLIP, weights: dict[str, Tensor], found: set, used: set) -> tuple[set, set]:
    """Momentum twins and queues, as far as they are there -> found and used, with them."""
    if not any(name.startswith("visual_encoder_m.") for name in weights):
        model.update_momentum(0.0)  # no twins there: they start equal
        found |= {p.data_ptr() for _, p in model.twin_parameters}
    for name, ours in (("image_queue", model.image_queue), ("text_queue", model.text_queue),
                       ("idx_queue", model.queue_ids), ("queue_ptr", model.queue_ptr),
                       ("ptr_queue", model.queue_ptr)):
        if name in weights:
            ours.copy_(weights[name].T if name in ("image_queue", "text_queue")
                       else weights[name].reshape(ours.shape))
            used.add(name)
    return found, used


# ---- and out -------------------------------------------------------------------------------------

def export(model: BLIP, kind: str = "pretrain") -> dict[str, Tensor]:
    """State dict with the released key names. kind "caption" holds ViT and decoder, "retrieval"
    ViT, text encoder, projections and ITM head, "pretrain" all of it with twins and queues."""
    parts = {"caption": ("visual_encoder.", "text_decoder."),
             "retrieval": ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.",
                           "itm_head.")}.get(kind, ("",))
    ours, out = model.state_dict(), {}
    for name, sources in pretrain_names(model.config):
        if sources[0].startswith(parts):
            parts_of = ours[name].chunk(len(sources)) if len(sources) > 1 else [ours[name]]
            out |= {source: value.clone() for source, value in zip(sources, parts_of)}
    if kind != "retrieval":
        out["text_decoder.cls.predictions.decoder.weight"] = ours["med.embeddings.word.weight"]
        out["text_decoder.cls.predictions.decoder.bias"] = ours["med.lm_head.bias"]
    if kind == "pretrain":
        out |= {"image_queue": ours["image_queue"].T.clone(), "queue_ptr": ours["queue_ptr"][None],
                "text_queue": ours["text_queue"].T.clone()}
    return out


def transformers_configs(c: BLIPConfig) -> tuple[dict, dict]:
    """text_config and vision_config of the transformers library's BLIP."""
    text = dict(vocab_size=c.vocab_size, hidden_size=c.text_width, encoder_hidden_size=c.vit_width,
                intermediate_size=c.text_ffn, num_hidden_layers=c.text_depth,
                num_attention_heads=c.text_heads, max_position_embeddings=c.max_positions,
                hidden_act="gelu", layer_norm_eps=1e-12, bos_token_id=c.dec_id,
                eos_token_id=c.sep_id, pad_token_id=c.pad_id, sep_token_id=c.sep_id,
                projection_dim=c.embed_dim)
    vision = dict(hidden_size=c.vit_width, intermediate_size=4 * c.vit_width,
                  num_hidden_layers=c.vit_depth, num_attention_heads=c.vit_heads,
                  image_size=c.image_size, patch_size=c.patch_size, hidden_act="gelu",
                  layer_norm_eps=1e-6)
    return text, vision


def export_transformers(model: BLIP, tokenizer: Tokenizer, folder: Path, kind: str) -> None:
    """Write a folder that the transformers library loads with
    BlipForConditionalGeneration.from_pretrained (kind "caption") or BlipForImageTextRetrieval's
    ("retrieval"): pytorch_model.bin, config.json, vocab.txt."""
    c, (text, vision) = model.config, transformers_configs(model.config)
    heads = "BlipForConditionalGeneration" if kind == "caption" else "BlipForImageTextRetrieval"
    config = dict(architectures=[heads], model_type="blip", projection_dim=c.embed_dim,
                  image_text_hidden_size=c.embed_dim, text_config=text, vision_config=vision)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({translate(name, True): value for name, value in export(model, kind).items()},
               folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "vocab.txt").write_text("\n".join(tokenizer.vocab) + "\n", encoding="utf-8")
