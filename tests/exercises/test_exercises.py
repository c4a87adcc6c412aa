"""Every solution passes, every hole fails, and a typical mistake gets a helpful sentence."""

import math
import types

import pytest
import torch
import torch.nn.functional as F

import decoding
import losses
from blip2 import qformer
from exercises import check
from exercises.check import COURSE, grade, load
from exercises.grading import compare_values

NUMBERS = range(1, len(COURSE) + 1)
BUGS = {"e13_hunt_in_losses": ["text_keys.T).softmax(1)", "sim.masked_fill(positives, 0)",
                               "mask[:, :-1] == 0"],
        "e14_hunt_in_the_model": ["(1 - momentum) * twin", "torch.arange(texts) % images",
                                  "torch.arange(new)", "logits.sigmoid()[:, 1]"]}


def skip_if_answered(exercises) -> None:
    """A student who fills in a hole must not break the project's tests."""
    for exercise in exercises:
        text = (check.ROOT / "exercises" / f"{exercise.file}.py").read_text()
        holes = BUGS.get(exercise.file)
        if exercise.check is check.checks.check_predictions:
            holes = [f'"{letter}": ...' for letter in "abcd"]
        if not all(hole in text for hole in holes or ["    raise NotImplementedError"]):
            pytest.skip(f"{exercise.file} has been answered")


@pytest.mark.parametrize("exercise", COURSE, ids=lambda e: e.file)
def test_the_solution_passes(exercise):
    grader = grade(exercise, load(exercise, solution=True))
    assert grader.passed(), [str(line) for line in grader.lines]


@pytest.mark.parametrize("exercise", COURSE, ids=lambda e: e.file)
def test_the_file_as_a_student_gets_it_fails(exercise):
    """Each check fails; a hunt has a bug in every function."""
    skip_if_answered([exercise])
    grader = grade(exercise, load(exercise, solution=False))
    assert grader.lines and not any(line.passed for line in grader.lines)


@pytest.mark.parametrize("exercise", COURSE, ids=lambda e: e.file)
def test_the_file_explains_and_hints(exercise):
    module = load(exercise, solution=False)
    number = COURSE.index(exercise) + 1
    assert module.__doc__.startswith(f"{number}. ") and exercise.file.startswith(f"e{number:02}_")
    assert "sec. " in module.__doc__ and module.HINT
    text = (check.ROOT / "exercises" / "README.md").read_text()
    assert f"[{exercise.file[4:]}]({exercise.file}.py)" in text


# ---- typical mistakes ----

def targets_of_themselves(ids, mask, prompt_length=0):
    return ids[:, :-1].masked_fill(mask[:, :-1] == 0, -100)


def padding_is_learnt(ids, mask, prompt_length=0):
    return ids[:, 1:]


def targets_without_temperature(image_feat, text_feat, image_keys, text_keys, temp, alpha,
                                positives=None):
    truth, B = torch.eye(len(image_feat), len(image_keys)), len(image_feat)
    i2t = alpha * (image_keys[:B] @ text_keys.T).softmax(1) + (1 - alpha) * truth
    t2i = alpha * (text_keys[:B] @ image_keys.T).softmax(1) + (1 - alpha) * truth
    return (F.cross_entropy(image_feat @ text_keys.T / temp, i2t)
            + F.cross_entropy(text_feat @ image_keys.T / temp, t2i)) / 2


def positives_at_zero_similarity(sim, positives, floor, draw):
    return draw(sim.masked_fill(positives, 0).softmax(1) + floor)


def mask_without_padding(mask, causal):
    ones = torch.ones(len(mask), 1, mask.shape[1], mask.shape[1])
    return ones.tril().bool() if causal else ones.bool()


def swapped_momentum(online, twins, momentum):
    for parameter, twin in zip(online, twins):
        twin.copy_((1 - momentum) * twin + momentum * parameter)


def new_name_instead_of_in_place(online, twins, momentum):
    for parameter, twin in zip(online, twins):
        twin = momentum * twin + (1 - momentum) * parameter


def pointer_that_does_not_wrap(queue, pointer, features):
    queue[(pointer + torch.arange(len(features))) % len(queue)] = features
    return pointer + len(features)


def crossing_token_is_lost(logits, top_p):
    ordered, order = logits.sort(-1, descending=True)
    dropped = ordered.softmax(-1).cumsum(-1) > top_p
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def one_hypothesis_is_enough(beams, best_running):
    return bool(beams.hypotheses) and beams.hypotheses[-1][1] >= best_running


def the_best_is_compared(beams, best_running):
    return len(beams.hypotheses) == beams.size and beams.hypotheses[0][1] >= best_running


def web_texts_stay(texts, logits, threshold=0.5):
    matched = logits.softmax(-1)[:, 1]
    return [text["caption"] for text, p in zip(texts, matched)
            if text["source"] != "synthetic" or p >= threshold]


def queries_see_the_text(kind, text_mask, queries):
    size = queries + text_mask.shape[1]
    return torch.ones(len(text_mask), 1, size, size).bool()


def ids_are_overwritten(ids, mask, prompt_length=0):
    ids[:, 1:][mask[:, 1:] == 0] = -100
    return losses.next_token_targets(ids, torch.ones_like(mask), prompt_length)


def the_model_is_overwritten(online, twins, momentum):
    for p, twin in zip(online, twins):
        twin.mul_(momentum).add_(p.mul_(1 - momentum))


def logits_are_overwritten(logits, top_p):
    return logits.copy_(decoding.top_p_filter(logits, top_p))


def the_list_reaches_p(logits, top_p):
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    dropped = probability.cumsum(-1) - probability >= top_p
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def targets_of_the_model(image_feat, text_feat, image_keys, text_keys, temp, alpha):
    truth = torch.eye(len(image_feat), len(image_keys))
    def one_way(feat, keys):
        with torch.no_grad():
            target = alpha * (feat @ keys.T / temp).softmax(1) + (1 - alpha) * truth
        return F.cross_entropy(feat @ keys.T / temp, target)
    return (one_way(image_feat, text_keys) + one_way(text_feat, image_keys)) / 2


def softmax_over_negatives(sim, positives, floor, draw):
    return draw(sim.masked_fill(positives, -math.inf).softmax(1) + floor * (~positives))


def new_tensors_in_the_list(online, twins, momentum):
    for i, parameter in enumerate(online):
        twins[i] = momentum * twins[i] + (1 - momentum) * parameter


def the_diagonal_instead_of_positives(sim, positives, floor, draw):
    return draw((sim.softmax(1) + floor).fill_diagonal_(0))


def draw_is_never_called(sim, positives, floor, draw):
    return sim.argmax(1)


def padded_rows_are_hidden_too(mask, causal):
    real = mask[:, None, None].bool() & mask[:, None, :, None].bool()
    return real & torch.ones(mask.shape[1], mask.shape[1]).tril().bool() if causal else real


def qformer_padding_is_seen(kind, text_mask, queries):
    return qformer.attention_mask(kind, torch.ones_like(text_mask), queries)


def pointer_moves_by_the_batch(queue, pointer, features):
    new = (pointer + len(features)) % len(queue)
    features = features[-len(queue):]
    queue[(pointer + torch.arange(len(features))) % len(queue)] = features
    return new


def mask_of_numbers(kind, text_mask, queries):
    return qformer.attention_mask(kind, text_mask, queries).float()


MISTAKES = [
    (1, ids_are_overwritten, "the ids are not changed"), (5, the_model_is_overwritten, "the model"),
    (7, logits_are_overwritten, "the logits are not changed"), (7, the_list_reaches_p, "exceed p"),
    (2, targets_of_the_model, "from the first B keys"), (3, softmax_over_negatives, "--mask-pos"),
    (6, pointer_moves_by_the_batch, "comes back to where it was"),
    (5, new_tensors_in_the_list, "did not move"), (3, draw_is_never_called, "return draw(weights)"),
    (3, the_diagonal_instead_of_positives, "not the diagonal"),
    (4, padded_rows_are_hidden_too, "the same rule as all rows"),
    (10, qformer_padding_is_seen, "Padding is seen"),
    (10, mask_of_numbers, "attention adds a mask of numbers"),
    (1, targets_of_themselves, "predicts itself"), (1, padding_is_learnt, "Padding is learnt"),
    (2, targets_without_temperature, "Divide by temp in the targets"),
    (3, positives_at_zero_similarity, "weight to 0 after the softmax"),
    (4, mask_without_padding, "Padding is seen"),
    (5, swapped_momentum, "swapped"), (5, new_name_instead_of_in_place, "did not move"),
    (6, pointer_that_does_not_wrap, "pointer must wrap"),
    (7, crossing_token_is_lost, "crosses p belongs"),
    (8, one_hypothesis_is_enough, "two are wanted"), (8, the_best_is_compared, "worst hypothesis"),
    (9, web_texts_stay, "judges the web texts too"),
    (10, queries_see_the_text, "must not see the text"),
]


@pytest.mark.parametrize("number,wrong,sentence", MISTAKES, ids=lambda value: str(value)[:30])
def test_a_typical_mistake_gets_a_helpful_sentence(number, wrong, sentence):
    name = function_name(number)
    grader = grade(COURSE[number - 1], types.SimpleNamespace(**{name: wrong}))
    assert not grader.passed()
    assert any(sentence in line.text for line in grader.lines if not line.passed)


def function_name(number: int) -> str:
    """The name of the one function in an exercise."""
    module = load(COURSE[number - 1], solution=True)
    names = [name for name, value in vars(module).items()
             if isinstance(value, types.FunctionType) and value.__module__ == module.__name__]
    return names[0]


def test_each_bug_of_a_hunt_is_named():
    skip_if_answered(COURSE[12:])
    for number in (13, 14):
        for line in grade(COURSE[number - 1], load(COURSE[number - 1], False)).lines:
            assert "expected" in line.text and ". " in line.text  # the sentence behind the values


def test_a_wrong_prediction_shows_what_was_measured():
    module = types.SimpleNamespace(__name__="exercises.e11_predict_losses",
                                   PREDICTIONS={"a": 45, "b": "same", "c": ..., "d": " Worse"})
    lines = grade(COURSE[10], module).lines
    assert [line.passed for line in lines] == [True, False, False, True]
    assert "you predicted 'same', measured was 'worse'" in lines[1].text
    assert "not predicted yet" in lines[2].text


def test_a_prediction_may_be_written_in_other_ways():
    module = types.SimpleNamespace(__name__="exercises.e11_predict_losses",
                                   PREDICTIONS={"a": "50 %", "b": "bad", "c": 3, "d": "WORSE"})
    lines = grade(COURSE[10], module).lines
    assert [line.passed for line in lines] == [True, False, False, True]
    assert lines[1].text == "b: 'bad' is no answer; give worse, better or same"
    module.PREDICTIONS = {"a": "half"}
    assert grade(COURSE[10], module).lines[0].text.endswith("give a number, in percent")
    module = types.SimpleNamespace(__name__="exercises.e12_predict_capfilt", PREDICTIONS={
        "a": "Beam search", "b": "nucleus sampling", "c": "nucleus", "d": "tie"})
    assert grade(COURSE[11], module).passed()


# ---- the command ----

def test_nothing_that_a_student_writes_gives_a_traceback(monkeypatch, capsys):
    def raises(ids, mask, prompt_length=0):
        return ids[:, 1:] + mask
    answers = [raises, lambda ids, mask, prompt_length=0: None, lambda: 0,
               lambda ids, mask, prompt_length=0: ids[:, 2:], "no function"]
    words = ["code raised RuntimeError", "returned None", "TypeError", "got shape", "TypeError"]
    for answer, word in zip(answers, words):
        module = types.SimpleNamespace(next_token_targets=answer, HINT="a hint")
        monkeypatch.setattr(check, "load", lambda *_, module=module: module)
        assert check.main(["1", "--hint"]) == 1
        printed = capsys.readouterr().out
        assert word in printed and "a hint" in printed and "0 of 1" in printed
    def broken(*_):
        raise SyntaxError("invalid syntax")
    monkeypatch.setattr(check, "load", broken)
    assert check.main(["1"]) == 1
    assert "the file cannot be read: your code raised SyntaxError" in capsys.readouterr().out


def test_all_at_once(capsys):
    assert check.main(["all", "--solution", "--quick"]) == 0
    assert "14 of 14 exercises passed" in capsys.readouterr().out
    skip_if_answered(COURSE)
    assert check.main(["all", "--quick"]) == 1
    assert "0 of 14 exercises passed" in capsys.readouterr().out


def test_the_projects_tests_run_with_the_students_function(capfd):
    skip_if_answered([COURSE[1]])
    assert not check.run_own_tests(2, solution=False)
    assert "WRONG   the project's test_itc_two_by_two_by_hand: NotImplementedError" in (
        capfd.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [n for n in NUMBERS if COURSE[n - 1].replaces])
def test_the_projects_tests_pass_with_the_solution(number, capfd):
    assert check.run_own_tests(number, solution=True)
    assert "passed  the project's test_" in capfd.readouterr().out


def test_values_are_compared_in_words():
    assert compare_values(torch.tensor(0.5), 0.5) == ""
    assert compare_values((1, 2), (1, 2)) == "" and compare_values(1.0, 2.0)
    assert "expected 2 values" in compare_values(3, (1, 2))
    wrong = torch.ones(4, 25)
    wrong[1, 3] = 0
    assert compare_values(wrong, torch.ones(4, 25)) == (
        "the tensor (4, 25) is wrong in 1 of 100 places; at [1, 3] got 0.0000, expected 1.0000")
