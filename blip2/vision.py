"""The image encoders under the Q-Former: EVA's ViT-g/14, CLIP's ViT-L/14, this project's ViT.

All three are vit.ViT without the final norm, and without the last block: BLIP-2 reads the second
last layer, which "leads to slightly better performance" (sec. 3.4), and puts a LayerNorm of its own
on top. (The tiny preset keeps all of its four blocks.) They differ in what the table says.

            width of the MLP   activation   in front of the blocks   biases of q, k, v
    eva     6144 (4.36 x)      GELU         -                        q and v (k: 0)
    clip    4 x                quick GELU   LayerNorm                all
    vit     4 x                GELU         -                        all
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import Blip2Config
from vit import Block, ViT


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU. (...) -> (...)."""
    return x * torch.sigmoid(1.702 * x)


class EncoderBlock(Block):
    """A ViT block with an MLP of any width, another activation or eps."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float, clip: bool):
        super().__init__(width, heads, drop_path)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = quick_gelu if clip else F.gelu
        if clip:
            self.norm1.eps = self.norm2.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x))[0])
        return x + self.drop_path(self.fc2(self.activation(self.fc1(self.norm2(x)))))


class ImageEncoder(ViT):
    """Image (B, 3, S, S) -> tokens (B, N, D), [CLS] first, of the last block that it has.

    In the paper that is the second last of the original encoder (sec. 3.4).
    """

    def __init__(self, config: Blip2Config):
        c, clip = config, config.vision == "clip"
        super().__init__(c.image_size, c.patch_size, c.vit_width, 0, c.vit_heads,
                         grad_checkpoint=c.grad_checkpoint)
        rates = [c.drop_path * i / max(c.vit_depth - 1, 1) for i in range(c.vit_depth)]
        self.blocks = nn.ModuleList(
            EncoderBlock(c.vit_width, c.vit_heads, c.vit_ffn, rate, clip) for rate in rates)
        if clip:  # it normalises once more, before the first block
            self.blocks.insert(0, nn.LayerNorm(c.vit_width, eps=1e-5))
            self.resize_positions = resize_clip_positions
        self.norm = nn.Identity()


def resize_clip_positions(pos_embed: Tensor, tokens: int) -> Tensor:
    """As vit.resize_positions, but the corners of the old and the new grid coincide.

    (The released code resizes CLIP's positions so, and EVA's as vit.py does.)
    pos_embed (1, 1 + g*g, D), tokens = 1 + t*t -> (1, tokens, D).
    """
    old, new = round((pos_embed.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if old == new:
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, g, g)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)
