"""Measures, computed from plain numbers and strings.

    ranks, recall, rank_statistics   retrieval: R@K, median and mean rank
    bleu, rouge_l, cider             captions, from tokenised texts (`tokenise`)
    caption_scores                   all of them for one set of captions
    vqa_accuracy, consistency        VQA's official measure; NLVR2's second one
    dialog_scores, ndcg              visual dialog: MRR, R@K, mean rank; NDCG

The caption measures follow the definitions of the COCO caption evaluation, so that their values can
be compared with published ones. SPICE and METEOR are not here: they need Java and WordNet;
`python eval.py caption` writes the files that their tools read.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

Tokens = list[str]

# ---- retrieval -----------------------------------------------------------------------------------

def ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank of each row's best-placed positive, 0 = first.

    scores (R, C), positives (R, C) bool -> (R,). A tie counts against the positive, and so does a
    score that is no number: neither a constant score nor a broken model earns anything.
    """
    best = scores.masked_fill(~positives, float("-inf")).amax(1, keepdim=True)
    return (~(scores < best) & ~positives).sum(1)


def recall(rank: Tensor, prefix: str, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """rank (R,) -> {prefix_r1: share of rows ranked first, prefix_r5, prefix_r10}."""
    return {f"{prefix}_r{k}": (rank < k).float().mean().item() for k in at}


def rank_statistics(rank: Tensor, prefix: str) -> dict[str, float]:
    """rank (R,), 0 = first -> median and mean rank, 1 = first, as they are published."""
    return {f"{prefix}_median_rank": rank.double().add(1).quantile(0.5).item(),
            f"{prefix}_mean_rank": rank.double().add(1).mean().item()}


def recall_chance(columns: int, positives_per_row: int, prefix: str,
                  at=(1, 5, 10)) -> dict[str, float]:
    """Expected recall of a random order: 1 - P(no positive among the first k)."""
    chance = {}
    for k in at:
        miss = 1.0
        for i in range(min(k, columns)):
            miss *= max(columns - positives_per_row - i, 0) / (columns - i)
        chance[f"{prefix}_r{k}"] = 1 - miss
    return chance


# ---- captions ------------------------------------------------------------------------------------

IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff"
LETTERS = rf"[^\W_{IDEOGRAPH}]+"
TOKEN = re.compile(rf"[{IDEOGRAPH}]|{LETTERS}(?:['’-]{LETTERS})*")


def tokenise(text: str) -> Tokens:
    """The words of a text in lower case and without accents, other signs dropped.

    A token is a run of letters and digits, also joined by an inner hyphen or apostrophe, or one
    Chinese character: so does an uncased WordPiece write, and a caption is compared with references
    that people wrote. The Penn Treebank tokeniser of the COCO evaluation differs in little: it
    splits a clitic off ("dog's" is "dog 's" there, "don't" is "do n't"), and keeps accents.
    """
    letters = unicodedata.normalize("NFD", text.lower())
    return TOKEN.findall("".join(c for c in letters if unicodedata.category(c) != "Mn"))


def ngrams(tokens: Tokens, n: int) -> Counter:
    """How often each run of n tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def bleu(predictions: list[Tokens], references: list[list[Tokens]], order: int = 4) -> list[float]:
    """[BLEU-1, ..., BLEU-order] of the whole set (Papineni et al. 2002).

    Clipped n-gram precisions, and a brevity penalty against the reference closest in length, the
    shorter one if two are equally close.
    """
    right, guessed, length, target = [0] * order, [0] * order, 0, 0
    for prediction, texts in zip(predictions, references):
        length += len(prediction)
        distances = [(abs(len(text) - len(prediction)), len(text)) for text in texts]
        target += min(distances)[1]
        for n in range(1, order + 1):
            predicted, allowed = ngrams(prediction, n), Counter()
            for text in texts:
                allowed |= ngrams(text, n)  # the largest count in any reference
            right[n - 1] += (predicted & allowed).total()
            guessed[n - 1] += predicted.total()
    penalty = math.exp(min(0.0, 1 - target / length)) if length else 0.0
    scores, log_sum = [], 0.0
    for n in range(order):
        log_sum += math.log(right[n] / guessed[n]) if right[n] else float("-inf")
        scores.append(penalty * math.exp(log_sum / (n + 1)))
    return scores


def longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    """Length of it; the tokens need not be neighbours."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(predictions: list[Tokens], references: list[list[Tokens]]) -> list[float]:
    """ROUGE-L of each caption (Lin 2004): F measure of the longest common subsequence.

    With the best precision and the best recall over the references, beta 1.2.
    """
    scores, beta2 = [], 1.2 ** 2
    for prediction, texts in zip(predictions, references):
        common = [longest_common_subsequence(prediction, text) for text in texts]
        precision = max(common) / max(len(prediction), 1)
        recalled = max(c / max(len(text), 1) for c, text in zip(common, texts))
        scores.append((1 + beta2) * precision * recalled / (recalled + beta2 * precision)
                      if precision and recalled else 0.0)
    return scores


def cider(predictions: list[Tokens], references: list[list[Tokens]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015, sec. 4 and 5).

    The score of a set is their mean, published times 100. Cosine of tf-idf vectors of 1- to
    4-grams, averaged over n and over the references, times 10. An n-gram is rare if few images have
    it in a reference. Against gaming: a prediction's counts are clipped to the reference's, and a
    difference in length costs exp(-d^2 / 2 sigma^2), sigma 6.
    """
    order, sigma = 4, 6.0
    images_with = Counter()
    for texts in references:
        images_with.update({g for t in texts for n in range(1, order + 1) for g in ngrams(t, n)})
    log_images = math.log(len(references))

    def vectors(tokens):
        """Per n, the tf-idf weights and their norm."""
        weights = [{g: count * (log_images - math.log(max(images_with[g], 1)))
                    for g, count in ngrams(tokens, n).items()} for n in range(1, order + 1)]
        return [(w, math.sqrt(sum(x * x for x in w.values()))) for w in weights]

    scores = []
    for prediction, texts in zip(predictions, references):
        mine, total = vectors(prediction), 0.0
        for text in texts:
            penalty = math.exp(-(len(prediction) - len(text)) ** 2 / (2 * sigma ** 2))
            for (w, norm), (w_ref, norm_ref) in zip(mine, vectors(text)):
                if norm and norm_ref:
                    dot = sum(min(x, w_ref[g]) * w_ref[g] for g, x in w.items() if g in w_ref)
                    total += penalty * dot / (norm * norm_ref)
        scores.append(10 * total / order / len(texts))
    return scores


def caption_scores(predictions: Sequence[str],
                   references: Sequence[Sequence[str]]) -> tuple[dict[str, float], list[float]]:
    """bleu1 to bleu4, rouge_l and cider of a set of captions, and each caption's CIDEr-D.

    One caption and one or more reference captions for each image.
    """
    predictions = [tokenise(text) for text in predictions]
    references = [[tokenise(text) for text in texts] for texts in references]
    each = cider(predictions, references)
    numbers = {f"bleu{n}": value for n, value in enumerate(bleu(predictions, references), 1)}
    numbers["rouge_l"] = sum(rouge_l(predictions, references)) / len(predictions)
    numbers["cider"] = sum(each) / len(each)
    return numbers, each


# ---- visual question answering -------------------------------------------------------------------

# Words that the official VQA script writes with their apostrophe whatever the answer has.
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've
    it'll let's ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {word.replace("'", "").lower(): word for word in CONTRACTED}
DIGITS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"


def normalise_answer(text: str) -> str:
    """An answer as the official VQA evaluation compares it.

    Punctuation removed (a sign inside a word becomes a space), number words as digits, no articles,
    contractions with apostrophe.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands, plain = re.search(r"\d,\d", text), text
    for sign in PUNCTUATION:
        apart = f"{sign} " in text or f" {sign}" in text or thousands
        plain = plain.replace(sign, "" if apart else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [DIGITS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words
                    if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """VQA's official measure: min(1, the same answers among the other people / 3), averaged.

    Each of the people is left out in turn. So four of ten who say so make it right, one makes 30 %.
    Answers are normalised where people disagree. Fewer than four people: all of the others must say
    the same (the official measure knows ten).
    """
    people = [text.replace("\n", " ").replace("\t", " ").strip() for text in people]
    if len(set(people)) > 1:
        answer, people = normalise_answer(answer), [normalise_answer(text) for text in people]
    same = sum(text == answer for text in people)
    if len(people) == 1:  # nobody else was asked: Visual Genome
        return float(same)
    enough = min(3, len(people) - 1)
    return sum(min(1.0, (same - (text == answer)) / enough) for text in people) / len(people)


def consistency(right: Sequence[bool], groups: Sequence[str]) -> float:
    """NLVR2: the share of sentences of which all image pairs were judged right."""
    by_group: dict[str, bool] = {}
    for ok, group in zip(right, groups):
        by_group[group] = by_group.get(group, True) and bool(ok)
    return sum(by_group.values()) / max(len(by_group), 1)


# ---- visual dialog -------------------------------------------------------------------------------

def dialog_scores(ranks: Sequence[int]) -> dict[str, float]:
    """MRR, R@1, 5, 10 and mean rank (1 = first), as VisDial reports them.

    ranks: of each round's answer among its candidates, 0 = first.
    """
    count = max(len(ranks), 1)
    return {"mrr": sum(1 / (rank + 1) for rank in ranks) / count,
            **{f"r{k}": sum(rank < k for rank in ranks) / count for k in (1, 5, 10)},
            "mean_rank": sum(rank + 1 for rank in ranks) / count}


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    """VisDial's NDCG of one round.

    The candidates' dense relevance, discounted by 1 / log2(1 + rank) over the first K ranks, K the
    number of relevant ones, relative to the best order.
    """
    k = sum(value > 0 for value in relevance)
    def gain(order):
        return sum(relevance[i] / math.log2(rank + 2) for rank, i in enumerate(order[:k]))
    best = gain(sorted(range(len(relevance)), key=lambda i: -relevance[i]))
    if best == 0:
        return 0.0
    return gain(sorted(range(len(scores)), key=lambda i: -scores[i])) / best


def mean(values) -> float:
    """Of numbers or truth values; 0 for none."""
    values = [float(value) for value in values]
    return sum(values) / max(len(values), 1)
