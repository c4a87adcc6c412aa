"""8. When may beam search stop? (BLIP sec. 5.2: captions are written with 3 beams)

Beam search keeps two lists for an image: running beams, and hypotheses, which have ended with
[SEP]. The first hypothesis is rarely the best one. The search may stop only when it has enough
hypotheses and the best continuation, by its score so far, is no better than the worst of them. (A
rule of thumb: a score is divided by the length, so a longer text could still win.)
"""


def done(beams, best_running: float) -> bool:
    """Whether the search for one image is over.

    beams.size: how many hypotheses are wanted. beams.hypotheses: those so far, (ids, score), best
    first, at most `size`. best_running: the score of the best continuation. Scores are
    log-probabilities divided by the length: negative, larger is better. At a tie the search is
    over. This function is put in the place of `decoding.Beams.done`.
    """
    # TODO: enough hypotheses, and the worst of them is at least as good as the best continuation.
    raise NotImplementedError


HINT = """The worst hypothesis is the last one: beams.hypotheses[-1][1]. Ask for the number first:
the list may be empty."""
