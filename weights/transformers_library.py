"""The transformers library's BLIP: its key names, and a folder that it loads."""

from pathlib import Path

import torch

from config import BLIPConfig
from data.files import make_folder, whole_file, write_json
from data.images import CLIP_MEAN, CLIP_STD
from data.text import Tokenizer

# Released names of the ViT, and the transformers library's; the text's are the same.
VISION = (("visual_encoder.blocks.", "vision_model.encoder.layers."),
          ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
          ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
          ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
          ("visual_encoder.norm", "vision_model.post_layernorm"))
IN_A_BLOCK = ((".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."),
              (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."))


def translate(name: str, pairs) -> str:
    """Replace the first of each pair by the second; a key that has the second already stays."""
    for old, new in pairs:
        if new not in name:
            name = name.replace(old, new)
    return name


def to_transformers(name: str) -> str:
    """A released key -> the transformers library's."""
    in_a_block = ".blocks." in name or ".encoder.layers." in name
    return translate(name, VISION + (IN_A_BLOCK if in_a_block else ()))


def from_transformers(name: str) -> str:
    """A key of the transformers library -> the released one."""
    in_a_block = ".blocks." in name or ".encoder.layers." in name
    pairs = VISION + (IN_A_BLOCK if in_a_block else ())
    return translate(name, [(theirs, released) for released, theirs in pairs])


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


def export_transformers(released: dict, c: BLIPConfig, tokenizer: Tokenizer, folder: Path,
                        kind: str) -> None:
    """Write a folder for `from_pretrained`, of the model and of BlipProcessor.

    For BlipForConditionalGeneration (kind "caption") or BlipForImageTextRetrieval ("retrieval").
    released: weights under the released names (weights.released.export).
    """
    text, vision = transformers_configs(c)
    heads = "BlipForConditionalGeneration" if kind == "caption" else "BlipForImageTextRetrieval"
    config = dict(architectures=[heads], model_type="blip", projection_dim=c.embed_dim,
                  image_text_hidden_size=c.embed_dim, text_config=text, vision_config=vision)
    make_folder(folder, "FOLDER")
    with whole_file(folder / "pytorch_model.bin", "wb") as file:
        torch.save({to_transformers(name): value for name, value in released.items()}, file)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", dict(
        image_processor_type="BlipImageProcessor", processor_class="BlipProcessor",
        do_resize=True, size=dict(height=c.image_size, width=c.image_size), resample=3,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD), do_convert_rgb=True))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="BertTokenizer", do_lower_case=True, model_max_length=c.max_positions))
    with whole_file(folder / "vocab.txt") as file:
        file.write("\n".join(tokenizer.vocab) + "\n")
