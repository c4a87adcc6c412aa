"""Nucleus sampling and beam search on distributions small enough to enumerate, and against the
released code."""

import math
from itertools import product

import pytest
import torch
from conftest import reference, toy_batch, toy_model

from blip import BLIP
from config import BLIPConfig
from decoding import (
    beam_search,
    draw_token,
    nucleus_sample,
    penalise_repetition,
    top_k_filter,
    top_p_filter,
)
from weights.names import decoder_names, vit_names

EOS = 0


def markov_step(seed: int, vocabulary: int = 5):
    """A step() whose next-token probabilities depend on the last token alone; it ignores rows."""
    table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    return table, lambda tokens, rows: table[tokens[:, -1]]


def test_top_p_by_hand_on_five_tokens():
    probability = torch.tensor([[0.10, 0.40, 0.05, 0.25, 0.20]])
    def kept(p):
        return (top_p_filter(probability.log(), p)[0] > float("-inf")).nonzero().flatten().tolist()
    # Sorted: 0.40 (token 1), 0.25 (3), 0.20 (4), 0.10 (0), 0.05 (2); mass before each: 0, 0.40,
    # 0.65, 0.85, 0.95.
    assert kept(0.3) == [1]  # the first always stays
    assert kept(0.5) == [1, 3]  # the token that crosses p belongs to the nucleus
    assert kept(0.9) == [0, 1, 3, 4]
    assert kept(1.0) == [0, 1, 2, 3, 4]


def test_top_k_and_repetition_penalty_by_hand():
    logits = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    assert top_k_filter(logits, 2).tolist() == [[3.0, float("-inf"), 2.0, float("-inf")]]
    assert top_k_filter(logits, 0) is logits
    seen = torch.tensor([[0, 1, 1]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.5, -2.0, 2.0, 0.5]]


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_of_all_sequences(seed):
    table, step = markov_step(seed)
    logp, best = table.log_softmax(-1), (-1e9, None)
    # tokens after the prompt [1], at most 4 in all; a shorter text pays for its end
    for length in (1, 2, 3):
        for tokens in product(range(1, 5), repeat=length):
            path = (1,) + tokens
            total = sum(logp[a, b].item() for a, b in zip(path, tokens))
            total += logp[path[-1], EOS].item() if len(path) < 4 else 0
            best = max(best, (total / len(path), list(path)))
    total = logp[1, EOS].item()
    best = max(best, (total, [1]))
    ids, score = beam_search(step, torch.tensor([[1]]), EOS, beams=200, max_length=4,
                             min_length=1)[0][0]
    assert ids == best[1] and score == pytest.approx(best[0], abs=1e-5)


def test_an_end_counts_only_among_the_first_beams():
    # Two beams after the prompt 1: token 2 (0.5) and token 3 (0.45). Then the best continuations
    # are 2-end (0.25), 2-4 (0.23), 3-end (0.2025): the second end ranks third and is passed over.
    table = torch.zeros(50, 50)
    table[1, 2:4] = torch.tensor([0.5, 0.45]).log() + 100
    table[2, [EOS, 4]] = torch.tensor([0.5, 0.46]).log() + 100
    table[3, [EOS, 5]] = torch.tensor([0.45, 0.55]).log() + 100
    table[3, 5:15] = math.log(0.055) + 100
    found = beam_search(lambda tokens, rows: table[tokens[:, -1]], torch.tensor([[1]]), EOS,
                        beams=2, max_length=4, min_length=1)[0]
    assert found[0][0] == [1, 2] and found[1][0] != [1, 3]


def test_looking_ahead_goes_on_while_a_longer_text_may_win():
    """ahead=1 divides the best running sum by the length that it has, ahead=0 by one less."""
    better = 0
    for seed in range(200):
        _, step = markov_step(seed)
        scores = [beam_search(step, torch.tensor([[1]]), EOS, beams=2, max_length=8, min_length=1,
                              ahead=ahead)[0][0][1] for ahead in (0, 1)]
        assert scores[1] >= scores[0] - 1e-6
        better += scores[1] > scores[0] + 1e-6
    assert better > 0


def test_minimum_length_holds_the_end_back():
    table, step = markov_step(0)
    table[:, EOS] = 9.0
    for search in (lambda **k: [h[0] for h in beam_search(step, torch.tensor([[1]]), EOS, **k)],
                   lambda **k: nucleus_sample(step, torch.tensor([[1]]), EOS, **k)):
        assert len(search(min_length=1, max_length=9)[0][0]) == 1
        assert len(search(min_length=6, max_length=9)[0][0]) == 6


def test_sampling_follows_the_filtered_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    prompt = torch.full((4000, 1), 1)
    samples = nucleus_sample(lambda tokens, rows: logits.expand(len(tokens), -1), prompt, 99,
                             max_length=2, min_length=1, top_p=0.7,
                             generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([ids[1] for ids, _ in samples]), minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03)
    assert samples[0][1] == pytest.approx(logits[0, samples[0][0][1]].item(), abs=1e-5)


def test_sampling_is_repeatable_and_finished_rows_cost_nothing():
    table, step = markov_step(1)
    sizes = []
    def counted(tokens, rows):
        sizes.append(len(tokens))
        return step(tokens, rows)
    def run():
        return nucleus_sample(counted, torch.full((50, 1), 2), EOS, max_length=12, min_length=1,
                              top_p=1.0, generator=torch.Generator().manual_seed(7))
    assert run() == run()
    assert (sizes[0] == 50
            and sorted(sizes[:len(sizes) // 2], reverse=True) == sizes[:len(sizes) // 2])
    assert sizes[len(sizes) // 2 - 1] < 50
    with pytest.raises(ValueError, match="top_p"):
        nucleus_sample(step, torch.tensor([[1]]), EOS, top_p=0.0)


def test_batches_give_what_single_images_give():
    model, image = toy_model().eval(), toy_batch(4)["image"]
    together = model.generate(image, max_length=12, min_length=2, beams=3)
    alone = [model.generate(image[i:i + 1], max_length=12, min_length=2, beams=3)[0]
             for i in range(4)]
    for a, b in zip(together, alone):
        assert a[0][0] == b[0][0] and a[0][1] == pytest.approx(b[0][1], abs=1e-4)


def test_several_captions_an_image():
    model, image = toy_model().eval(), toy_batch(2)["image"]
    for method in ("beam", "nucleus"):
        found = model.generate(image, method=method, num_return=3, max_length=10, min_length=2)
        assert [len(captions) for captions in found] == [3, 3]
        for captions in found:
            assert captions == sorted(captions, key=lambda c: -c[1])


# ---- the released captioner ----

def released_captioner():
    ref = reference("d_caption.pt")
    model = BLIP(BLIPConfig(image_size=64, vit_width=48, vit_depth=2, vit_heads=4, text_width=64,
                            text_depth=2, text_heads=4, text_ffn=128, max_positions=64,
                            embed_dim=32, queue_size=0, vocab_size=486, cls_id=2, sep_id=3,
                            dec_id=484, enc_id=485)).eval()
    state = model.state_dict()
    for ours, released in (vit_names("visual_encoder.", "vit.", 2)
                           + decoder_names("text_decoder", 2)):
        state[ours].copy_(torch.cat([ref["model"][name] for name in released]))
    return model, ref


@torch.no_grad()
def test_prompted_lm_loss_equals_the_released_one():
    model, ref = released_captioner()
    out = ref["outputs"]
    model.set_objectives(("lm",))
    losses, _ = model(ref["inputs"]["image"], out["train_input_ids"], out["train_attention_mask"],
                      prompt_length=out["prompt_length"])
    assert losses["lm"].item() == pytest.approx(out["loss_lm_with_prompt"].item(), abs=1e-5)


@pytest.mark.parametrize("case", ["default", "min10", "rep1.3", "beams5"])
def test_beam_search_equals_the_released_one(case):
    model, ref = released_captioner()
    options, out = dict(ref["inputs"]["beam_cases"][case]), ref["outputs"]
    options["beams"] = options.pop("num_beams")
    prompt = out["train_input_ids"][0, 1:out["prompt_length"]].tolist()
    found = model.generate(ref["inputs"]["image"], prompt, **options)
    for row, expected, score in zip(found, out[f"beam_{case}"]["ids"],
                                    out[f"beam_{case}"]["sequences_scores"]):
        ids = [484] + prompt + row[0][0]
        ids += [3] * (len(ids) < options["max_length"])
        assert ids == [i for i in expected.tolist() if i != 0]
        assert row[0][1] == pytest.approx(score.item(), abs=1e-4)


def test_nucleus_keeps_what_the_released_one_keeps():
    model, ref = released_captioner()
    out, inputs, steps = ref["outputs"]["nucleus"], ref["inputs"], []
    prompt = ref["outputs"]["train_input_ids"][0, 1:ref["outputs"]["prompt_length"]].tolist()
    def draw(probability):
        steps.append(probability)
        return probability.argmax(-1, keepdim=True)
    image = inputs["image"]
    found = [model.generate(image[i:i + 1], prompt, "nucleus",
                            max_length=inputs["nucleus_max_length"], top_k=50,
                            min_length=inputs["nucleus_min_length"], repetition_penalty=1.1,
                            draw=draw)[0][0] for i in range(3)]
    start = 0
    for i, (ids, _) in enumerate(found):
        expected = [t for t in out["ids"][i].tolist() if t != 0]
        assert ([484] + prompt + ids + [3])[:len(expected)] == expected
        length = min(len(ids) + 1, inputs["nucleus_max_length"] - len(prompt) - 1)
        for t in range(length):
            mine = steps[start + t][0]
            assert (torch.equal(mine > 0, out["kept"][t, i].bool())
                    and torch.allclose(mine, out["probs"][t, i], atol=1e-4))
        start += length
    assert start == len(steps)


def test_tokens_are_drawn_by_their_probability():
    probability = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]]).expand(20000, -1)
    drawn = draw_token(probability, torch.Generator().manual_seed(0)).flatten()
    shares = torch.bincount(drawn, minlength=6) / 20000
    assert torch.allclose(shares, probability[0], atol=0.01)
    assert set(drawn.tolist()) == {1, 3, 4}  # what has no probability is never drawn
