"""BLIP-2, stage 1: the queries learn to extract what a text needs (sec. 3.1).

    image -> frozen image encoder -> LayerNorm -> keys and values for the queries
    loss = ITC + ITM + ITG        BLIP's three, with the queries as the only door to the image

No queue, no momentum twins: the image encoder is frozen, so large batches fit, and their other
texts are negatives enough. The queries are run once a step: ITG's text reads their keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import Blip2Config
from blip2.qformer import QFormer
from blip2.vision import ImageEncoder

LayerKV = list[tuple[Tensor, Tensor] | None]  # of the images: (B, H, N, d) for layers that look


class FrozenVision(nn.Module):
    """What both stages have in common: an image encoder, usually frozen, and its norm."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        self.vit = ImageEncoder(config)
        self.ln_vision = nn.LayerNorm(config.vit_width)  # eps 1e-5; trained
        self.vit.requires_grad_(config.train_vision)

    def train(self, mode: bool = True):
        """Training mode, but for what is frozen."""
        super().train(mode)
        self.vit.train(mode and self.config.train_vision)
        return self

    def encode_tokens(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S), or tokens (B, N, vit width) of the encoder -> normalised tokens."""
        if image.ndim == 4:
            with torch.set_grad_enabled(self.config.train_vision and torch.is_grad_enabled()):
                image = self.vit(image)
        # In float32, as the released code does: frozen encoders run in half precision.
        return F.layer_norm(image.float(), self.ln_vision.normalized_shape, self.ln_vision.weight,
                            self.ln_vision.bias, self.ln_vision.eps)


def make_qformer(config: Blip2Config, text: bool) -> QFormer:
    """The Q-Former that the configuration describes, with or without a text stream."""
    c = config
    return QFormer(c.queries, c.width, c.vit_width, c.depth, c.heads, c.ffn, c.dropout,
                   c.look_every, c.vocab_size if text else 0, c.max_positions, c.dec_id)
