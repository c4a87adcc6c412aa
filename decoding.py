"""Nucleus sampling and beam search over any next-token function.

Both drive one function, `step(tokens, rows) -> logits`:

    tokens (R, t)   the new tokens of R sequences: the whole prompt in the first call (t = prompt
                    length), then t = 1
    rows (R,)       which row of the previous call each sequence continues (the identity in the
                    first call)
    logits (R, V)   for the token that comes next

`rows` tells the step everything: the row of a beam that splits stands there twice, that of a
finished sequence does not stand there, and costs nothing any more. The step keeps its own cache of
keys and values (`med.DecoderStep`). Lengths count every token from the first one of the prompt,
[DEC] included, and exclude the closing [SEP].
"""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
Hypothesis = tuple[list[int], float]  # token ids without [SEP], score


def penalise_repetition(scores: Tensor, sequences: Tensor, penalty: float) -> Tensor:
    """Make each token that is already present less likely.

    CTRL, Keskar et al. 2019, sec. 4.1. scores (R, V), sequences (R, t) -> (R, V). Negative scores
    are multiplied by the penalty, positive ones divided: it works on logits and log-probabilities.
    """
    if penalty == 1.0:
        return scores
    seen = scores.gather(1, sequences)
    return scores.scatter(1, sequences, torch.where(seen < 0, seen * penalty, seen / penalty))


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Put -inf outside the nucleus (Holtzman et al. 2020). logits (R, V) -> (R, V).

    The nucleus is the shortest list of most likely tokens whose probabilities together exceed p:
    the token at place r stays when r = 0 or the probability mass of those before it is <= p.
    """
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    mass_before = probability.cumsum(-1) - probability
    dropped = mass_before > top_p
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def top_k_filter(logits: Tensor, top_k: int) -> Tensor:
    """Put -inf outside the k most likely tokens; k = 0 keeps all. logits (R, V) -> (R, V)."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))


def draw_token(probability: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row, probability (R, V) -> (R, 1).

    It is the first token at which the sum of probabilities exceeds a uniform random number.
    (torch.multinomial draws a random number for every token of the vocabulary.)
    """
    mass = probability.cumsum(-1)
    u = torch.rand(len(mass), 1, generator=generator, device=mass.device) * mass[:, -1:]
    token = torch.searchsorted(mass, u, right=True)
    last = (mass < mass[:, -1:]).sum(-1, keepdim=True)  # that has any probability
    return torch.minimum(token, last)  # rounding may put u on the whole mass


@torch.no_grad()
def nucleus_sample(step: Step, prompt: Tensor, eos: int, max_length: int = 20, min_length: int = 5,
                   top_p: float = 0.9, temperature: float = 1.0, top_k: int = 0,
                   repetition_penalty: float = 1.0, generator: torch.Generator | None = None,
                   draw: Callable[[Tensor], Tensor] | None = None) -> list[Hypothesis]:
    """One sample for each row, p = 0.9 as in CapFilt (BLIP sec. 4.3).

    prompt (R, P) -> R pairs (token ids without [SEP], log-likelihood in nats under the unfiltered
    model). `draw` (R, V) -> (R, 1) replaces the random draw from the filtered probabilities.
    Raises ValueError for a top_p outside (0, 1] or a temperature that is not positive.

    NOTE(differs from salesforce/BLIP): there top-k 50 and a repetition penalty of 1.1 act silently.
    """
    if not 0 < top_p <= 1 or temperature <= 0:
        raise ValueError(f"nucleus sampling needs 0 < top_p <= 1 and temperature > 0, got {top_p} "
                         f"and {temperature}")
    finished: list[Hypothesis | None] = [None] * len(prompt)
    sequences, tokens = prompt, prompt  # of the rows that are still being written
    log_likelihood = torch.zeros(len(prompt), device=prompt.device)
    output = rows = torch.arange(len(prompt), device=prompt.device)  # output: where a row ends up
    while len(rows):
        raw = step(tokens, rows).float()
        logits = penalise_repetition(raw, sequences, repetition_penalty) / temperature
        if sequences.shape[1] < min_length:
            logits[:, eos] = float("-inf")
        probability = top_p_filter(top_k_filter(logits, top_k), top_p).softmax(-1)
        tokens = draw(probability) if draw else draw_token(probability, generator)
        log_likelihood = log_likelihood + raw.log_softmax(-1).gather(1, tokens).squeeze(1)
        longer = torch.cat([sequences, tokens], 1)
        ended = tokens.squeeze(1) == eos
        stopped = ended | (longer.shape[1] >= max_length)
        for row in stopped.nonzero().flatten().tolist():
            ids = sequences[row] if ended[row] else longer[row]
            finished[output[row]] = (ids.tolist(), log_likelihood[row].item())
        rows = (~stopped).nonzero().flatten()
        sequences, tokens = longer[rows], tokens[rows]
        log_likelihood, output = log_likelihood[rows], output[rows]
    return finished


class Beams:
    """The hypotheses of one image: at most `size`, best first."""

    def __init__(self, size: int):
        self.size, self.hypotheses = size, []

    def add(self, ids: list[int], score: float) -> None:
        """Keep it if it is among the best."""
        self.hypotheses.append((ids, score))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis[1])
        del self.hypotheses[self.size:]

    def done(self, best_running: float) -> bool:
        """Whether the score of the best continuation is no better than the worst hypothesis."""
        return len(self.hypotheses) == self.size and self.hypotheses[-1][1] >= best_running


@torch.no_grad()
def beam_search(step: Step, prompt: Tensor, eos: int, beams: int = 3, max_length: int = 20,
                min_length: int = 5, repetition_penalty: float = 1.0,
                length_penalty: float = 1.0, ahead: int = 0) -> list[list[Hypothesis]]:
    """The likeliest sequences. The defaults are the paper's for COCO (BLIP sec. 5.2).

    prompt (B, P) -> for each image its hypotheses (token ids without [SEP], score), best first. The
    score is the sum of the log-probabilities / length ** length_penalty. Each step looks at the
    2 x beams best continuations; one that ends is kept as a hypothesis if it ranks among the first
    `beams`. An image is done when it has `beams` hypotheses and the best continuation, divided by
    the present length + ahead, is no better than the worst. (ahead as released: BLIP 0, BLIP-2 1.)
    """
    results = [Beams(beams) for _ in range(len(prompt))]
    images = list(range(len(prompt)))  # still being searched; each has as many running beams
    sequences, tokens = prompt, prompt  # of the running beams
    sums = torch.zeros(len(prompt), 1, device=prompt.device)  # (images, running beams)
    rows = torch.arange(len(prompt), device=prompt.device)
    while images:
        logits = step(tokens, rows).float()
        if beams == 1:  # greedy search penalises logits, beam search log-probabilities (released)
            scores = penalise_repetition(logits, sequences, repetition_penalty).log_softmax(-1)
        else:
            scores = penalise_repetition(logits.log_softmax(-1), sequences, repetition_penalty)
        length, running, vocabulary = sequences.shape[1], sums.shape[1], scores.shape[-1]
        if length < min_length:
            scores[:, eos] = float("-inf")
        scores = (sums.flatten()[:, None] + scores).view(len(images), -1)  # (images, running * V)
        best = scores.topk(min(2 * beams, scores.shape[1]), dim=1)
        next_images, next_alive = [], []
        for place, image in enumerate(images):
            totals, flat = best.values[place].tolist(), best.indices[place].tolist()
            alive = []  # the continuations that go on: (row, token, sum)
            for rank, (total, index) in enumerate(zip(totals, flat)):
                row, token = place * running + index // vocabulary, index % vocabulary
                if token != eos:
                    alive.append((row, token, total))
                elif rank < beams and total > float("-inf"):
                    results[image].add(sequences[row].tolist(), total / length ** length_penalty)
                if len(alive) == beams:
                    break
            if results[image].done(totals[0] / (length + ahead) ** length_penalty):
                continue
            if length + 1 == max_length:  # what is still running ends here
                for row, token, total in alive:
                    results[image].add(sequences[row].tolist() + [token],
                                       total / max_length ** length_penalty)
                continue
            next_images.append(image)
            next_alive += alive
        if images := next_images:
            next_rows, next_tokens, next_sums = zip(*next_alive)
            rows = torch.tensor(next_rows, device=prompt.device)
            tokens = torch.tensor(next_tokens, device=prompt.device)[:, None]
            sums = torch.tensor(next_sums, device=prompt.device).view(len(images), -1)
            sequences = torch.cat([sequences[rows], tokens], 1)
    return [result.hypotheses for result in results]


def write(make_step: Callable[[Tensor], Step], count: int, prompt: list[int], eos: int,
          device: torch.device, method: str = "beam", num_return: int = 1,
          **options) -> list[list[Hypothesis]]:
    """`num_return` texts about each of `count` images: (ids after the prompt, score).

    make_step(images (R,)) -> the step of R sequences, each about one of the images. method "beam"
    takes the options of `beam_search`, "nucleus" those of `nucleus_sample`, which say what a score
    is. Raises ValueError for another method, and where prompt and max_length do not fit.
    """
    if method not in ("beam", "nucleus"):
        raise ValueError(f"method is {method!r}; choose beam or nucleus")
    if len(prompt) >= options.get("max_length", 20):
        raise ValueError(f"a prompt of {len(prompt)} tokens, the first one included, leaves no "
                         f"room in max_length {options.get('max_length', 20)}")
    copies = 1 if method == "beam" else num_return  # rows that each image starts with
    images = torch.arange(count, device=device).repeat_interleave(copies)
    start = torch.tensor([prompt], device=device).expand(len(images), -1)
    step = make_step(images)
    if method == "beam":
        options.setdefault("beams", max(3, num_return))
        texts = beam_search(step, start, eos, **options)
    else:
        samples = nucleus_sample(step, start, eos, **options)
        texts = [sorted(samples[i:i + copies], key=lambda sample: -sample[1])
                 for i in range(0, len(samples), copies)]
    return [[(ids[len(prompt):], score) for ids, score in hypotheses[:num_return]]
            for hypotheses in texts]
