"""4. The two masks of MED (BLIP sec. 3.1, Fig. 2).

MED is one text transformer that reads a text in three ways. The encoder's self-attention is
bidirectional: each token sees all tokens. The decoder's is causal: a token sees itself and what
stands before it, because it has to predict what comes after. In both no token sees padding.
(The image needs no mask: every text token sees every image token.)
"""

from torch import Tensor


def med_mask(mask: Tensor, causal: bool) -> Tensor:
    """Who may look at whom; True = may look.

    mask (B, L), 1 for real tokens and 0 for padding -> (B, 1, L, L) of bool. Rows are who looks,
    columns who is looked at. The 1 is for the heads. What a padded token sees does not matter: give
    its row the same rule as all rows.
    """
    # TODO: columns of padding are False; with causal=True so is what comes later.
    raise NotImplementedError


HINT = """positions = torch.arange(L); positions[:, None] >= positions[None, :] is True where the
column is not later than the row. mask[:, None, None, :].bool() is the padding, as columns. `&`
joins the two; .expand(B, 1, L, L) gives the bidirectional one its full shape."""
