"""Starting weights of a pretraining: an ImageNet ViT, BERT (BLIP sec. 4.1)."""

import re

from blip import BLIP
from config import BLIPConfig
from data.files import InputError
from weights.files import Names, fill, shorten, state_dict_of
from weights.names import (
    embedding_names,
    rest_of_layer_names,
    same,
    self_attention_names,
    vit_names,
)


def bert_names(config: BLIPConfig) -> Names:
    """BERT: encoder and decoder both start from it; cross-attention stays as it is."""
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
    """Load starting weights; the momentum twins become equal -> what was used, what not.

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
        # [DEC] and [ENC] come after BERT's words.
        _, used = fill(model, weights, names, path, new_words=2)
        absent = [source for _, sources in names for source in sources if source not in weights]
        if len(used) < len(names) / 2:
            raise InputError(f"{path} lacks {absent[0]} and {len(absent) - 1} more: it is no "
                             f"{'ViT' if path == vit else 'BERT'} state dict")
        lines.append(f"{path}: {len(used)} tensors used; absent: {shorten(absent)}; left over: "
                     f"{shorten([name for name in weights if name not in used])}")
    model.update_momentum(0.0)
    return "\n".join(lines)
