"""2. ITC with momentum targets (BLIP sec. 3.2; ALBEF eq. 1 and 6).

Each image is compared with C texts: the B texts of the batch, then the queue. All of these are
features of the momentum twins (the "keys"). With s = similarity / temp:

    p      = softmax(s(image, text keys))                                the model's answer
    target = alpha * softmax(s(twin's image, text keys))                 the twins' prediction
             + (1 - alpha) * one-hot                                     the pair from the web
    loss   = mean over rows of - sum over columns of target * log p

The same from text to image; the result is the mean of both. The paper's reason: a web text that is
a "negative" may fit the image, and a one-hot target would punish the model for seeing it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_loss(image_feat: Tensor, text_feat: Tensor, image_keys: Tensor, text_keys: Tensor,
             temp: Tensor | float, alpha: float, positives: Tensor | None = None) -> Tensor:
    """The contrastive loss, in nats.

    image_feat, text_feat (B, E); image_keys, text_keys (C, E): row i < B belongs to query i, the
    rest is the queue; all of length 1 -> scalar. Gradients reach the features and temp, not the
    targets.
    """
    with torch.no_grad():
        if positives is None:
            truth = torch.eye(len(image_feat), len(image_keys))
        else:  # (B, C), for retrieval finetuning: the true columns share the mass
            truth = positives.float() / positives.sum(1, keepdim=True)
        # TODO: target_i2t and target_t2i (B, C). The twins' own features are the first B keys.
    # TODO: one F.cross_entropy for each direction (it takes probabilities as targets); the mean.
    raise NotImplementedError


HINT = """The twins' features of this batch are image_keys[:B] and text_keys[:B]. The twin's image
looks at the TEXT keys, the twin's text at the IMAGE keys. Divide by temp in the targets too."""
