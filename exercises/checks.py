"""The checks of each exercise: cases worked out by hand, then the project's own code.

A check is called with the student's module (or the solution's) and a Grader.
"""

import importlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import capfilt
import decoding
import losses
from blip import BLIP
from blip2 import qformer
from config import BLIPConfig, CapFiltConfig
from exercises.grading import Grader
from med import with_first

TOY = BLIPConfig(image_size=32, vit_width=32, vit_depth=1, vit_heads=2, text_width=32, text_depth=2,
                 text_heads=2, text_ffn=64, max_positions=16, dropout=0.0, embed_dim=8,
                 queue_size=7, vocab_size=40, cls_id=2, sep_id=3, dec_id=38, enc_id=39)
WORDS = (("worse", "better", "same"), ("beam", "nucleus", "tie"))  # what a prediction may be
NEAR = 10  # points by which a predicted percentage may differ


def unit(*shape: int) -> torch.Tensor:
    """Random vectors of length 1."""
    return F.normalize(torch.randn(*shape), dim=-1)


def texts(rows: int = 5, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask; the last tokens of some rows are padding."""
    real = torch.randint(3, length + 1, (rows, 1))
    mask = (torch.arange(length) < real).long()
    return torch.randint(5, 38, (rows, length)) * mask, mask


def after(call: Callable[[torch.Tensor], object], argument: torch.Tensor) -> torch.Tensor:
    """What a function leaves in a copy of its argument."""
    given = argument.clone()
    call(given)
    return given


def check_targets(student, grader: Grader) -> None:
    """Exercise 1."""
    f, ids, mask = (student.next_token_targets, torch.tensor([[2, 7, 8, 9, 3, 0]]),
                    torch.tensor([[1, 1, 1, 1, 1, 0]]))
    grader.compare("a caption of 5 tokens and one padding", lambda: f(ids.clone(), mask),
                   torch.tensor([[7, 8, 9, 3, -100]]), [
        (torch.tensor([[2, 7, 8, 9, 3]]), "Each position predicts itself: move the targets"),
        (torch.tensor([[7, 8, 9, 3, 0]]), "Padding is learnt: use the mask of the target")])
    grader.compare("a prompt of 3 tokens", lambda: f(ids.clone(), mask, 3),
                   torch.tensor([[-100, -100, 9, 3, -100]]), [
        (torch.tensor([[-100, -100, -100, 3, -100]]),
         "One too many is silent: the prompt's last token predicts the first word to be learnt")])
    ids, mask = texts()
    grader.compare("random texts, as in losses.next_token_targets",
                   lambda: f(ids.clone(), mask, 2), losses.next_token_targets(ids, mask, 2))
    grader.compare("the ids are not changed", lambda: after(lambda given: f(given, mask, 2), ids),
                   ids)


def check_itc(student, grader: Grader) -> None:
    """Exercise 2."""
    # Unit vectors on paper. Image (1, 0) against texts (0.6, 0.8), (0, 1) at temperature 0.5.
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    def surprise(true: float, other: float) -> float:
        return math.log(1 + math.exp(other - true))
    expected = (surprise(1.2, 0) + surprise(2, 1.6) + surprise(1.2, 1.6) + surprise(2, 0)) / 4
    grader.compare("two pairs by hand, alpha 0",
                   lambda: student.itc_loss(image, text, image, text, 0.5, 0.0), expected, [
        (4 * expected, "This is a sum; take the mean over rows and directions"),
        (2 * expected, "Take the mean of the two directions, not the sum")])
    feats, keys = [unit(4, 8), unit(4, 8)], [unit(9, 8), unit(9, 8)]
    right = losses.itc_loss(*feats, *keys, 0.1, 0.4)
    online = losses.itc_loss(*feats, torch.cat([feats[0], keys[0][4:]]),
                             torch.cat([feats[1], keys[1][4:]]), 0.1, 0.4)
    cold = F.cross_entropy(feats[0] @ keys[1].T / 0.1, soft(keys[0], keys[1], 1.0))
    cold += F.cross_entropy(feats[1] @ keys[0].T / 0.1, soft(keys[1], keys[0], 1.0))
    by_model = F.cross_entropy(feats[0] @ keys[1].T / 0.1, soft(feats[0], keys[1], 0.1))
    by_model += F.cross_entropy(feats[1] @ keys[0].T / 0.1, soft(feats[1], keys[0], 0.1))
    hard = losses.itc_loss(*feats, *keys, 0.1, 0.0)
    grader.compare("soft targets and a queue, as in losses.itc_loss",
                   lambda: student.itc_loss(*feats, *keys, 0.1, 0.4), right, [
        (cold / 2, "Divide by temp in the targets too"),
        (hard, "The twins' prediction has no effect: alpha weighs it"),
        (by_model / 2, "The targets are the twins' prediction, from the first B keys"),
        (online, "The twins' features are the first B keys")])
    def gradient():
        temp = torch.tensor(0.1, requires_grad=True)
        student.itc_loss(*feats, *keys, temp, 0.4).backward()
        return temp.grad
    temp = torch.tensor(0.1, requires_grad=True)
    losses.itc_loss(*feats, *keys, temp, 0.4).backward()
    grader.compare("the temperature's gradient: none through the targets", gradient, temp.grad)


def soft(own: torch.Tensor, other: torch.Tensor, temp: float) -> torch.Tensor:
    """ITC's targets at alpha 0.4 for four pairs."""
    return 0.4 * (own[:4] @ other.T / temp).softmax(1) + 0.6 * torch.eye(4, len(other))


OTHER_TEXT = "Another text of the same image can be drawn: use `positives`, not the diagonal"


def two_texts_of_one_image(count: int) -> torch.Tensor:
    """Which of `count` texts are true of which image: pairs 0 and 3 are of one image."""
    positives = torch.eye(count).bool()
    positives[0, 3] = positives[3, 0] = True
    return positives


def check_mining(student, grader: Grader) -> None:
    """Exercise 3."""
    def weights(mine, *arguments):
        """What `mine` gives to `draw`, as shares."""
        seen = []
        def draw(given):
            seen.append(given / given.sum(1, keepdim=True))
            return given.argmax(1)
        index = mine(*arguments, draw=draw)
        if index is None:
            return None
        if not seen:
            return "an index without a call of draw: end with `return draw(weights)`"
        return seen[0]
    sim = torch.tensor([[9.0, 5.0, 1.0, 1.0]])
    positives = torch.tensor([[True, False, False, False]])
    exps = [math.exp(x) for x in (9, 5, 1, 1)]
    hand = torch.tensor([[0.0] + [x / sum(exps) + 1e-4 for x in exps[1:]]])
    late = (sim.masked_fill(positives, 0).softmax(1) + 1e-4)
    others = sim.masked_fill(positives, -math.inf).softmax(1) + 1e-4 * (~positives)
    grader.compare("the shares of one row by hand",
                   lambda: weights(student.mine_hard_negatives, sim, positives, 1e-4),
                   hand / hand.sum(), [
        (late / late.sum(), "The true pair can be drawn: set its weight to 0 after the softmax"),
        (others / others.sum(), "This is the project's --mask-positives; here the softmax is taken "
         "over all columns, the true one too"),
        (torch.tensor([[0.0, 1, 1, 1]]) / 3, "All negatives are as likely: use the similarity")])
    sim, positives = 5 * torch.randn(6, 6), two_texts_of_one_image(6)
    diagonal = (sim.softmax(1) + 1e-4).masked_fill(torch.eye(6).bool(), 0)
    def own(sim, positives, floor, draw):
        return losses.mine_hard_negatives(sim, positives, floor, draw=draw)
    grader.compare("random rows, as in losses.mine_hard_negatives",
                   lambda: weights(student.mine_hard_negatives, sim, positives, 1e-4),
                   weights(own, sim, positives, 1e-4), [
        (diagonal / diagonal.sum(1, keepdim=True), OTHER_TEXT)])
    grader.compare("it returns what draw returned", lambda: student.mine_hard_negatives(
        sim, positives, 1e-4, lambda weights: torch.arange(6)), torch.arange(6))


PADDED_ROW = "A row of padding has the same rule as all rows"


@torch.no_grad()
def check_med_mask(student, grader: Grader) -> None:
    """Exercise 4."""
    mask = torch.tensor([[1, 1, 1, 0]])
    past = torch.ones(4, 4).tril().bool()
    real = mask[:, None, None].bool()
    grader.compare("bidirectional, one token of padding",
                   lambda: student.med_mask(mask, False), real.expand(1, 1, 4, 4), [
        (torch.ones(1, 1, 4, 4).bool(), "Padding is seen"),
        (real & real.transpose(2, 3), PADDED_ROW),
        (real.transpose(2, 3).expand(1, 1, 4, 4), "Rows and columns are swapped")])
    grader.compare("causal, one token of padding", lambda: student.med_mask(mask, True),
                   real & past, [
        (past[None, None], "Padding is seen"),
        (real & real.transpose(2, 3) & past, PADDED_ROW),
        (real & past.T, "The past is hidden and the future seen"),
        (real & ~past.T, "A token must see itself")])
    med, (ids, mask) = BLIP(TOY).med.eval(), texts()
    kv, keep = med.project(torch.randn(5, 3, 32)), mask.bool()[..., None]
    def decode():
        x = med.embeddings(with_first(ids, TOY.dec_id))
        for layer, layer_kv in zip(med.layers, kv.dec):
            x, _ = layer.decode(x, student.med_mask(mask, True), layer_kv, None, None)
        return x * keep
    def encode():
        x = med.embeddings(ids)
        for layer in med.layers:
            x = layer.text(x, student.med_mask(mask, False))
        return x * keep
    grader.compare("MED.encode_text gives the same states", encode,
                   med.encode_text(ids, mask) * keep)
    grader.compare("MED.decode gives the same states", decode, med.decode(ids, mask, kv)[0] * keep)


@torch.no_grad()
def check_momentum(student, grader: Grader) -> None:
    """Exercise 5."""
    def run(online, twins, momentum):
        twins = [twin.clone() for twin in twins]
        student.update_momentum(online, list(twins), momentum)  # new tensors in the list: no use
        return torch.cat([twin.flatten() for twin in twins])
    grader.compare("online 1, twin 0, m = 0.9",
                   lambda: run([torch.ones(2)], [torch.zeros(2)], 0.9), torch.full((2,), 0.1), [
        (torch.full((2,), 0.9), "m and 1 - m are swapped: the twin should move slowly"),
        (torch.zeros(2), "The twin did not move: change the tensor itself, in place")])
    model = BLIP(TOY)
    for p, _ in model.twin_parameters:
        p.add_(torch.randn_like(p))
    online, before = [p for p, _ in model.twin_parameters], [
        p_m.clone() for _, p_m in model.twin_parameters]
    model.update_momentum(0.7)
    def move(given):
        student.update_momentum([given], [torch.zeros(2)], 0.9)
    grader.compare("the model is not changed", lambda: after(move, torch.ones(2)), torch.ones(2))
    grader.compare("a small model, as BLIP.update_momentum", lambda: run(online, before, 0.7),
                   torch.cat([p_m.flatten() for _, p_m in model.twin_parameters]))


def check_queue(student, grader: Grader) -> None:
    """Exercise 6."""
    def run(size, batches):
        queue, pointer, number = torch.zeros(size, 1), 0, 1
        for batch in batches:
            features = torch.arange(number, number + batch).float()[:, None]
            pointer, number = student.enqueue(queue, pointer, features), number + batch
        return queue.flatten(), pointer
    grader.compare("queue of 5, batches of 3 and 1", lambda: run(5, [3, 1]),
                   (torch.tensor([1.0, 2, 3, 4, 0]), 4))
    grader.compare("queue of 5, batches of 3 and 3: it wraps", lambda: run(5, [3, 3]),
                   (torch.tensor([6.0, 2, 3, 4, 5]), 1), [
        ((torch.tensor([6.0, 2, 3, 4, 5]), 6), "The slots wrap, the pointer must wrap too")])
    grader.compare("queue of 3, a batch of 5", lambda: run(3, [5]), (torch.tensor([3.0, 4, 5]), 0),
                   [((torch.tensor([4.0, 5, 3]), 2), "Cut first, then write from the pointer on"),
                    ((torch.tensor([3.0, 4, 5]), 2), "Three were written, so the pointer comes "
                     "back to where it was"),
                    ((torch.tensor([1.0, 2, 3]), 0), "Keep the newest, not the oldest")])
    grader.compare("queue of 3, batches of 2 and 5", lambda: run(3, [2, 5]),
                   (torch.tensor([6.0, 7, 5]), 2))
    model, size = BLIP(TOY), TOY.queue_size
    queue = model.image_queue.clone()
    def several():
        pointer = 0
        for features in batches:
            pointer = student.enqueue(queue, pointer, features)
        return queue, pointer
    batches = [torch.randn(n, TOY.embed_dim) for n in (3, 4, 6, size, 2)]
    for features in batches:
        model.enqueue({"image": features, "text": features,
                       "ids": torch.zeros(len(features), dtype=torch.long)})
    grader.compare("random batches, as BLIP.enqueue", several,
                   (model.image_queue, model.queue_ptr.item()))


def check_top_p(student, grader: Grader) -> None:
    """Exercise 7."""
    probability = torch.tensor([[0.10, 0.40, 0.05, 0.25, 0.20]])
    def kept(p):
        filtered = student.top_p_filter(probability.log(), p)
        return None if filtered is None else (filtered[0] > -math.inf).nonzero().flatten().tolist()
    short = "The token that crosses p belongs to the nucleus"
    grader.compare("0.40 0.25 0.20 0.10 0.05, p = 0.5", lambda: kept(0.5), [1, 3],
                   [([1], short), ([0, 1], "Bring the ranks back to the tokens' places")])
    grader.compare("the same, p = 0.9", lambda: kept(0.9), [0, 1, 3, 4], [([1, 3, 4], short)])
    grader.compare("the same, p = 0.3: one always stays", lambda: kept(0.3), [1], [([], short)])
    half = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()  # exact in floating point
    grader.compare("0.5 0.25 0.125 0.125, p = 0.5: the sum must exceed p", lambda: (
        student.top_p_filter(half.clone(), 0.5) > -math.inf).sum().item(), 2)
    logits = 3 * torch.randn(4, 12)
    grader.compare("random logits, as in decoding.top_p_filter",
                   lambda: student.top_p_filter(logits.clone(), 0.8),
                   decoding.top_p_filter(logits, 0.8))
    grader.compare("the logits are not changed",
                   lambda: after(lambda given: student.top_p_filter(given, 0.8), logits), logits)


def check_done(student, grader: Grader) -> None:
    """Exercise 8."""
    def run(scores, best):
        beams = decoding.Beams(2)
        for score in scores:
            beams.add([1], score)
        return bool(student.done(beams, best))
    few = "One hypothesis is not enough: two are wanted"
    grader.compare("no hypothesis yet", lambda: run([], -1.0), False)
    grader.compare("one of two, better than all that runs", lambda: run([-0.5], -1.0), False,
                   [(True, few)])
    grader.compare("two, and a running beam beats the worst", lambda: run([-0.5, -2.0], -1.0),
                   False, [(True, "Compare with the worst hypothesis, not with the best")])
    grader.compare("two, and no running beam beats them", lambda: run([-0.5, -0.8], -1.0), True)
    grader.compare("a tie", lambda: run([-0.5, -1.0], -1.0), True)


def check_capfilt(student, grader: Grader) -> None:
    """Exercise 9."""
    captions = [{"caption": name, "source": name.split()[0]} for name in (
        "human a", "web b", "web c", "synthetic d", "synthetic e", "web f")]
    logits = torch.tensor([[5.0, 0], [0, 2], [2, 0], [0, 1], [1, 0], [4, 4]])
    right = ["human a", "web b", "synthetic d", "web f"]
    grader.compare("six texts by hand", lambda: student.keep_texts(captions, logits), right, [
        (["human a", "web b", "web c", "synthetic d", "web f"],
         "The filter judges the web texts too, not the synthetic ones alone"),
        (right[1:], "Human texts are not judged"),
        (["human a", "web c", "synthetic e", "web f"], "Class 1 is matched, class 0 is not"),
        (right[:3], "A probability of exactly the threshold is kept")])
    logits = torch.randn(30, 2)
    many = [{"caption": f"text {i}", "source": "web" if i % 2 else "synthetic",
             "itm": [p]} for i, p in enumerate(logits.softmax(-1)[:, 1].tolist())]
    capfilt.decide(many, CapFiltConfig(threshold=0.7), None)
    grader.compare("random texts at threshold 0.7, as capfilt.decide",
                   lambda: student.keep_texts(many, logits, 0.7),
                   [text["caption"] for text in many if text["kept"]])


def check_qformer(student, grader: Grader) -> None:
    """Exercise 10."""
    two = torch.tensor([[True, True]])
    x, o = True, False
    leak = "A query must not see the text in itc and itg"
    itm = [[x, x, x], [x, x, x], [x, x, x]]
    grids = {"itc": [[x, o, o], [o, x, x], [o, x, x]], "itg": [[x, o, o], [x, x, o], [x, x, x]],
             "itm": itm}
    wrong = {"itc": [(itm, leak)], "itm": [],
             "itg": [([[x, x, x], [x, x, o], [x, x, x]], leak),
                     ([[x, o, o], [x, x, x], [x, x, x]], "The text is causal in itg"),
                     ([[x, o, o], [o, x, o], [o, x, x]], "The text sees the queries in itg")]}
    for kind, grid in grids.items():
        mistakes = [(torch.tensor([[g]]), sentence) for g, sentence in wrong[kind]]
        grader.compare(f"{kind}: one query, two text tokens",
                       lambda kind=kind: student.attention_mask(kind, two, 1),
                       torch.tensor([[grid]]), mistakes)
        mask = texts()[1].bool()
        all_seen = qformer.attention_mask(kind, torch.ones_like(mask), 3)
        grader.compare(f"{kind}: random padding, as in blip2/qformer.py",
                       lambda kind=kind, mask=mask: student.attention_mask(kind, mask, 3),
                       qformer.attention_mask(kind, mask, 3), [(all_seen, "Padding is seen")])


def check_predictions(student, grader: Grader) -> None:
    """Exercises 11 and 12: predicted against measured."""
    name = student.__name__.rpartition(".")[2]
    solution = importlib.import_module(f"exercises.solutions.{name}")
    for letter, measured in solution.PREDICTIONS.items():
        predicted = in_measured_form(student.PREDICTIONS.get(letter, ...), measured)
        asked_for = "a number, in percent"
        if isinstance(measured, str):
            words = next(words for words in WORDS if measured in words)
            asked_for = f"{words[0]}, {words[1]} or {words[2]}"
        if predicted is ...:
            grader.add(False, f"{letter}: not predicted yet; put your answer in the place of ...")
        elif type(predicted) is not type(measured) or (
                isinstance(measured, str) and predicted not in words):
            grader.add(False, f"{letter}: {predicted!r} is no answer; give {asked_for}")
        elif predicted == measured or (
                isinstance(measured, float) and abs(predicted - measured) <= NEAR):
            grader.add(True, f"{letter}: {measured}. {solution.WHY[letter]}")
        else:
            grader.add(False, f"{letter}: you predicted {predicted!r}, measured was "
                              f"{measured!r}. {solution.WHY[letter]}")


def in_measured_form(predicted: object, measured: object) -> object:
    """A prediction as the measured value is written: "50 %" -> 50.0, "Beam search" -> "beam"."""
    if isinstance(predicted, str):
        predicted = predicted.strip().lower().removesuffix("%")
        predicted = predicted.removesuffix(" search").removesuffix(" sampling")
    if isinstance(measured, float):
        try:
            return float(predicted)
        except (TypeError, ValueError):
            return predicted
    return predicted


def check_hunt_in_losses(student, grader: Grader) -> None:
    """Exercise 13."""
    feats, keys, sim = unit(4, 8), unit(9, 8), torch.randn(4, 4)
    grader.compare("soft_targets", lambda: student.soft_targets(feats, keys, 0.1, 0.4),
                   soft(feats, keys, 0.1), [(soft(feats, keys, 1.0), "The twins' prediction is "
                                             "flatter than it should be")])
    own = two_texts_of_one_image(4)
    weights = (sim.softmax(1) + 1e-4).masked_fill(own, 0)
    grader.compare("negative_weights", lambda: student.negative_weights(sim, own, 1e-4), weights,
                   [(sim.masked_fill(own, 0).softmax(1) + 1e-4,
                     "A true pair can be drawn as a negative"),
                    ((sim.softmax(1) + 1e-4).masked_fill(torch.eye(4).bool(), 0), OTHER_TEXT),
                    ((sim.masked_fill(own, -math.inf).softmax(1) + 1e-4).masked_fill(own, 0),
                     "The softmax is taken over all columns (without the true one it is "
                     "--mask-positives)")])
    (ids, mask), logits = texts(), torch.randn(5, 7, 40)
    right = losses.lm_loss(logits[:, :-1], losses.next_token_targets(ids, mask), 0.0)
    late = ids[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    grader.compare("caption_loss", lambda: student.caption_loss(logits, ids, mask), right,
                   [(losses.lm_loss(logits[:, :-1], late, 0.0), "A padding token is learnt")])


def check_hunt_in_the_model(student, grader: Grader) -> None:
    """Exercise 14."""
    online, twin, logits = torch.randn(3), torch.randn(3), torch.randn(4, 2)
    grader.compare("momentum_step", lambda: student.momentum_step(online, twin, 0.9),
                   0.9 * twin + 0.1 * online, [
        (0.1 * twin + 0.9 * online, "The twin jumps to the model instead of following it")])
    for count, images in ((6, 3), (6, 2), (8, 4)):
        right = torch.arange(images).repeat_interleave(count // images)
        grader.compare(f"image_of_text({count}, {images})",
                       lambda count=count, images=images: student.image_of_text(count, images),
                       right, [(torch.arange(count) % images,
                                "Text 1 looks at image 1, but it belongs to image 0")])
    for new, cached in ((2, 4), (1, 7), (3, 4)):
        grader.compare(f"positions_of_new_tokens({new}, {cached})",
                       lambda new=new, cached=cached: student.positions_of_new_tokens(new, cached),
                       torch.arange(cached, cached + new), [
            (torch.arange(new), "The cache holds the positions from 0 on")])
    grader.compare("probability_of_match", lambda: student.probability_of_match(logits),
                   logits.softmax(1)[:, 1], [
        (logits.sigmoid()[:, 1], "The two classes' probabilities must sum to 1")])
