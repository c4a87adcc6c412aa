"""2. Image-text contrast: the answer of the model against the softened truth."""

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_loss(image_feat: Tensor, text_feat: Tensor, image_keys: Tensor, text_keys: Tensor,
             temp: Tensor | float, alpha: float, positives: Tensor | None = None) -> Tensor:
    """Features (B, E) and keys (C, E) -> scalar."""
    with torch.no_grad():
        if positives is None:
            truth = torch.eye(len(image_feat), len(image_keys))
        else:
            truth = positives.float() / positives.sum(1, keepdim=True)
        image_feat_m = image_keys[:len(image_feat)]
        text_feat_m = text_keys[:len(text_feat)]
        predicted_i2t = (image_feat_m @ text_keys.T / temp).softmax(1)
        predicted_t2i = (text_feat_m @ image_keys.T / temp).softmax(1)
        target_i2t = alpha * predicted_i2t + (1 - alpha) * truth
        target_t2i = alpha * predicted_t2i + (1 - alpha) * truth
    loss_i2t = F.cross_entropy(image_feat @ text_keys.T / temp, target_i2t)
    loss_t2i = F.cross_entropy(text_feat @ image_keys.T / temp, target_t2i)
    return (loss_i2t + loss_t2i) / 2
