"""Our parameters' names beside the released ones.

Every mapping is a list of (our name, foreign names joined along dim 0): query, key and value are
one linear layer here. The decoder's shared parts are stored twice there.
"""

from config import BLIPConfig
from weights.files import Names


def fused(released: str, ours: str, parts: tuple[str, ...]) -> Names:
    """Our one linear layer for several released ones (query, key, value), weights and biases."""
    return [(f"{ours}.{kind}", [f"{released}.{part}.{kind}" for part in parts])
            for kind in ("weight", "bias")]


def same(released: str, ours: str) -> Names:
    """A layer that has the same two tensors here and there."""
    return [(f"{ours}.{kind}", [f"{released}.{kind}"]) for kind in ("weight", "bias")]


def vit_names(released: str, ours: str, depth: int) -> Names:
    """A ViT; the released names are timm's."""
    pairs = [(f"{ours}{name}", [f"{released}{name}"]) for name in ("cls_token", "pos_embed")]
    pairs += (same(f"{released}patch_embed.proj", f"{ours}patch_embed")
              + same(f"{released}norm", f"{ours}norm"))
    for i in range(depth):
        there, here = f"{released}blocks.{i}", f"{ours}blocks.{i}"
        for a, b in (("norm1", "norm1"), ("attn.qkv", "attn.qkv"), ("attn.proj", "attn.out"),
                     ("norm2", "norm2"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2")):
            pairs += same(f"{there}.{a}", f"{here}.{b}")
    return pairs


def embedding_names(released: str, ours: str) -> Names:
    """BERT's embeddings."""
    return [(f"{ours}.word.weight", [f"{released}.word_embeddings.weight"]),
            (f"{ours}.position.weight", [f"{released}.position_embeddings.weight"])] + same(
                f"{released}.LayerNorm", f"{ours}.norm")


def self_attention_names(released: str, ours: str) -> Names:
    """BERT's self-attention with its output projection and LayerNorm."""
    return (fused(f"{released}.self", f"{ours}.attn.qkv", ("query", "key", "value"))
            + same(f"{released}.output.dense", f"{ours}.attn.out")
            + same(f"{released}.output.LayerNorm", f"{ours}.add.norm"))


def rest_of_layer_names(released: str, ours: str, cross: str, ffn: str,
                        two_images: bool = False) -> Names:
    """Cross-attention and feed-forward of a layer, under our names `cross` and `ffn`.

    cross "": there is none; two_images: there are two of them (NLVR2).
    """
    pairs = (same(f"{released}.intermediate.dense", f"{ours}.{ffn}.fc1")
             + same(f"{released}.output.dense", f"{ours}.{ffn}.fc2")
             + same(f"{released}.output.LayerNorm", f"{ours}.{ffn}.add.norm"))
    if cross:
        there, here = f"{released}.crossattention", f"{ours}.{cross}"
        # NLVR2 has two of them (self0, self1), which are put together behind their projections.
        places = [("0", "attn.first"), ("1", "attn.second")] if two_images else [("", "attn")]
        for which, place in places:
            pairs += (same(f"{there}.self{which}.query", f"{here}.{place}.q")
                      + fused(f"{there}.self{which}", f"{here}.{place}.kv", ("key", "value"))
                      + same(f"{there}.output.dense{which}", f"{here}.{place}.out"))
        pairs += same(f"{there}.output.LayerNorm", f"{here}.add.norm")
        pairs += same(f"{there}.output.merge_layer", f"{here}.attn.merge") if two_images else []
    return pairs


def encoder_names(released: str, ours: str, depth: int, cross: str = "cross_attn",
                  two_images: bool = False) -> Names:
    """An encoder: embeddings, bidirectional self-attention and the rest of each layer."""
    pairs = embedding_names(f"{released}.embeddings", f"{ours}.embeddings")
    for i in range(depth):
        there, here = f"{released}.encoder.layer.{i}", f"{ours}.layers.{i}"
        pairs += self_attention_names(f"{there}.attention", f"{here}.attn_bi")
        pairs += rest_of_layer_names(there, here, cross, "ffn", two_images)
    return pairs


def pretrain_names(config: BLIPConfig) -> Names:
    """Every tensor of the released pretraining model."""
    pairs = [("temp", ["temp"])]
    for twin in ("", "_m"):
        pairs += vit_names(f"visual_encoder{twin}.", f"vit{twin}.", config.vit_depth)
        pairs += encoder_names(f"text_encoder{twin}", f"med{twin}", config.text_depth,
                               "" if twin else "cross_attn")
        pairs += (same(f"vision_proj{twin}", f"vision_proj{twin}")
                  + same(f"text_proj{twin}", f"text_proj{twin}"))
    pairs += same("itm_head", "itm_head")
    return pairs + decoder_names("text_decoder", config.text_depth)


def decoder_names(released: str, depth: int, ours: str = "med") -> Names:
    """A decoder. Its self-attention is its own; the rest is the encoder's, stored twice.

    (In VQA all is its own.)
    """
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
    """Every tensor of a released model of this kind."""
    vit, depth = vit_names("visual_encoder.", "vit.", config.vit_depth), config.text_depth
    if kind == "vqa":
        return (vit + encoder_names("text_encoder", "question", depth)
                + decoder_names("text_decoder", depth, "answer"))
    if kind == "nlvr2":
        return (vit + encoder_names("text_encoder", "med", depth, two_images=True)
                + same("cls_head.0", "head.0") + same("cls_head.2", "head.2"))
    return pretrain_names(config)
