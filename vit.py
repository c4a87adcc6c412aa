"""Vision transformer: image -> image tokens (BLIP sec. 3.1; Dosovitskiy et al. 2021;
DeiT's ViT-B/16).

    image (B, 3, S, S) -> patches (B, N-1, D) -> [CLS] + patches + positions -> depth x Block
    -> LayerNorm -> (B, N, D)

Pre-LN blocks. There is no pooling head: every token comes out, because the text transformer's
cross-attention looks at all of them; the first one, [CLS], is projected for the contrastive loss.
N = (S / patch)^2 + 1: 197 at 224 px, 577 at 384 px. B batch, S pixels, N tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import SelfAttention


class DropPath(nn.Module):
    """Drops a whole residual branch of a sample in training (stochastic depth).

    Huang et al. 2016; BLIP uses it in ViT-L, and in finetuning for VQA and NLVR2.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D): some samples zeroed, the others scaled up in return."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x))[0])
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """The image encoder.

    Sizes are in pixels. drop_path is the rate of the last block: it grows linearly from 0 at the
    first one. grad_checkpoint recomputes activations in the backward pass to save memory.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int,
                 drop_path: float = 0.0, grad_checkpoint: bool = False):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        self.patch_size, self.grad_checkpoint = patch_size, grad_checkpoint
        self.resize_positions = resize_positions  # CLIP's way is another one: blip2/vision.py
        # A convolution whose stride is its kernel is a linear layer on every patch.
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) -> tokens (B, N, D), [CLS] first.

        The image is normalised with CLIP's mean and std. S may differ from the size that the
        positions were made for: they are resized on the fly. Raises ValueError for another shape,
        and for bytes that nobody normalised.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] != image.shape[3]:
            raise ValueError(f"expected images (B, 3, S, S), got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise ValueError(f"expected normalised images, got {image.dtype}: see "
                             "data.images.prepare_images")
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.resize_positions(self.pos_embed, x.shape[1])
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)


def resize_positions(pos_embed: Tensor, tokens: int) -> Tensor:
    """Positions for another image size: [CLS] kept, the grid resized bicubically.

    pos_embed (1, 1 + g*g, D), tokens = 1 + t*t -> (1, tokens, D).
    So the paper goes from 224 px in pretraining to 384 px in finetuning (BLIP sec. 4.1).
    """
    if pos_embed.shape[1] == tokens:
        return pos_embed
    old, new = round((pos_embed.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if new * new != tokens - 1:
        raise ValueError(f"{tokens - 1} patches do not form a square grid")
    grid = pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, g, g)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)
