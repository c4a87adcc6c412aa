"""10. The Q-Former's three masks (BLIP-2, arXiv 2301.12597, sec. 3.1, Fig. 2).

In BLIP-2 learned queries look at the image, and text and queries share one self-attention. The
mask alone decides which task is learnt:

    itc   queries see queries, text sees text: features that were made apart can be compared
    itg   text sees all queries and the text up to itself (causal); queries see only queries
    itm   all see all

In all three no row sees padding. In itc and itg a query must not see the text: it would learn to
copy the answer from the text instead of looking at the image.
"""

from torch import Tensor


def attention_mask(kind: str, text_mask: Tensor, queries: int) -> Tensor:
    """Who may look at whom in self-attention; True = may look.

    kind "itc", "itg" or "itm"; text_mask (B, L), True for real tokens; Q queries ->
    (B, 1, Q + L, Q + L) of bool. Rows are who looks; queries come first.
    """
    # TODO: fill four blocks: query-query, query-text, text-query, text-text. Then the padding.
    raise NotImplementedError


HINT = """Start with allowed = torch.zeros(Q + L, Q + L, dtype=torch.bool) and set blocks:
allowed[:Q, :Q], allowed[:Q, Q:], allowed[Q:, :Q], allowed[Q:, Q:]. torch.ones(L, L).tril().bool()
is causal. Queries are never padding: put Q ones in front of text_mask."""
