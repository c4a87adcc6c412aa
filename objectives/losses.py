"""Other losses than BLIP's, as pure functions: how others train on image-text pairs.

    clip_itc_loss       CLIP (Radford et al. 2021): the batch alone, no twins, no queue
    sigmoid_itc_loss    SigLIP (Zhai et al. 2023): each pair by itself, yes or no
    mask_tokens         ALBEF's third objective, masked language modelling (its sec. 3.2)
    focal_itm_loss      ITM that weighs easy pairs down (Lin et al. 2017)
    filip_similarity    FILIP (Yao et al. 2022): each token with the patch that fits it best

Letters as in losses.py: B batch, L text tokens, N image tokens, E joint width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_itc_loss(image_feat: Tensor, text_feat: Tensor, temp: Tensor | float,
                  positives: Tensor) -> Tensor:
    """Contrastive loss within the batch, in nats; both sides get a gradient. Chance is ln B.

    image_feat, text_feat (B, E) of length 1, positives (B, B): which pairs are true -> scalar.

        sim  = image_feat @ text_feat.T / temp
        loss = mean of cross-entropy over rows (image to text) and over columns (text to image)

    Not the same as BLIP with --momentum 0 and --queue-size 0: there the columns are features of the
    twins, through which no gradient flows.
    """
    sim = image_feat @ text_feat.T / temp
    truth = positives.float() / positives.sum(1, keepdim=True)
    return (F.cross_entropy(sim, truth) + F.cross_entropy(sim.T, truth.T)) / 2


def sigmoid_itc_loss(image_feat: Tensor, text_feat: Tensor, temp: Tensor | float,
                     bias: Tensor | float, positives: Tensor) -> Tensor:
    """Each pair of the batch is asked: do they belong together? In nats, a row.

    image_feat, text_feat (B, E) of length 1, positives (B, B) -> scalar (SigLIP eq. 1).

        loss = - sum over all pairs of log sigmoid(z * (sim / temp + bias)) / B,   z = 1 or -1

    No softmax: a row needs no other row. With bias -10 and unrelated features, pairs that do not
    match cost nothing at the start, and the loss is about 10.
    """
    logits = image_feat @ text_feat.T / temp + bias
    sign = positives.float() * 2 - 1
    return -F.logsigmoid(sign * logits).sum() / len(image_feat)


def mask_tokens(ids: Tensor, mask: Tensor, mask_id: int, special: list[int],
                share: float = 0.15, draw: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens (BERT; ALBEF sec. 3.2) -> masked ids, targets (B, L).

    ids, mask (B, L); special: ids that are never hidden. Targets are the hidden tokens, -100
    elsewhere, for losses.lm_loss. draw (B, L): uniform random numbers, drawn here if not given.
    Simpler than BERT: every chosen token is replaced by mask_id, and each text hides one at least.
    """
    draw = torch.rand(ids.shape, device=ids.device) if draw is None else draw
    allowed = mask.bool() & ~torch.isin(ids, torch.tensor(special, device=ids.device))
    draw = draw.masked_fill(~allowed, 2.0)  # behind every number that can be drawn
    hidden = (draw < share) | (draw == draw.amin(1, keepdim=True))
    hidden = hidden & allowed
    return ids.masked_fill(hidden, mask_id), ids.masked_fill(~hidden, -100)


def focal_itm_loss(logits: Tensor, matched: Tensor, valid: Tensor, gamma: float = 2.0) -> Tensor:
    """losses.itm_loss, but each pair weighs (1 - p of the right answer) ** gamma.

    logits (P, 2), matched (P,), valid (P,) -> scalar. gamma 0 is itm_loss.
    """
    loss = F.cross_entropy(logits, matched, reduction="none")
    weight = (1 - torch.exp(-loss)) ** gamma
    return (weight * loss * valid).sum() / valid.sum()


def filip_similarity(patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """How alike images and texts are, word by word: for each word the patch that fits best.

    patches (B, N, E), words (C, L, E), all of length 1, mask (C, L) -> (B, C): the mean over a
    text's words of their best cosine (FILIP sec. 3.1, one direction).
    """
    cosine = torch.einsum("bne,cle->bcln", patches, words).amax(-1)  # (B, C, L)
    return (cosine * mask).sum(-1) / mask.sum(-1)
