"""Checkpoints: written atomically, read without running any code in them; released BLIP weights in.

    save(path, state)      a run's whole state
    load(path)             that state, checked
    load_model(path)       -> (model, tokenizer): a checkpoint is enough to rebuild both
    open_model(path, ...)  the same for a purpose, which the checkpoint's task must fit
    initialise(new, old)   start a finetuning from another model's weights
    load_released(path)    -> (model, report) from a state dict with the released code's key names
"""

import os
import pickle
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from blip import BLIP, BLIPConfig
from data import InputError, Tokenizer
from vit import resize_positions


def save(path: str | Path, state: dict, keep: int = 1) -> None:
    """Write `state` to path + ".tmp", flush it to the disk, then rename: the old file is whole
    until the new one is. With keep > 1 the last so many stay, as checkpoint-STEP.pt beside
    checkpoint.pt, which is the newest."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep > 1:
            numbered = path.with_name(f"{path.stem}-{state['step']:08d}{path.suffix}")
            numbered.unlink(missing_ok=True)
            os.link(temporary, numbered)  # the same file under a second name
            for old in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))[:-keep]:
                old.unlink()
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise InputError(f"checkpoint {path} could not be written ({str(error).splitlines()[0]}); "
                         "the previous one, if any, is as it was")


def read(path: str | Path) -> dict:
    """torch.load with weights_only=True: a file that holds anything but tensors and plain values
    is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist; check the path")
    except pickle.UnpicklingError:
        raise InputError(f"checkpoint {path} holds pickled code or is no checkpoint: refused, "
                         "because loading it could run that code; save a plain state dict of "
                         "tensors instead")
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint {path} cannot be read ({str(error).splitlines()[0]}); it may "
                         "be cut short")


def load(path: str | Path) -> dict:
    """A checkpoint of this project; InputError if the file is something else."""
    state = read(path)
    if not isinstance(state, dict) or not {"model", "model_config", "tokenizer"} <= state.keys():
        raise InputError(f"{path} is not a checkpoint of this project; released weights go through "
                         "load_released")
    return state


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[BLIP, Tokenizer]:
    """-> the model, in eval mode, and its tokenizer."""
    model, tokenizer, _ = open_model(path, device=device)
    return model, tokenizer


def open_model(path: str | Path, needs: tuple[str, ...] = (), vocab: str = "",
               device: str | torch.device = "cpu") -> tuple[BLIP, Tokenizer, dict]:
    """A checkpoint of this project or released weights (these need BERT's vocab.txt as `vocab`) ->
    the model, in eval mode, its tokenizer, and the settings that it was trained with.

    `needs` names the objectives that must have been trained: a model finetuned for captions can no
    longer match. Raises InputError.
    """
    state = read(path)
    if not isinstance(state, dict) or "model_config" not in state:
        if not vocab:
            raise InputError(f"{path} is not a checkpoint of this project; if it holds released "
                             "weights, give --vocab with the vocab.txt of bert-base-uncased")
        tokenizer = Tokenizer.from_file(vocab)
        model, report = load_released(path, tokenizer=tokenizer)
        print(report, file=sys.stderr)
        return model.to(device), tokenizer, {}
    settings = state.get("train_config", {})
    untrained = [name for name in needs if not settings.get(f"{name}_weight", 1.0)]
    if untrained:
        losses = " and ".join(map(str.upper, untrained))
        raise InputError(f"{path} is a checkpoint of another task ({settings.get('task')}): it was "
                         f"trained without {losses}, which this needs; give one of pretraining, "
                         "or one finetuned for this")
    known = {f.name for f in fields(BLIPConfig)}
    model = BLIP(BLIPConfig(**{k: v for k, v in state["model_config"].items() if k in known}))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), Tokenizer(state["tokenizer"]), settings


def initialise(model: BLIP, source: BLIP) -> None:
    """Copy the weights of `source`, positions resized to the model's grid; the queues too unless
    their length differs, which then start anew."""
    ours = model.state_dict()  # aliases the parameters
    for name, value in source.state_dict().items():
        if name.endswith("pos_embed"):
            value = resize_positions(value, ours[name].shape[1])
        if ours[name].shape == value.shape:
            ours[name].copy_(value)
    if model.config.queue_size != source.config.queue_size:
        model.queue_ptr.zero_()


# ---- released weights ----------------------------------------------------------------------------

@dataclass
class Report:
    """What a foreign state dict did not hold (`missing`, our names) and what was not used
    (`left_over`, its names)."""

    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def short(names):
            return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        lines = ([f"missing, left at their initial values: {short(self.missing)}"]
                 if self.missing else [])
        lines += [f"left over, not used: {short(self.left_over)}"] if self.left_over else []
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


def rest_of_layer_names(released: str, ours: str, cross: str,
                        ffn: str) -> list[tuple[str, list[str]]]:
    """Cross-attention (under our name `cross`, where there is one) and feed-forward (under `ffn`)
    of a layer."""
    pairs = (same(f"{released}.intermediate.dense", f"{ours}.{ffn}.fc1")
             + same(f"{released}.output.dense", f"{ours}.{ffn}.fc2")
             + same(f"{released}.output.LayerNorm", f"{ours}.{ffn}.add.norm"))
    if cross:
        there, here = f"{released}.crossattention", f"{ours}.{cross}"
        pairs += (same(f"{there}.self.query", f"{here}.attn.q")
                  + fused(f"{there}.self", f"{here}.attn.kv", ("key", "value"))
                  + same(f"{there}.output.dense", f"{here}.attn.out")
                  + same(f"{there}.output.LayerNorm", f"{here}.add.norm"))
    return pairs


def pretrain_names(config: BLIPConfig) -> list[tuple[str, list[str]]]:
    """(our name, released names joined along dim 0) for every tensor of the released
    pretraining model."""
    pairs = [("temp", ["temp"])]
    for twin in ("", "_m"):
        text, med = f"text_encoder{twin}", f"med{twin}"
        pairs += vit_names(f"visual_encoder{twin}.", f"vit{twin}.", config.vit_depth)
        pairs += embedding_names(f"{text}.embeddings", f"{med}.embeddings")
        pairs += (same(f"vision_proj{twin}", f"vision_proj{twin}")
                  + same(f"text_proj{twin}", f"text_proj{twin}"))
        for i in range(config.text_depth):
            there, here = f"{text}.encoder.layer.{i}", f"{med}.layers.{i}"
            pairs += self_attention_names(f"{there}.attention", f"{here}.attn_bi")
            pairs += rest_of_layer_names(there, here, "" if twin else "cross_attn", "ffn")
    pairs += same("itm_head", "itm_head")
    return pairs + decoder_names("text_decoder", config.text_depth)


def decoder_names(released: str, depth: int) -> list[tuple[str, list[str]]]:
    """(our name, released names) of a decoder. Its self-attention is its own; the rest is the
    encoder's, stored twice."""
    there, head = f"{released}.bert", f"{released}.cls.predictions"
    pairs = embedding_names(f"{there}.embeddings", "med.embeddings_dec")
    for i in range(depth):
        layer, here = f"{there}.encoder.layer.{i}", f"med.layers.{i}"
        pairs += self_attention_names(f"{layer}.attention", f"{here}.attn_causal")
        pairs += rest_of_layer_names(layer, here, "cross_attn_dec", "ffn_dec")
    return (pairs + same(f"{head}.transform.dense", "med.lm_head.dense")
            + same(f"{head}.transform.LayerNorm", "med.lm_head.norm")
            + [("med.lm_head.bias", [f"{head}.bias"])])


def infer_config(weights: dict[str, Tensor], vit_heads: int | None,
                 text_heads: int | None) -> BLIPConfig:
    """Sizes from the tensors' shapes. Heads leave no trace there: width / 64, as in BERT and ViT,
    unless given."""
    def size(name, dim):
        if name not in weights:
            raise InputError(f"the weights lack {name}: this is not a released BLIP pretraining "
                             "model")
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
    vit, text = "visual_encoder.", "text_encoder."
    width, text_width = (size(f"{vit}cls_token", 2),
                         size(f"{text}embeddings.word_embeddings.weight", 1))
    patch, grid = (size(f"{vit}patch_embed.proj.weight", 3),
                   round((size(f"{vit}pos_embed", 1) - 1) ** 0.5))
    vocab = size(f"{text}embeddings.word_embeddings.weight", 0)
    return BLIPConfig(
        image_size=grid * patch, patch_size=patch, vit_width=width,
        vit_depth=depth(r"visual_encoder\.blocks\.(\d+)\."),
        vit_heads=heads(vit_heads, width, "vit_heads"), text_width=text_width,
        text_depth=depth(r"text_encoder\.encoder\.layer\.(\d+)\."),
        text_heads=heads(text_heads, text_width, "text_heads"),
        text_ffn=size(f"{text}encoder.layer.0.intermediate.dense.weight", 0),
        max_positions=size(f"{text}embeddings.position_embeddings.weight", 0),
        embed_dim=size("vision_proj.weight", 0),
        queue_size=weights["image_queue"].shape[1] if "image_queue" in weights else 57600,
        vocab_size=vocab, dec_id=vocab - 2, enc_id=vocab - 1)


def load_released(path: str | Path, image_size: int | None = None, vit_heads: int | None = None,
                  text_heads: int | None = None,
                  tokenizer: Tokenizer | None = None) -> tuple[BLIP, Report]:
    """Read a released BLIP pretraining model (state dict, or {"model": state dict}) -> model in
    eval mode, report.

    Positions are resized when `image_size` (pixels) differs from the stored grid. The special ids
    are BERT's unless a tokenizer is given. Raises InputError where the file or a size does not fit.
    """
    weights = read(path)
    weights = weights.get("model", weights) if isinstance(weights, dict) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} is not a state dict of tensors")
    config = infer_config(weights, vit_heads, text_heads)
    if image_size is not None:
        config = replace(config, image_size=image_size)
    if tokenizer is not None:
        config = replace(config, **tokenizer.config())
    model = BLIP(config)
    ours, used, report = model.state_dict(), set(), Report()
    found = set()
    for name, sources in pretrain_names(config):
        if not all(source in weights for source in sources):
            continue
        value = (torch.cat([weights[s] for s in sources])
                 if len(sources) > 1 else weights[sources[0]])
        if name.endswith("pos_embed"):
            value = resize_positions(value, ours[name].shape[1])
        if ours[name].shape != value.shape:
            raise InputError(f"{path}: {sources[0]} makes {tuple(value.shape)} where the model has "
                             f"{tuple(ours[name].shape)}")
        ours[name].copy_(value)  # state_dict() aliases the parameters
        found.add(ours[name].data_ptr())
        used.update(sources)
    if "image_queue" in weights:
        model.image_queue.copy_(weights["image_queue"].T)
        model.text_queue.copy_(weights["text_queue"].T)
        model.queue_ptr.copy_(weights["queue_ptr"].squeeze()
                              if "queue_ptr" in weights else torch.tensor(0))
        used.update(("image_queue", "text_queue", "queue_ptr"))
    # Stored a second time, or constant: not information.
    redundant = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    report.left_over = [name for name in weights
                        if name not in used and not name.endswith(redundant)]
    report.missing = [name for name, p in model.named_parameters() if p.data_ptr() not in found]
    return model.eval(), report
