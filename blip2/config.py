"""The settings of a BLIP-2 model. The defaults are the paper's: ViT-g/14, BERT-base, 32 queries.

Every field is a flag of `train.py blip2-...`, but for what the tokenizer decides. Fields that have
the same name in config.BLIPConfig have the same meaning: stage 1 takes the image encoder's from the
BLIP that it starts from.
"""

from dataclasses import dataclass

from config import SettingError, check_multiples, check_settings, setting


@dataclass(frozen=True)
class Blip2Config:
    """Image encoder, Q-Former and, in stage 2, language model."""

    vision: str = setting("eva", "image encoder: eva (ViT-g/14 of EVA-CLIP), clip (ViT-L/14), vit "
                                 "(this project's)", choices=("eva", "clip", "vit"),
                          in_weights=True)
    image_size: int = setting(224, "pixels, square (BLIP-2 sec. 3.4)", least=1, most=8192)
    patch_size: int = setting(14, "pixels", least=1, most=8192, in_weights=True)
    vit_width: int = setting(1408, "ViT-g", least=1, most=16384, in_weights=True)
    vit_depth: int = setting(39, "ViT-g has 40 blocks: the last one is not used (BLIP-2 sec. 3.4); "
                                 "0: no image encoder, tokens are given", least=0, most=1000,
                           in_weights=True)
    vit_heads: int = setting(16, "ViT-g", least=1, most=16384, in_weights=True)
    vit_ffn: int = setting(6144, "ViT-g", least=1, most=65536, in_weights=True)
    drop_path: float = setting(0.0, "of the last block, where the image encoder is trained",
                               least=0, most=0.99)
    grad_checkpoint: bool = setting(False, "recompute the image encoder's activations, where it is "
                                           "trained")
    train_vision: bool = setting(False, "train the image encoder too (finetuning, BLIP-2 sec. 4.2)")
    queries: int = setting(32, "learned queries (BLIP-2 sec. 3.1)", least=1, most=65536,
                         in_weights=True)
    width: int = setting(768, "of the Q-Former: BERT-base", least=1, most=16384, in_weights=True)
    depth: int = setting(12, "BERT-base", least=1, most=1000, in_weights=True)
    heads: int = setting(12, "BERT-base", least=1, most=16384, in_weights=True)
    ffn: int = setting(3072, "BERT-base", least=1, most=65536, in_weights=True)
    look_every: int = setting(2, "2: cross-attention in every second layer, from the first",
                              least=1, in_weights=True)
    max_positions: int = setting(512, "BERT-base", least=4, most=65536, in_weights=True)
    dropout: float = setting(0.1, "in the Q-Former", least=0, most=0.99)
    init_std: float = setting(0.02, "of the initial weights (BERT; released code); 0: by width, "
                                    "for narrow models", least=0)
    embed_dim: int = setting(256, "joint space of the contrastive loss", least=1, most=16384,
                           in_weights=True)
    temp: float = setting(0.07, "initial temperature, learned, not clamped", above=0,
                          in_weights=True)
    label_smoothing: float = setting(0.1, "of ITC (released code)", least=0, most=0.99)
    itg_smoothing: float = setting(0.1, "of ITG (released code)", least=0, most=0.99)
    hard_negatives: bool = setting(True, "ITM's negatives by similarity; false: at random")
    # The text stream's vocabulary, from the tokenizer.
    vocab_size: int = setting(30523, "BERT uncased + [DEC]", flag=False, in_weights=True)
    pad_id: int = setting(0, "the tokenizer's", flag=False, in_weights=True)
    cls_id: int = setting(101, "the tokenizer's", flag=False, in_weights=True)
    sep_id: int = setting(102, "the tokenizer's", flag=False, in_weights=True)
    dec_id: int = setting(30522, "the tokenizer's", flag=False, in_weights=True)

    def __post_init__(self):
        check_settings(self)
        check_multiples(self, ("width", "heads"))
        if self.vit_depth:
            check_multiples(self, ("vit_width", "vit_heads"), ("image_size", "patch_size"))
        if self.dec_id >= self.vocab_size:
            raise SettingError(f"dec_id {self.dec_id} is not in a vocabulary of {self.vocab_size}; "
                               "give the tokenizer's dec_id, cls_id, sep_id and pad_id too")
