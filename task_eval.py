"""Evaluation of the tasks of tasks.py: questions and statements, each with what a model that sees
nothing would score beside it.

    answer_questions     a data set -> {question_id, answer}: the result file of VQA's server
    evaluate_vqa         accuracy, by kind; the commonest answer for each kind; a grey image
    evaluate_nlvr2       accuracy, consistency; the commoner label; grey images
    evaluate_visdial     MRR, R@K, mean rank, NDCG; a random order; grey images
    evaluate_clips       retrieval of clips with a model of images
    add_commands, run    their part of eval.py's command line
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import checkpoints
import demo
import distributed
from blip import BLIP
from data import InputError, Tokenizer, clean_question, normalise
from metrics import consistency, dialog_scores, ndcg, ranks, vqa_accuracy
from pairs import read_json
from report import print_numbers, write_numbers
from retrieval import encode, retrieval, retrieval_chance, shared_batches
from sheets import BLACK, GREEN, GREY, RED, Cell, draw_sheet
from task_data import (
    DialogCollate,
    QuestionCollate,
    StatementCollate,
    dialog_ids,
    open_task,
    pad,
)
from tasks import MODELS, NLVR2, VQA, VisDial
from video import ClipDataset, ClipQuestionDataset, read_clip_questions, read_clips
from world_tasks import ClipQuestions, Clips

GREY_LEVEL = 128
Sections = list[tuple[str, list[list[Cell]]]]


def batches(dataset: Dataset, collate, about: str, device: torch.device,
            blank: bool) -> Iterator[tuple[dict, Tensor, Tensor, Tensor]]:
    """This rank's batches as (batch, image, ids, mask), the latter on the device; `blank`: every
    image grey. What cannot be read is left out."""
    loader = DataLoader(dataset, collate_fn=collate, batch_sampler=shared_batches(len(dataset)))
    for batch in distributed.progress(loader, about, unit="batch"):
        if batch["image"] is None:
            continue
        if blank:
            batch["image"] = torch.full_like(batch["image"], GREY_LEVEL)
        yield (batch, normalise(batch["image"].to(device)),
               *(batch[name].to(device) for name in ("ids", "mask")))


# ---- visual question answering -------------------------------------------------------------------

@torch.no_grad()
def answer_questions(model: VQA, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                     answers: list[str], max_tokens: int = 35, top_k: int = 128,
                     blank: bool = False) -> list[dict]:
    """-> {question_id, answer, index} of each question, by ranking `answers` (the top_k whose first
    token is likeliest), or by generating where there are none."""
    model.eval()
    ids_mask = [x.to(device) for x in tokenizer.encode(answers, max_tokens)] if answers else None
    found = []
    for batch, image, ids, mask in batches(dataset, QuestionCollate(tokenizer, max_tokens),
                                           "answers", device, blank):
        kv = model.read(image, ids, mask)
        if answers:
            chosen, nll = model.rank(kv, *ids_mask, top_k)
            best = chosen.gather(1, nll.argmin(1, keepdim=True)).flatten().tolist()
            told = [answers[i] for i in best]
        else:
            told = [tokenizer.decode(tokens) for tokens, _ in model.generate(kv)]
        found += [{"question_id": q, "answer": a, "index": i}
                  for q, a, i in zip(batch["question_id"], told, batch["index"])]
    return sorted(distributed.gather(found), key=lambda record: record["index"])


def kind_of(item: dict) -> str:
    """What a question asks for, as the prior knows it: its kind, or its first two words."""
    return item["kind"] or " ".join(item["question"].lower().split()[:2])


def commonest_answers(dataset: Dataset, count: int = 5000) -> dict[str, str]:
    """Kind of question -> its commonest answer in the training set; "" -> the commonest of all."""
    found: dict[str, Counter] = {"": Counter()}
    for i in range(0, len(dataset), max(1, len(dataset) // count)):
        item = facts_of(dataset, i)
        for name in ("", kind_of(item)):
            found.setdefault(name, Counter()).update(item["answers"])
    return {name: counter.most_common(1)[0][0] for name, counter in found.items()}


def facts_of(dataset: Dataset, index: int) -> dict:
    """{question, answers, kind} of an item, without its image."""
    if hasattr(dataset, "question"):  # the world's
        asked = dataset.question(index)
        return {"question": asked.text, "answers": asked.answers, "kind": asked.kind}
    return dataset.item(dataset.pairs[index], None)


def evaluate_vqa(model: VQA, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                 answers: list[str], training: Dataset | None = None, max_tokens: int = 35,
                 top_k: int = 128, blank: bool = True) -> tuple[dict, Sections, list[dict]]:
    """-> numbers (accuracy, accuracy_by kind; "chance": the commonest answer of the training set
    for each kind of question; blank_accuracy: the same model on grey images), a sheet's sections,
    the records."""
    records = answer_questions(model, tokenizer, dataset, device, answers, max_tokens, top_k)
    facts = [facts_of(dataset, record["index"]) for record in records]
    if not all(fact["answers"] for fact in facts):  # a test set
        return {"questions": len(records)}, answer_sections(dataset, records, facts), records
    def scores(told):
        return [vqa_accuracy(answer, fact["answers"]) for answer, fact in zip(told, facts)]
    def by_kind(found, name="accuracy"):
        kinds: dict[str, list[float]] = {}
        for score, fact in zip(found, facts):
            kinds.setdefault(fact["kind"], []).append(score)
        return {name: sum(found) / len(found),
                f"{name}_by": {kind: sum(row) / len(row) for kind, row in sorted(kinds.items())}}
    right = scores(record["answer"] for record in records)
    for record, score in zip(records, right):
        record["right"] = score
    numbers = by_kind(right)
    if training is not None:
        prior = commonest_answers(training)
        numbers["chance"] = by_kind(scores(prior.get(kind_of(f), prior[""]) for f in facts))
    if blank:
        grey = answer_questions(model, tokenizer, dataset, device, answers, max_tokens, top_k, True)
        numbers |= by_kind(scores(record["answer"] for record in grey), "blank_accuracy")
    long = sum(2 + len(tokenizer.pieces_of(clean_question(fact["question"]))) > max_tokens
               for fact in facts)
    numbers |= {"questions": len(records), "cut": long}
    if long:
        distributed.print0(f"{long} questions were cut to {max_tokens} tokens")
    return numbers, answer_sections(dataset, records, facts), records


def answer_sections(dataset: Dataset, records: list[dict], facts: list[dict]) -> Sections:
    """The first questions with their answers, in green or red where people's are known, and what
    most of them say."""
    cells = []
    for record, fact in list(zip(records, facts))[:24]:
        colour = {None: BLACK, True: GREEN, False: RED}[
            record["right"] > 0.5 if "right" in record else None]
        known = [(text, GREY) for text, _ in Counter(fact["answers"]).most_common(1)]
        cells.append(Cell(dataset[record["index"]]["image"],
                          [(fact["question"], BLACK), (record["answer"], colour), *known]))
    return [("questions, answers (green: right), what most people say",
             [cells[i:i + 8] for i in range(0, len(cells), 8)])]


# ---- statements about two images -----------------------------------------------------------------

@torch.no_grad()
def judge_statements(model: NLVR2, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                     max_tokens: int = 40, blank: bool = False) -> list[dict]:
    """-> {identifier, sentence, label, told, index} of each statement."""
    model.eval()
    found = []
    for batch, image, ids, mask in batches(dataset, StatementCollate(tokenizer, max_tokens),
                                           "statements", device, blank):
        told = model.logits(image, ids, mask).argmax(1).tolist()
        found += [{"identifier": name, "sentence": text, "label": bool(label), "told": bool(t),
                   "index": i} for name, text, label, t, i in zip(
                       batch["identifier"], batch["sentences"], batch["label"].tolist(), told,
                       batch["index"])]
    return sorted(distributed.gather(found), key=lambda record: record["index"])


def evaluate_nlvr2(model: NLVR2, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                   max_tokens: int = 40, blank: bool = True) -> tuple[dict, Sections, list[dict]]:
    """-> numbers (accuracy; consistency: sentences of which all pairs are judged right; "chance":
    the commoner label; blank_accuracy: on grey images), a sheet's sections, the records."""
    records = judge_statements(model, tokenizer, dataset, device, max_tokens)
    right = [record["told"] == record["label"] for record in records]
    # NLVR2's identifiers are split-set-pair-sentence: one sentence with several pairs
    parts = [record["identifier"].split("-") for record in records]
    groups = ["-".join(p[:2] + p[3:]) if len(p) == 4 else record["sentence"]
              for p, record in zip(parts, records)]
    accuracy, share = sum(right) / len(right), sum(r["label"] for r in records) / len(records)
    numbers = {"accuracy": accuracy, "consistency": consistency(right, groups),
               "chance": {"accuracy": max(share, 1 - share)}, "statements": len(records)}
    if blank:
        grey = judge_statements(model, tokenizer, dataset, device, max_tokens, True)
        numbers["blank_accuracy"] = sum(r["told"] == r["label"] for r in grey) / len(grey)
    rows = []
    for record, ok in list(zip(records, right))[:12]:
        left, right_image = dataset[record["index"]]["image"]
        told = f"{record['sentence']}: {'true' if record['told'] else 'false'}"
        rows.append([Cell(None, [(told, GREEN if ok else RED)]), Cell(left, []),
                     Cell(right_image, [])])
    return numbers, [("statements about two images (green: judged right)", rows)], records


# ---- visual dialog -------------------------------------------------------------------------------

@torch.no_grad()
def rank_candidates(model: VisDial, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                    max_tokens: int = 160, blank: bool = False) -> list[dict]:
    """-> {dialog, round, scores, target, relevance, index} of each round. Image and caption are
    projected once for a dialog; all candidates of a round look at them in one pass."""
    model.eval()
    found = []
    collate = DialogCollate(tokenizer, max_tokens)
    for index in distributed.progress(distributed.share(list(range(len(dataset)))), "dialogs",
                                      unit="dialog"):
        item = dataset[index]
        if item["image"] is None:
            continue
        image = torch.full_like(item["image"], GREY_LEVEL) if blank else item["image"]
        kv = model.read(normalise(image[None].to(device)),
                        *(x.to(device) for x in collate.captions([item])))
        for turn, asked in enumerate(item["rounds"]):
            ids, mask = pad(dialog_ids(tokenizer, item["rounds"], turn, asked.candidates,
                                       max_tokens), tokenizer.pad)
            logits = model.logits(kv, ids.to(device), mask.to(device)).float()
            dense = item.get("relevance")
            found.append({"dialog": item["dialog"], "round": turn, "index": index,
                          "scores": (logits[:, 1] - logits[:, 0]).tolist(), "target": asked.target,
                          "relevance": dense[1] if dense and dense[0] == turn else None})
    return sorted(distributed.gather(found), key=lambda record: (record["index"], record["round"]))


def evaluate_visdial(model: VisDial, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                     max_tokens: int = 160,
                     blank: bool = True) -> tuple[dict, Sections, list[dict]]:
    """-> numbers (mrr, r1, r5, r10, mean_rank; ndcg where there is dense relevance; "chance": a
    random order; blank_...: on grey images), a sheet's sections, the records."""
    records = rank_candidates(model, tokenizer, dataset, device, max_tokens)
    def places(rows):  # a tie counts against the answer
        return [sum(score >= row["scores"][row["target"]] for score in row["scores"]) - 1
                for row in rows]
    numbers = dialog_scores(places(records))
    dense = [ndcg(r["scores"], r["relevance"]) for r in records if r["relevance"]]
    numbers |= {"ndcg": sum(dense) / len(dense)} if dense else {}
    n = len(records[0]["scores"])
    numbers["chance"] = {"mrr": sum(1 / k for k in range(1, n + 1)) / n, "mean_rank": (n + 1) / 2,
                         **{f"r{k}": min(1.0, k / n) for k in (1, 5, 10)}}
    if blank:
        grey = rank_candidates(model, tokenizer, dataset, device, max_tokens, True)
        numbers |= {f"blank_{name}": value for name, value in dialog_scores(places(grey)).items()}
    numbers["rounds"] = len(records)
    cells = []
    for index in dict.fromkeys(record["index"] for record in records[:50]):
        item, lines = dataset[index], []
        for row in (r for r in records if r["index"] == index):
            asked = item["rounds"][row["round"]]
            best = max(range(n), key=row["scores"].__getitem__)
            lines += [(asked.question, BLACK),
                      (asked.candidates[best], GREEN if best == asked.target else RED)]
        cells.append(Cell(item["image"], [(item["caption"], GREY), *lines]))
    rows = [cells[i:i + 6] for i in range(0, len(cells), 6)]
    return numbers, [("dialogs: caption, questions, best candidates (green: right)", rows)], records


# ---- clips, without training on any --------------------------------------------------------------

def evaluate_clips(model: BLIP, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                   top_k: int = 128, max_tokens: int = 40) -> tuple[dict, Sections]:
    """Retrieval of clips -> as evaluate_retrieval; in the world also t2i_several_r1, of the clips
    of which no one frame shows all."""
    gallery = encode(model, tokenizer, dataset, device, max_tokens)
    numbers, scores = retrieval(model, gallery, min(top_k, len(gallery.index)), device)
    if hasattr(dataset, "needs_time"):
        several = torch.tensor([dataset.needs_time(i) for i in gallery.index])[gallery.image_of]
        for suffix, (t2i, _) in scores.items():
            first = ranks(t2i, gallery.positives()) == 0
            numbers[f"t2i_several_r1{suffix}"] = first[several].float().mean().item()
    chance = retrieval_chance(gallery)
    numbers |= {"chance": chance | {"t2i_several_r1": chance["t2i_r1"]},
                "clips": len(gallery.index), "broken": len(gallery.broken)}
    t2i = scores["_rerank" if top_k else ""][0]
    rows = []
    for t in range(0, len(t2i), max(1, len(t2i) // 8)):
        best = t2i[t].topk(min(5, t2i.shape[1])).indices.tolist()
        rows.append([Cell(None, [(gallery.texts[t], BLACK)])] + [
            Cell(gallery.images([i])[0], [], GREEN if gallery.image_of[t] == i else RED)
            for i in best])
    return numbers, [("clips found for a text (their middle frames; green: right)", rows)]


def run_clips(o: argparse.Namespace, device: torch.device) -> None:
    """video-retrieval, video-qa: print, and write into --out."""
    asks = o.command == "video-qa"
    model, tokenizer, trained = checkpoints.open_model(
        o.checkpoint, () if asks else ("itc", "itm"), o.vocab, device, (VQA if asks else BLIP,))
    size = model.config.image_size
    if o.data:
        read, kind = ((read_clip_questions, ClipQuestionDataset) if asks
                      else (read_clips, ClipDataset))
        data = kind(read(o.data)[:o.size or None], o.image_root or Path(o.data).parent, size,
                    o.frames)
    else:
        data = (ClipQuestions if asks else Clips)("held-out", o.size or 500, size,
                                                  frames=o.frames)
    shared = (model, tokenizer, data, device)
    if asks:
        train = None if o.data else open_task("vqa", "", "", size, 5000, "train")
        numbers, sections, records = evaluate_vqa(*shared, answers_of(o), train,
                                                  trained.get("max_tokens", 35), o.top_k,
                                                  blank=not o.data)
        if not o.data:
            several = [r["right"] for r in records if data.needs_time(r["index"])]
            numbers["accuracy_several"] = sum(several) / len(several)
    else:
        numbers, sections = evaluate_clips(*shared, o.top_k)
    show(o, numbers, sections, trained)


# ---- command line --------------------------------------------------------------------------------

# command -> task of its checkpoint
TASK_OF = {"vqa": "vqa", "ask": "vqa", "nlvr2": "nlvr2", "visdial": "visdial",
           "video-retrieval": "", "video-qa": ""}


def add_commands(command: Callable) -> None:
    """Add the tasks' commands to eval.py's; command(name, about, data=...) -> a parser."""
    p = command("vqa", "VQA accuracy; answers.json is what the evaluation server reads", data=True)
    p.add_argument("--generate", action="store_true", help="answer freely; default: rank the "
                   "answers of the checkpoint, or of --answers")
    p.add_argument("--answers", default="", help="json list of the answers that are ranked")
    p.add_argument("--top-k", type=int, default=128, help="answers whose likelihood is computed, "
                   "by their first token (default 128)")
    command("nlvr2", "accuracy and consistency of judging statements", data=True)
    command("visdial", "MRR, recall and mean rank of 100 candidate answers", data=True)
    for name, about, frames in (
            ("video-retrieval", "clips found by text, with a model of images", 8),
            ("video-qa", "questions about clips, with a VQA model of images", 16)):
        p = command(name, about, data=True)
        p.add_argument("--frames", type=int, default=frames, help="drawn uniformly from a clip "
                       f"(default {frames}; 1: the middle one)")
        p.add_argument("--top-k", type=int, default=128, help="clips that ITM re-ranks, or answers "
                       "whose likelihood is computed (default 128)")
    p.add_argument("--generate", action="store_true", help="answer freely")
    p.add_argument("--answers", default="", help="json list of the answers that are ranked")
    p = command("ask", "an answer to a question about a picture")
    p.add_argument("picture")
    p.add_argument("question")
    p.add_argument("--generate", action="store_true", help="answer freely, rank nothing")


def run(o: argparse.Namespace, device: torch.device) -> None:
    """Do what the command line asks: print, and write into --out."""
    task = TASK_OF[o.command]
    if o.command.startswith("video"):
        return run_clips(o, device)
    model, tokenizer, trained = checkpoints.open_model(o.checkpoint, (), o.vocab, device,
                                                       (MODELS[task],))
    size, max_tokens = model.config.image_size, trained.get("max_tokens", 35)
    known = answers_of(o) if task == "vqa" else []
    if o.command == "ask":
        image = normalise(demo.open_picture(o.picture, size)[None].to(device))
        print(demo.ask(model, tokenizer, image, o.question, known, max_tokens))
        return
    data = open_task(task, o.data, o.image_root, size, o.size or (0 if o.data else 1000),
                     need_answers=False)
    shared = (model, tokenizer, data, device)
    if task == "vqa":
        train = None if o.data else open_task(task, "", "", size, 5000, "train")
        numbers, sections, records = evaluate_vqa(*shared, known, train, max_tokens, o.top_k,
                                                  blank=not o.data)
        results = [{"question_id": r["question_id"], "answer": r["answer"]} for r in records]
    elif task == "visdial":
        numbers, sections, records = evaluate_visdial(*shared, max_tokens, blank=not o.data)
        results = [{"image_id": r["dialog"], "round_id": r["round"] + 1, "ranks": ranks_of(
            r["scores"])} for r in records]
    else:
        numbers, sections, records = evaluate_nlvr2(*shared, max_tokens, blank=not o.data)
        results = [{"identifier": r["identifier"], "answer": str(r["told"])} for r in records]
    show(o, numbers, sections, trained, results)


def show(o: argparse.Namespace, numbers: dict, sections: Sections, trained: dict,
         results: list[dict] | None = None) -> None:
    """Print the numbers, write them, the sheet and the results into --out; on rank 0."""
    if distributed.rank() == 0:
        out = Path(o.out)
        out.mkdir(parents=True, exist_ok=True)
        print_numbers(numbers)
        write_numbers(out / "metrics.json", numbers, vars(o) | {"trained": trained})
        draw_sheet(out / "sheet.png", sections)
        if results is not None:
            (out / "answers.json").write_text(json.dumps(results) + "\n")
        print(f"wrote {out}/" + ", ".join(sorted(p.name for p in out.iterdir())))


def ranks_of(scores: list[float]) -> list[int]:
    """Scores -> the rank of each, 1 = highest, as VisDial's server reads them."""
    found = [0] * len(scores)
    for rank, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), 1):
        found[i] = rank
    return found


def answers_of(o: argparse.Namespace) -> list[str]:
    """The answers to rank: --answers, else those of the checkpoint; none with --generate."""
    if o.generate:
        return []
    if getattr(o, "answers", ""):
        known = read_json(o.answers)
        if not isinstance(known, list) or not known or not all(
                isinstance(answer, str) and answer for answer in known):
            raise InputError(f"{o.answers} must be a json list of answers")
        return known
    known = checkpoints.read(o.checkpoint).get("answers", [])
    if not known:
        distributed.print0("the checkpoint has no list of answers: generating")
    return known
