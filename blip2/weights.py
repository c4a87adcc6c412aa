"""Released BLIP-2 weights in: LAVIS' names and the transformers library's; ours out to the latter.

    load_stage1(weights, config)     blip2_qformer                 -> Stage1, report
    load_stage2(weights, config)     blip2_opt, blip2_t5           -> Stage2, report
    load_vision(weights, config)     EVA ViT-g/14, CLIP ViT-L/14   -> ImageEncoder
    load_language(weights, config)   OPT, T5                       -> DecoderLM, EncoderDecoderLM
    to_transformers(model)           -> state dict with the transformers library's names

`weights` is a file or a state dict. LAVIS saves what is trained: without the image encoder and,
mostly, the language model, which are loaded by themselves. Sizes are given (Blip2Config,
Stage2Config, LanguageConfig): heads leave no trace in weights.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from blip2.config import Blip2Config
from blip2.language import LanguageConfig, LanguageModel, make_language
from blip2.stage1 import Stage1
from blip2.stage2 import Stage2, Stage2Config
from blip2.vision import ImageEncoder, resize_clip_positions
from data.files import InputError
from weights.files import Names, fill, shorten, state_dict_of
from weights.names import fused, rest_of_layer_names, same, self_attention_names
from weights.released import Report

Weights = str | Path | dict[str, Tensor]

# The transformers library's names, and LAVIS'.
RENAMED = (("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
           ("qformer.encoder.", "Qformer.bert.encoder."),
           (".attention.attention.", ".attention.self."),
           (".crossattention.attention.", ".crossattention.self."),
           ("vision_model.post_layernorm.", "ln_vision."),
           ("vision_projection.", "vision_proj."), ("text_projection.", "text_proj."),
           ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
           ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
           ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
           ("vision_model.encoder.layers.", "visual_encoder.blocks."),
           (".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2."),
           (".self_attn.qkv.", ".attn.qkv."), (".self_attn.projection.", ".attn.proj."))
TEXT_EMBEDDINGS = (("embeddings.word_embeddings.", "Qformer.bert.embeddings.word_embeddings."),
                   ("embeddings.position_embeddings.",
                    "Qformer.bert.embeddings.position_embeddings."))


def from_transformers(name: str, language: str) -> str:
    """A key of the transformers library -> LAVIS'. language: opt or t5, "" for stage 1."""
    for part in ("model", "proj"):  # the language model's own names are the same in both
        theirs = {"model": "language_model.", "proj": "language_projection."}[part]
        if name.startswith(theirs):
            return name.replace(theirs, f"{language}_{part}.", 1)
    for theirs, released in RENAMED:
        name = name.replace(theirs, released)
    for theirs, released in TEXT_EMBEDDINGS:
        if name.startswith(theirs):
            name = name.replace(theirs, released)
    return name


def open_weights(weights: Weights, language: str = "") -> dict[str, Tensor]:
    """A state dict under LAVIS' names. Raises InputError for what holds none."""
    if not isinstance(weights, dict):
        weights = state_dict_of(str(weights))
    return {from_transformers(name, language): value for name, value in weights.items()}


# ---- names: (ours, released ones that are joined) ------------------------------------------------

def qformer_names(config: Blip2Config, text: bool) -> Names:
    """The Q-Former, ln_vision included."""
    there, here = "Qformer.bert", "qformer"
    pairs = [(f"{here}.queries", ["query_tokens"])] + same("ln_vision", "ln_vision")
    pairs += same(f"{there}.embeddings.LayerNorm", f"{here}.norm")
    for i in range(config.depth):
        layer, ours = f"{there}.encoder.layer.{i}", f"{here}.layers.{i}"
        pairs += self_attention_names(f"{layer}.attention", f"{ours}.attn")
        pairs += (same(f"{layer}.intermediate_query.dense", f"{ours}.ffn_query.fc1")
                  + same(f"{layer}.output_query.dense", f"{ours}.ffn_query.fc2")
                  + same(f"{layer}.output_query.LayerNorm", f"{ours}.ffn_query.add.norm"))
        looks = i % config.look_every == 0
        rest = rest_of_layer_names(layer, ours, "cross_attn" if looks else "", "ffn_text")
        pairs += [pair for pair in rest if text or ".ffn_text." not in pair[0]]
    if text:
        head = "Qformer.cls.predictions"
        pairs += [(f"{here}.{name}.weight", [f"{there}.embeddings.{name}_embeddings.weight"])
                  for name in ("word", "position")]
        pairs += (same(f"{head}.transform.dense", f"{here}.lm_head.dense")
                  + same(f"{head}.transform.LayerNorm", f"{here}.lm_head.norm")
                  + [(f"{here}.lm_head.bias", [f"{head}.bias"])])
    return pairs


def eva_names(config: Blip2Config, ours: str = "", released: str = "") -> Names:
    """EVA's ViT; the bias of q, k, v is put together beforehand."""
    pairs = [(f"{ours}{name}", [f"{released}{name}"]) for name in ("cls_token", "pos_embed")]
    pairs += same(f"{released}patch_embed.proj", f"{ours}patch_embed")
    for i in range(config.vit_depth):
        there, here = f"{released}blocks.{i}", f"{ours}blocks.{i}"
        for a, b in (("norm1", "norm1"), ("attn.qkv", "attn.qkv"), ("attn.proj", "attn.out"),
                     ("norm2", "norm2"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2")):
            pairs += same(f"{there}.{a}", f"{here}.{b}")
    return pairs


def clip_names(config: Blip2Config) -> Names:
    """CLIP's ViT. Our block 0 is its LayerNorm in front."""
    pairs = [("cls_token", ["class_embedding"]), ("pos_embed", ["positional_embedding"]),
             ("patch_embed.weight", ["conv1.weight"]), *same("ln_pre", "blocks.0")]
    for i in range(config.vit_depth):
        there, here = f"transformer.resblocks.{i}", f"blocks.{i + 1}"
        pairs += [(f"{here}.attn.qkv.{kind}", [f"{there}.attn.in_proj_{kind}"])
                  for kind in ("weight", "bias")]
        for a, b in (("ln_1", "norm1"), ("attn.out_proj", "attn.out"), ("ln_2", "norm2"),
                     ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2")):
            pairs += same(f"{there}.{a}", f"{here}.{b}")
    return pairs


def language_names(config: LanguageConfig, ours: str = "", released: str = "") -> Names:
    """OPT or T5, as the configuration says."""
    if config.kind == "decoder":
        there, here = f"{released}model.decoder.", ours
        pairs = [(f"{here}word.weight", [f"{there}embed_tokens.weight"]),
                 (f"{here}position.weight", [f"{there}embed_positions.weight"])]
        pairs += same(f"{there}final_layer_norm", f"{here}norm")
        for i in range(config.depth):
            a, b = f"{there}layers.{i}", f"{here}layers.{i}"
            pairs += fused(f"{a}.self_attn", f"{b}.attn.qkv", ("q_proj", "k_proj", "v_proj"))
            pairs += (same(f"{a}.self_attn.out_proj", f"{b}.attn.out")
                      + same(f"{a}.self_attn_layer_norm", f"{b}.norm1")
                      + same(f"{a}.final_layer_norm", f"{b}.norm2")
                      + same(f"{a}.fc1", f"{b}.fc1") + same(f"{a}.fc2", f"{b}.fc2"))
        return pairs
    names = {"word": "shared", "head": "lm_head"}
    for stack, attentions in (("encoder", ["SelfAttention"]),
                              ("decoder", ["SelfAttention", "EncDecAttention"])):
        names[f"{stack}.norm"] = f"{stack}.final_layer_norm"
        names[f"{stack}.relative"] = (f"{stack}.block.0.layer.0.SelfAttention."
                                      "relative_attention_bias")
        for i in range(config.depth):
            there, here = f"{stack}.block.{i}.layer", f"{stack}.layers.{i}"
            for j, attention in enumerate(attentions):
                name, norm = [("attn", "norm1"), ("cross_attn", "norm_cross")][j]
                names[f"{here}.{norm}"] = f"{there}.{j}.layer_norm"
                for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
                    names[f"{here}.{name}.{a}"] = f"{there}.{j}.{attention}.{b}"
            last = f"{there}.{len(attentions)}"
            names[f"{here}.norm2"] = f"{last}.layer_norm"
            for a, b in (("gate", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
                names[f"{here}.{a}"] = f"{last}.DenseReluDense.{b}"
    return [(f"{ours}{a}.weight", [f"{released}{b}.weight"]) for a, b in names.items()]


# ---- in ------------------------------------------------------------------------------------------

def load(model: nn.Module, weights: dict[str, Tensor], names: Names, path: str,
         kind: str) -> Report:
    """Copy what is there -> what was missing and what was left over. Raises InputError."""
    filled, used = fill(model, weights, names, path)
    if not used:
        raise InputError(f"{path} holds nothing of a BLIP-2 model of this kind ({kind}); its first "
                         f"names are {shorten(list(weights))}")
    # Stored a second time, or constant: not information.
    again = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
             "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
             "opt_model.lm_head.weight", "lm_head.decoder.weight")
    left_over = [name for name in weights if name not in used and not name.endswith(again)]
    missing = [name for name, p in model.named_parameters() if p.data_ptr() not in filled]
    return Report(missing, left_over, kind)


def load_stage1(weights: Weights, config: Blip2Config) -> tuple[Stage1, Report]:
    """A stage-1 model (blip2_qformer) of these sizes, in eval mode; missing, left over."""
    values = with_qkv_bias(open_weights(weights))
    model = Stage1(config)
    names = qformer_names(config, text=True) + [("temp", ["temp"])]
    for head in ("vision_proj", "text_proj", "itm_head"):
        names += same(head, head)
    names += eva_names(config, "vit.", "visual_encoder.")
    return model.eval(), load(model, values, names, name_of(weights), "blip2-stage1")


def load_stage2(weights: Weights, config: Stage2Config) -> tuple[Stage2, Report]:
    """A stage-2 model (blip2_opt, blip2_t5) of these sizes, in eval mode; missing, left over."""
    model = Stage2(config)
    language = "opt" if model.is_decoder else "t5"
    values = with_qkv_bias(open_weights(weights, language))
    names = qformer_names(config, text=config.question_to_queries)
    names += same(f"{language}_proj", "proj")
    names += language_names(model.language.config, "language.", f"{language}_model.")
    names += eva_names(config, "vit.", "visual_encoder.")
    return model.eval(), load(model, values, names, name_of(weights), "blip2-stage2")


def load_vision(weights: Weights, config: Blip2Config) -> ImageEncoder:
    """EVA's or CLIP's image encoder, positions resized to config.image_size; in eval mode.

    Its names may start with "visual_encoder.". Raises InputError where a weight is missing.
    """
    values = weights if isinstance(weights, dict) else state_dict_of(str(weights))
    values = {name.removeprefix("visual_encoder."): value for name, value in values.items()}
    model = ImageEncoder(config)
    if config.vision == "clip":
        values = dict(values)
        for name in ("class_embedding", "positional_embedding"):
            if name in values:
                values[name] = values[name].reshape(1, -1, config.vit_width)
        if "positional_embedding" in values:
            tokens = model.pos_embed.shape[1]
            values["positional_embedding"] = resize_clip_positions(values["positional_embedding"],
                                                                   tokens)
        nn.init.zeros_(model.patch_embed.bias)  # CLIP has none
        names = clip_names(config)
    else:
        values, names = with_qkv_bias(values), eva_names(config)
    report = load(model, values, names, name_of(weights), f"{config.vision} image encoder")
    missing = [name for name in report.missing if name != "patch_embed.bias"]
    if missing:
        raise InputError(f"{name_of(weights)} lacks {shorten(missing)}: it is no {config.vision} "
                         "image encoder of these sizes")
    return model.eval()


def load_language(weights: Weights, config: LanguageConfig) -> LanguageModel:
    """OPT's or T5's weights in a language model of these sizes, in eval mode."""
    values = weights if isinstance(weights, dict) else state_dict_of(str(weights))
    model = make_language(config)
    report = load(model, values, language_names(config), name_of(weights), config.kind)
    if report.missing:
        raise InputError(f"{name_of(weights)} lacks {shorten(report.missing)}: it is no "
                         f"{config.kind} of these sizes")
    return model.eval()


def with_qkv_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """EVA has biases of q and v, and none of k: one bias with zeros in the middle."""
    joined = {}
    for name, value in weights.items():
        if name.endswith(".attn.q_bias"):
            v_bias = weights[name.replace("q_bias", "v_bias")]
            name, value = name.replace("q_bias", "qkv.bias"), torch.cat(
                [value, torch.zeros_like(value), v_bias])
        if not name.endswith(".attn.v_bias"):
            joined[name] = value
    return joined


def name_of(weights: Weights) -> str:
    """For messages."""
    return "the state dict" if isinstance(weights, dict) else str(weights)


# ---- out -----------------------------------------------------------------------------------------

def to_transformers(model: Stage1 | Stage2) -> dict[str, Tensor]:
    """Our weights under the transformers library's names.

    For Blip2ForImageTextRetrieval or Blip2ForConditionalGeneration. The library has no ITG and no
    temperature: these stay behind.
    """
    ours, text = model.state_dict(), isinstance(model, Stage1)
    language = "" if text else "opt" if model.is_decoder else "t5"
    names = qformer_names(model.config, text) + eva_names(model.config, "vit.", "visual_encoder.")
    if text:
        for head in ("vision_proj", "text_proj", "itm_head"):
            names += same(head, head)
    else:
        names += same(f"{language}_proj", "proj")
        names += language_names(model.language.config, "language.", f"{language}_model.")
    released = {}
    for name, sources in names:
        if sources[0].startswith("Qformer.cls.") or name not in ours:
            continue
        for source, value in zip(sources, ours[name].chunk(len(sources))):
            released[source] = value.clone()
    return {names_there(name): value for name, value in released.items()}


def names_there(name: str) -> str:
    """A key of LAVIS -> the transformers library's."""
    for theirs, released in TEXT_EMBEDDINGS:
        name = name.replace(released, theirs)
    for theirs, released in RENAMED:
        if name.startswith(("opt_model.", "t5_model.")):
            break
        name = name.replace(released, theirs)
    return re.sub(r"^(opt|t5)_(proj|model)\.",
                  lambda m: {"proj": "language_projection.", "model": "language_model."}[m[2]],
                  name)
