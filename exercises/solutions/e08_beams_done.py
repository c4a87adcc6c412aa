"""8. Enough hypotheses, and the best continuation is no better than the worst."""


def done(beams, best_running: float) -> bool:
    """beams: size and hypotheses of one image."""
    if len(beams.hypotheses) < beams.size:
        return False
    worst = beams.hypotheses[-1][1]
    return worst >= best_running
