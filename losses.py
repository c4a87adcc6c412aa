"""The three objectives of BLIP (sec. 3.2) as pure functions of tensors: no module, no
configuration, no process group.

To try another objective, edit one function here or write a new one beside it.

Letters: B batch, Q queue length, E joint width, C columns (B + Q), L text tokens, V vocabulary.
Rows are queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1  # BLIP sec. 3.2, LM; it puts a floor under the loss: 1.358 nats at V = 30,524
# added to every mining weight in pretraining (released code), so that no row is all zero
NEGATIVE_FLOOR = 1e-4


def itc_loss(image_feat: Tensor, text_feat: Tensor, image_keys: Tensor, text_keys: Tensor,
             temp: Tensor | float, alpha: float, positives: Tensor | None = None) -> Tensor:
    """image_feat, text_feat (B, E), image_keys, text_keys (C, E) -> scalar, in nats.
    Chance is ln C.

    Image-text contrastive loss with momentum soft targets (ALBEF eq. 1 and 6; BLIP sec. 3.2). All
    features are unit vectors; keys are the momentum twins' features, this batch in the first B rows
    (row i belongs to query i), then the queue. Targets are alpha * softmax(the twins' own
    similarities) + (1 - alpha) * ground truth: the noisier the web texts, the more often a
    "negative" fits the image, and the twins' opinion softens that.
    `positives` (B, C) marks columns that are true matches where that is more than the diagonal
    (several captions of one image in retrieval finetuning): they share the mass.
    """
    with torch.no_grad():
        if positives is None:
            truth = torch.eye(len(image_feat), len(image_keys), device=image_feat.device)
        else:
            truth = positives.float() / positives.sum(1, keepdim=True)
        momentum_image, momentum_text = image_keys[:len(image_feat)], text_keys[:len(text_feat)]
        target_i2t = alpha * (momentum_image @ text_keys.T / temp).softmax(1) + (1 - alpha) * truth
        target_t2i = alpha * (momentum_text @ image_keys.T / temp).softmax(1) + (1 - alpha) * truth
    loss_i2t = F.cross_entropy(image_feat @ text_keys.T / temp, target_i2t)
    loss_t2i = F.cross_entropy(text_feat @ image_keys.T / temp, target_t2i)
    return (loss_i2t + loss_t2i) / 2


@torch.no_grad()
def mine_hard_negatives(sim: Tensor, positives: Tensor,
                        floor: float = NEGATIVE_FLOOR) -> tuple[Tensor, Tensor]:
    """sim (B, C) already divided by the temperature, positives (B, C) -> index (B,), valid (B,).

    For each row one column, drawn in proportion to softmax(sim) + floor: the more alike, the
    likelier (ALBEF sec. 3.2). A positive is never drawn. A row that has nothing but positives gets
    valid = False (its index is 0 and means nothing), where the released code crashes.
    """
    weights = (sim.float().softmax(1) + floor).masked_fill(positives, 0)
    # Without the floor (retrieval finetuning) all of a row's mass may underflow onto its positives.
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, (~positives).float())
    valid = weights.sum(1) > 0
    weights[:, 0] = torch.where(valid, weights[:, 0], 1)  # multinomial needs something to draw
    return torch.multinomial(weights, 1).squeeze(1), valid


def itm_loss(logits: Tensor, matched: Tensor, valid: Tensor) -> Tensor:
    """logits (P, 2), matched (P,) 0 or 1, valid (P,) -> scalar: two-class cross-entropy over the
    valid pairs.

    Image-text matching (BLIP sec. 3.2). With one matched pair to two hard negatives, chance is
    H(1/3) = 0.6365 nats: a run whose ITM stands there has learnt nothing yet.
    """
    loss = F.cross_entropy(logits, matched, reduction="none")
    return (loss * valid).sum() / valid.sum()


def lm_loss(logits: Tensor, targets: Tensor, label_smoothing: float = LABEL_SMOOTHING) -> Tensor:
    """logits (B, L, V), targets (B, L) = the NEXT token of each position, -100 where there is
    none -> scalar.

    Mean over real tokens of the label-smoothed cross-entropy, in nats (BLIP sec. 3.2).
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100,
                           label_smoothing=label_smoothing)


def text_nll(logits: Tensor, targets: Tensor, rows: Tensor, texts: int,
             label_smoothing: float = 0.0) -> Tensor:
    """logits (T, V) at the positions that have a target, targets (T,), rows (T,): which text each
    belongs to -> (texts,): the negative log-likelihood of each text, in nats, summed over its
    tokens. VQA trains and ranks answers by it (BLIP sec. 5.3)."""
    loss = F.cross_entropy(logits.float(), targets, reduction="none",
                           label_smoothing=label_smoothing)
    return loss.new_zeros(texts).index_add(0, rows, loss)


def next_token_targets(ids: Tensor, mask: Tensor, prompt_length: int = 0) -> Tensor:
    """ids, mask (B, L) -> targets (B, L-1): position t predicts token t+1; PAD and the prompt
    give no loss.

    `prompt_length` counts the leading tokens that are given, [DEC] included
    ("a picture of " has 4).
    """
    targets = ids[:, 1:].masked_fill(~mask[:, 1:].bool(), -100)
    if prompt_length > 1:
        targets[:, :prompt_length - 1] = -100
    return targets
