"""The contrastive loss of BLIP-2's first stage as a pure function (sec. 3.1).

ITM and ITG are BLIP's: losses.itm_loss, losses.lm_loss. Letters as in losses.py, and Q queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def query_similarity(image_feat: Tensor, text_feat: Tensor) -> Tensor:
    """Cosine of a text with the query that fits it best: for ITC and for mining.

    The evaluation has the same in tasks.retrieval.Gallery.sim: change both.

    image_feat (B, Q, E), text_feat (C, E), all of length 1 -> (B, C).
    """
    return torch.einsum("bqe,ce->bcq", image_feat, text_feat).amax(-1)


def query_itc_loss(image_feat: Tensor, text_feat: Tensor, image_keys: Tensor, text_keys: Tensor,
                   temp: Tensor | float, positives: Tensor, label_smoothing: float) -> Tensor:
    """Image-text contrastive loss over queries, in nats. Chance is ln C.

    image_feat (B, Q, E), text_feat (B, E), image_keys (C, Q, E), text_keys (C, E): of all
    processes' batches, detached (the released code gathers them without gradient: the loss of a row
    trains the row's side alone). positives (B, C): which columns are true. -> scalar.

        s(image, text) = max over queries of cosine(query, text) / temp
        target         = (1 - e) * true share + e / C
        loss           = mean over rows and both directions of - sum over columns of target * log p

    Against BLIP's ITC: in-batch negatives alone, no queue, no momentum twins, no soft targets.
    """
    truth = positives.float() / positives.sum(1, keepdim=True)
    sim_i2t = query_similarity(image_feat, text_keys) / temp
    sim_t2i = query_similarity(image_keys, text_feat).T / temp
    return (F.cross_entropy(sim_i2t, truth, label_smoothing=label_smoothing)
            + F.cross_entropy(sim_t2i, truth, label_smoothing=label_smoothing)) / 2
