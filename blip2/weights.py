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
from weights.names import fused, rest_of_layer_names, same, self_attention_names, vit_names
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


def vision_names(config: Blip2Config, ours: str = "", released: str = "") -> Names:
    """The image encoder: timm's names, or CLIP's. (`prepare_vision` comes first.)"""
    if config.vision == "clip":
        return clip_names(config, ours, released)
    names = vit_names(released, ours, config.vit_depth)
    return [pair for pair in names if not pair[0].startswith(f"{ours}norm.")]  # there is none


def clip_names(config: Blip2Config, ours: str, released: str) -> Names:
    """CLIP's ViT. Our block 0 is its LayerNorm in front."""
    pairs = [(f"{ours}cls_token", [f"{released}class_embedding"]),
             (f"{ours}pos_embed", [f"{released}positional_embedding"]),
             *same(f"{released}conv1", f"{ours}patch_embed"),
             *same(f"{released}ln_pre", f"{ours}blocks.0")]
    for i in range(config.vit_depth):
        there, here = f"{released}transformer.resblocks.{i}", f"{ours}blocks.{i + 1}"
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
        if not config.tied:
            pairs.append((f"{here}head.weight", [f"{released}lm_head.weight"]))
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
             "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    left_over = [name for name in weights if name not in used and not name.endswith(again)]
    missing = [name for name, p in model.named_parameters() if p.data_ptr() not in filled]
    missing.sort(key=lambda name: name.startswith("vit."))  # last: stage 1's files never hold it
    return Report(missing, left_over, kind)


def load_stage1(weights: Weights, config: Blip2Config) -> tuple[Stage1, Report]:
    """A stage-1 model (blip2_qformer) of these sizes, in eval mode; missing, left over."""
    values = prepare_vision(open_weights(weights), config, "visual_encoder.")
    model = Stage1(config)
    names = qformer_names(config, text=True) + [("temp", ["temp"])]
    for head in ("vision_proj", "text_proj", "itm_head"):
        names += same(head, head)
    names += vision_names(config, "vit.", "visual_encoder.")
    return model.eval(), load(model, values, names, name_of(weights), "blip2-stage1")


def load_stage2(weights: Weights, config: Stage2Config) -> tuple[Stage2, Report]:
    """A stage-2 model (blip2_opt, blip2_t5) of these sizes, in eval mode; missing, left over.

    A language model of the transformers library has its weights already: the file's are not read.
    """
    model = Stage2(config)
    language = "opt" if model.is_decoder else "t5"
    values = prepare_vision(open_weights(weights, language), config, "visual_encoder.")
    names = qformer_names(config, text=config.question_to_queries)
    names += same(f"{language}_proj", "proj")
    if "name" in config.language:
        values = {name: value for name, value in values.items()
                  if not name.startswith(f"{language}_model.")}
    else:
        check_head(values, model.language.config, f"{language}_model.", name_of(weights))
        names += language_names(model.language.config, "language.", f"{language}_model.")
    names += vision_names(config, "vit.", "visual_encoder.")
    return model.eval(), load(model, values, names, name_of(weights), "blip2-stage2")


def load_vision(weights: Weights, config: Blip2Config) -> ImageEncoder:
    """EVA's or CLIP's image encoder in eval mode, positions resized to config.image_size.

    It is frozen, unless config.train_vision says otherwise. Its names may start with
    "visual_encoder.". Raises InputError where a weight is missing.
    """
    values = weights if isinstance(weights, dict) else state_dict_of(str(weights))
    values = {name.removeprefix("visual_encoder."): value for name, value in values.items()}
    model, path = ImageEncoder(config), name_of(weights)
    report = load(model, prepare_vision(values, config), vision_names(config), path,
                  f"{config.vision} image encoder")
    if report.missing:
        raise InputError(f"{path} lacks {shorten(report.missing)}: it is no {config.vision} image "
                         "encoder of these sizes")
    return model.eval().requires_grad_(config.train_vision)


def load_language(weights: Weights, config: LanguageConfig) -> LanguageModel:
    """OPT's or T5's weights in a language model of these sizes, in eval mode, frozen.

    Raises InputError where a weight is missing or left over.
    """
    values = weights if isinstance(weights, dict) else state_dict_of(str(weights))
    model, path = make_language(config), name_of(weights)
    check_head(values, config, "", path)
    report = load(model, values, language_names(config), path, config.kind)
    for what, names in (("lacks", report.missing), ("has other weights", report.left_over)):
        if names:
            raise InputError(f"{path} {what}: {shorten(names)}; it is no {config.kind} of these "
                             "sizes that blip2/language.py has")
    return model.eval().requires_grad_(False)


def check_head(weights: dict[str, Tensor], config: LanguageConfig, prefix: str, path: str) -> None:
    """InputError where the head is tied to the word embeddings in one of the two, not in both."""
    decoder = config.kind == "decoder"
    embedding = "model.decoder.embed_tokens.weight" if decoder else "shared.weight"
    head, words = (weights.get(prefix + name) for name in ("lm_head.weight", embedding))
    if head is None or words is None:
        return
    tied = torch.equal(head, words)
    if decoder and config.tied and not tied:
        raise InputError(f"{path} has a head of its own: give LanguageConfig(tied=False)")
    if not decoder and tied:
        raise InputError(f"{path} is a T5 whose head is its word embeddings; only T5 1.1 and "
                         "FlanT5 fit, any other goes through the transformers library")


def prepare_vision(weights: dict[str, Tensor], config: Blip2Config,
                   prefix: str = "") -> dict[str, Tensor]:
    """The same weights, those of the image encoder in the form that ours has.

    EVA: one bias for q, k and v. CLIP: tokens and positions (1, N, D), positions resized, a bias
    of 0 for the patches.
    """
    if config.vision != "clip":
        return with_qkv_bias(weights)
    values = dict(weights)
    for name in ("class_embedding", "positional_embedding"):
        if f"{prefix}{name}" in values:
            value = values[f"{prefix}{name}"]
            values[f"{prefix}{name}"] = value.reshape(1, -1, value.shape[-1])
    if f"{prefix}positional_embedding" in values:
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        values[f"{prefix}positional_embedding"] = resize_clip_positions(
            values[f"{prefix}positional_embedding"], tokens)
    if f"{prefix}conv1.weight" in values:
        values[f"{prefix}conv1.bias"] = torch.zeros(len(values[f"{prefix}conv1.weight"]))
    return values


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
    temperature: these stay behind. Raises InputError for what the library's model cannot hold:
    CLIP, a language model that is no OPT or T5, queries that read a question.
    """
    if getattr(model.config, "question_to_queries", False):
        raise InputError("in the transformers library's BLIP-2 the Q-Former does not read the "
                         "question; a model of blip2-vqa cannot be written for it")
    ours, text = model.state_dict(), isinstance(model, Stage1)
    if model.config.vision == "clip":
        raise InputError("the transformers library's BLIP-2 has EVA's image encoder, not CLIP's")
    language = "" if text else "opt" if model.is_decoder else "t5"
    names = qformer_names(model.config, text) + vision_names(model.config, "vit.",
                                                             "visual_encoder.")
    of_library = {}  # a language model of the library, under its own names
    if text:
        for head in ("vision_proj", "text_proj", "itm_head"):
            names += same(head, head)
    else:
        names += same(f"{language}_proj", "proj")
        if "name" in model.config.language:
            of_library = model.language.model.state_dict()
        else:
            names += language_out(model.language.config, language)
    released = {}
    for name, sources in names:
        if sources[0].startswith("Qformer.cls.") or name not in ours:
            continue
        for source, value in zip(sources, ours[name].chunk(len(sources))):
            released[source] = value.clone()
    return {names_there(name): value for name, value in released.items()} | {
        f"language_model.{name}": value.clone() for name, value in of_library.items()}


def language_out(config: LanguageConfig, language: str) -> Names:
    """Names of our own language model. Raises InputError for what is no OPT or T5."""
    if config.kind == "decoder" and (config.near_heads or not config.tied):
        raise InputError("this language model is no OPT: it has near heads (--near-heads) or a "
                         "head of its own (--tied false), which the library's OPT lacks")
    return language_names(config, "language.", f"{language}_model.")


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
