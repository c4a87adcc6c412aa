"""Nucleus sampling and beam search over any next-token function.

Both drive one function, `step(tokens, rows) -> logits`:

    tokens (R, t)   the new tokens of R sequences: the whole prompt in the first call (t = prompt
                    length), then t = 1
    rows (R,)       which row of the previous call each sequence continues (the identity in the
                    first call)
    logits (R, V)   for the token that comes next

`rows` is all that the two searches need to say: a beam that splits repeats a row, a finished
sequence is in no row and costs nothing from then on. The step keeps its own cache of keys and
values (`blip.CaptionStep`).
Lengths count every token from the first one of the prompt, [DEC] included, and exclude the
closing [SEP].
"""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]


def penalise_repetition(scores: Tensor, sequences: Tensor, penalty: float) -> Tensor:
    """scores (R, V), sequences (R, t) -> scores in which each token already present is less likely
    (CTRL, eq. 2).

    Negative scores are multiplied by the penalty, positive ones divided: it works on logits and
    log-probabilities.
    """
    if penalty == 1.0:
        return scores
    seen = scores.gather(1, sequences)
    return scores.scatter(1, sequences, torch.where(seen < 0, seen * penalty, seen / penalty))


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """logits (R, V) -> logits with -inf outside the nucleus (Holtzman et al. 2020).

    The nucleus is the shortest list of most likely tokens whose probabilities reach p; the token
    that crosses p belongs to it: rank r stays when r = 0 or the probability mass before r is <= p.
    """
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    mass_before = probability.cumsum(-1) - probability
    dropped = mass_before > top_p
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def top_k_filter(logits: Tensor, top_k: int) -> Tensor:
    """logits (R, V) -> logits with -inf outside the k most likely tokens; k = 0 keeps all."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))


def draw_token(probability: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """probability (R, V) -> (R, 1): the first token at which the sum of probabilities exceeds a
    uniform random number. (torch.multinomial draws a random number for every token.)"""
    mass = probability.cumsum(-1)
    u = torch.rand(len(mass), 1, generator=generator, device=mass.device) * mass[:, -1:]
    # Rounding may put u on the whole mass: then the last token that has any.
    return torch.minimum(torch.searchsorted(mass, u, right=True),
                         (mass < mass[:, -1:]).sum(-1, keepdim=True))


@torch.no_grad()
def nucleus_sample(step: Step, prompt: Tensor, eos: int, max_length: int = 20, min_length: int = 5,
                   top_p: float = 0.9, temperature: float = 1.0, top_k: int = 0,
                   repetition_penalty: float = 1.0, generator: torch.Generator | None = None,
                   draw: Callable[[Tensor], Tensor] | None = None) -> list[tuple[list[int], float]]:
    """prompt (R, P) -> for each row (token ids without [SEP], log-likelihood in nats under the
    unfiltered model).

    One sample per row, p = 0.9 as in CapFilt (BLIP sec. 4.2). NOTE(differs from salesforce/BLIP):
    there, top-k 50 and a repetition penalty of 1.1 act as well, silently; here both are off unless
    asked for. `draw` (R, V) -> (R, 1) replaces the multinomial draw from the filtered
    probabilities.
    """
    if not 0 < top_p <= 1 or temperature <= 0:
        raise ValueError(f"nucleus sampling needs 0 < top_p <= 1 and temperature > 0, got {top_p} "
                         f"and {temperature}")
    sequences, tokens = prompt, prompt
    total = torch.zeros(len(prompt), device=prompt.device)
    # where: the output that each live row belongs to
    rows = where = torch.arange(len(prompt), device=prompt.device)
    finished: list = [None] * len(prompt)
    while len(where):
        raw = step(tokens, rows).float()
        logits = penalise_repetition(raw, sequences, repetition_penalty) / temperature
        if sequences.shape[1] < min_length:
            logits[:, eos] = float("-inf")
        probability = top_p_filter(top_k_filter(logits, top_k), top_p).softmax(-1)
        tokens = (draw(probability) if draw
                  else draw_token(probability, generator))
        total = total + raw.log_softmax(-1).gather(1, tokens).squeeze(1)
        ended = tokens.squeeze(1) == eos
        longer = torch.cat([sequences, tokens], 1)
        stop = ended | (longer.shape[1] >= max_length)
        for r in stop.nonzero().flatten().tolist():
            ids = sequences[r] if ended[r] else longer[r]
            finished[where[r]] = (ids.tolist(), total[r].item())
        rows = (~stop).nonzero().flatten()
        sequences, tokens, total, where = longer[rows], tokens[rows], total[rows], where[rows]
    return finished


@torch.no_grad()
def beam_search(step: Step, prompt: Tensor, eos: int, beams: int = 3, max_length: int = 20,
                min_length: int = 5,
                repetition_penalty: float = 1.0) -> list[list[tuple[list[int], float]]]:
    """prompt (B, P) -> for each image its hypotheses, best first: (token ids without [SEP], score).

    The score is the sum of log-probabilities divided by the length. Each step looks at the
    2 x beams best continuations; one that ends is kept as a hypothesis if it ranks among the first
    `beams`; an image is done when it has `beams` hypotheses and no running beam can beat the worst
    of them. The defaults are the paper's for COCO.
    """
    # the images still being searched; each has the same number of running beams
    images = list(range(len(prompt)))
    hypotheses: list[list[tuple[list[int], float]]] = [[] for _ in images]
    sequences, tokens = prompt, prompt
    # (images, running beams); the prompt is one beam
    sums = torch.zeros(len(prompt), 1, device=prompt.device)
    rows = torch.arange(len(prompt), device=prompt.device)
    while images:
        scores = step(tokens, rows).float().log_softmax(-1)
        scores = penalise_repetition(scores, sequences, repetition_penalty)
        length, running, vocabulary = sequences.shape[1], sums.shape[1], scores.shape[-1]
        if length < min_length:
            scores[:, eos] = float("-inf")
        scores = (sums.flatten()[:, None] + scores).view(len(images), -1)  # (images, running * V)
        best, index = scores.topk(min(2 * beams, scores.shape[1]), dim=1)
        best_list, index_list = best.tolist(), index.tolist()
        keep_rows, keep_tokens, keep_sums, keep_images = [], [], [], []
        for a, image in enumerate(images):
            found, alive = hypotheses[image], []
            for rank, (total, flat) in enumerate(zip(best_list[a], index_list[a])):
                row, token = a * running + flat // vocabulary, flat % vocabulary
                if token != eos:
                    alive.append((row, token, total))
                elif rank < beams and total > float("-inf"):
                    add_hypothesis(found, sequences[row].tolist(), total / length, beams)
                if len(alive) == beams:
                    break
            if length + 1 == max_length:
                for row, token, total in alive:
                    add_hypothesis(found, sequences[row].tolist() + [token], total / max_length,
                                   beams)
            elif len(found) < beams or found[-1][1] < best_list[a][0] / length:
                keep_images.append(image)
                for kept, value in zip((keep_rows, keep_tokens, keep_sums), zip(*alive)):
                    kept.extend(value)
        images = keep_images
        rows = torch.tensor(keep_rows, dtype=torch.long, device=prompt.device)
        tokens = torch.tensor(keep_tokens, dtype=torch.long, device=prompt.device)[:, None]
        sums = (torch.tensor(keep_sums, device=prompt.device).view(len(images), -1)
                if images else sums)
        sequences = torch.cat([sequences[rows], tokens], 1)
    return hypotheses


def add_hypothesis(found: list[tuple[list[int], float]], ids: list[int], score: float,
                   beams: int) -> None:
    """Insert into `found`, kept sorted best first and at most `beams` long."""
    found.append((ids, score))
    found.sort(key=lambda hypothesis: -hypothesis[1])
    del found[beams:]
