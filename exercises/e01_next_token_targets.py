"""1. What does the decoder have to predict? (BLIP sec. 3.2, LM)

The decoder reads a caption and predicts, at each position, the NEXT token. So the targets are the
caption moved by one place. The caption is the true one, in training too: the model never reads its
own output there (teacher forcing). Two kinds of positions give no loss: padding, and a prompt such
as "a picture of", which is given. They are marked with -100, the number that cross_entropy ignores.
"""

from torch import Tensor


def next_token_targets(ids: Tensor, mask: Tensor, prompt_length: int = 0) -> Tensor:
    """The target of each position.

    ids, mask (B, L), mask 1 for real tokens and 0 for padding -> targets (B, L - 1), -100 where
    there is no loss. prompt_length: how many leading tokens are given, the first one ([DEC])
    included. Do not change `ids`.
    """
    # TODO: move by one place, put -100 where the target is padding, and where it is prompt.
    raise NotImplementedError


HINT = """Position i predicts token i + 1: ids[:, 1:]. The mask of the target tells whether the
target is padding, not the mask of the position that predicts it. The target at index j is token
j + 1, so a prompt of 3 tokens sets the targets 0 and 1 to -100."""
