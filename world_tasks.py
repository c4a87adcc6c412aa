"""What can be asked of the picture world: questions about a scene (VQA), statements about two
images (NLVR2), dialogs about a scene (visual dialog), clips of a few frames (video).

    ask(scene, rng)              -> Question: text, ten people's answers, kind
    draw_statement, draw_pair    a statement, and pairs of scenes of which it is true or false
    converse(scene, rng)         -> a caption and rounds of question, answer, candidates
    film(scene, rng)             -> the scene that each frame of a clip shows
    Questions, Statements, Dialogs, Clips, ClipQuestions    data sets of one split, items as
                                 task_data.py's
    all_texts()                  all kinds of things that are said in the world, for a vocabulary
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from world import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    Thing,
    World,
    all_captions,
    random_scene,
    render,
    split_of,
)

KINDS = ("colour", "shape", "size", "count", "background", "yes/no", "where")
NUMBERS = ("none", "one", "two", "three", "four")
PEOPLE = 10  # answer each question, as in VQA


@dataclass(frozen=True)
class Question:
    """A question about an image, what each of several people answered, and what it asks for."""

    text: str
    answers: tuple[str, ...]
    kind: str


# ---- questions about one image -------------------------------------------------------------------

def holds(thing: Thing, facts: dict[str, str]) -> bool:
    """Whether the thing has all these attributes."""
    return facts.items() <= thing.facts().items()


def in_words(facts: dict[str, str], rng: random.Random) -> str:
    """{"colour": "red", "shape": "circle"} -> "red disc"; without a shape "red thing"; a place
    comes behind."""
    words = [rng.choice(SIZES[facts["size"]]) if "size" in facts else "", facts.get("colour", ""),
             rng.choice(SHAPES[facts["shape"]]) if "shape" in facts else "thing"]
    if "row" in facts:
        words += ["at the", rng.choice(ROWS[facts["row"]]), rng.choice(COLUMNS[facts["column"]])]
    return " ".join(filter(None, words))


def reference(scene: Scene, thing: Thing, about: tuple[str, ...],
              rng: random.Random) -> str | None:
    """Words for this thing and no other of the scene, without the attributes `about`; None if there
    are none."""
    facts = thing.facts()
    ways = [("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("row", "column")]
    ways = [way for way in ways if not set(way) & set(about)]
    rng.shuffle(ways)
    for way in ways:
        told = {name: facts[name] for name in way}
        if sum(holds(other, told) for other in scene.things) == 1:
            return in_words(told, rng)
    return None


def ask(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """A question of a random kind (of KINDS) about the scene, and PEOPLE answers: who answers uses
    synonyms as they come ("top left", "upper left")."""
    while True:
        chosen = kind or rng.choice(KINDS)
        thing = rng.choice(scene.things)
        facts = thing.facts()
        about = {"where": ("row", "column")}.get(chosen, (chosen,))
        name = reference(scene, thing, about, rng)
        def people(*synonyms):
            return tuple(rng.choice(synonyms) for _ in range(PEOPLE))
        if chosen == "count":
            told = rng.choice(({}, {"colour": facts["colour"]}, {"size": rng.choice(list(SIZES))}))
            what = in_words(told, rng) if told else "thing"
            number = sum(holds(other, told) for other in scene.things)
            return Question(f"how many {what}s are there?", people(NUMBERS[number]), chosen)
        if chosen == "background":
            text = rng.choice(("what colour is the background?", "which background is it?"))
            return Question(text, people(scene.background), chosen)
        if chosen == "yes/no":
            return yes_or_no(scene, thing, rng)
        if name is None:  # the things differ in nothing but what is asked for
            if kind:
                return ask(scene, rng)
            continue
        if chosen == "where":
            return Question(f"where is the {name}?", people(*(
                f"{row} {column}" for row in ROWS[facts["row"]]
                for column in COLUMNS[facts["column"]])), chosen)
        said = {"colour": ("what colour is the {}?",), "size": ("how large is the {}?",),
                "shape": ("what is the {}?", "what shape is the {}?")}[chosen]
        synonyms = {"colour": {c: (c,) for c in COLOURS}, "shape": SHAPES, "size": SIZES}[chosen]
        return Question(rng.choice(said).format(name), people(*synonyms[facts[chosen]]), chosen)


def yes_or_no(scene: Scene, thing: Thing, rng: random.Random) -> Question:
    """Half of the answers are yes; a no is wrong in one attribute."""
    facts = thing.facts()
    told = {name: facts[name] for name in rng.choice((("colour", "shape"), ("size", "shape"),
                                                      ("colour", "row", "column")))}
    if rng.random() < 0.5:
        name = rng.choice([name for name in told if name not in ("row", "column")])
        values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[name]
        told[name] = rng.choice([value for value in values if value != told[name]])
    answer = "yes" if any(holds(other, told) for other in scene.things) else "no"
    return Question(f"is there a {in_words(told, rng)}?", (answer,) * PEOPLE, "yes/no")


class OfWorld(Dataset):
    """Something that is asked about each of `size` scenes of one split, a function of (seed, split,
    index), and in training of the epoch."""

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0):
        self.world = World(split, size, image_size, seed)

    def __len__(self) -> int:
        return len(self.world)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch: something new is asked about the same training scenes."""
        self.world.set_epoch(epoch)


class Questions(OfWorld):
    """Items as those of task_data.QuestionDataset: {image, question, answers, question_id, kind,
    index}."""

    def question(self, index: int) -> Question:
        """What is asked about item `index` in this epoch; the kinds take turns."""
        rng = self.world.rng(index, f"question {self.world.epoch}")
        return ask(self.world.scene(index), rng, KINDS[index % len(KINDS)])

    def __getitem__(self, index: int) -> dict:
        asked = self.question(index)
        return {"image": self.world[index]["image"], "question": asked.text,
                "answers": asked.answers, "question_id": index, "kind": asked.kind, "index": index,
                "weight": 1.0, "broken": []}


# ---- statements about two images -----------------------------------------------------------------

def draw_statement(rng: random.Random) -> tuple[str, Callable[[Scene, Scene], bool]]:
    """-> a statement about a left and a right image, and whether it is true of two scenes."""
    shape, colour = rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
    ground, number = rng.choice(list(BACKGROUNDS)), rng.choice((2, 3, 4))
    said = rng.choice(SHAPES[shape])
    def has(scene, **facts):
        return any(holds(thing, facts) for thing in scene.things)
    return rng.choice((
        (f"the left image shows a {said}", lambda a, b: has(a, shape=shape)),
        (f"the right image shows a {said}", lambda a, b: has(b, shape=shape)),
        (f"the left image shows a {colour} thing", lambda a, b: has(a, colour=colour)),
        (f"the right image shows a {colour} thing", lambda a, b: has(b, colour=colour)),
        (f"both images show a {said}", lambda a, b: has(a, shape=shape) and has(b, shape=shape)),
        (f"both images show a {colour} thing",
         lambda a, b: has(a, colour=colour) and has(b, colour=colour)),
        (f"one of the images is {ground}, and only one",
         lambda a, b: (a.background == ground) != (b.background == ground)),
        (f"there is a {colour} thing in one of the images",
         lambda a, b: has(a, colour=colour) or has(b, colour=colour)),
        ("the images have the same background", lambda a, b: a.background == b.background),
        ("the left image shows more things than the right",
         lambda a, b: len(a.things) > len(b.things)),
        (f"there are {NUMBERS[number]} things in all",
         lambda a, b: len(a.things) + len(b.things) == number)))


def draw_pair(true: Callable[[Scene, Scene], bool], label: bool, split: str,
              rng: random.Random) -> tuple[Scene, Scene]:
    """Two scenes of a split of which the statement is true, or false. Near misses are common: half
    of the time the right image has the background, or a thing's looks, of the left one."""
    while True:
        left, right = random_scene(rng, split), random_scene(rng, split)
        if rng.random() < 0.25:
            right = replace(right, background=left.background)
        elif rng.random() < 0.33:
            first, *rest = right.things
            looks = rng.choice(left.things)
            right = replace(right, things=(replace(looks, place=first.place), *rest))
        if true(left, right) == label and split_of(right) == split:
            return left, right


class Statements(Dataset):
    """`size` statements, each with two images, of one split. Four items in a row have one statement
    with different images, two of them true, for consistency. Items as those of
    task_data.StatementDataset: {image (2, 3, S, S), sentence, label, identifier, index}."""

    GROUP = 4

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0):
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def statement(self, index: int) -> tuple[str, bool, tuple[Scene, Scene]]:
        """-> the sentence of item `index`, its label, its two scenes."""
        group = f"statement {self.seed} {self.split} {self.epoch} {index // self.GROUP}"
        sentence, true = draw_statement(random.Random(group))
        label = index % self.GROUP < self.GROUP // 2
        pair = draw_pair(true, label, self.split, random.Random(f"{group} {index}"))
        return sentence, label, pair

    def __getitem__(self, index: int) -> dict:
        sentence, label, scenes = self.statement(index)
        rng = random.Random(f"image {self.seed} {self.split} {index}")
        images = [torch.from_numpy(render(scene, self.image_size, rng)) for scene in scenes]
        return {"image": torch.stack(images), "sentence": sentence, "label": label,
                "identifier": f"world-{index // self.GROUP}-{index % self.GROUP}-0", "index": index,
                "broken": []}


# ---- dialogs -------------------------------------------------------------------------------------

ROUNDS, CANDIDATES, PLAUSIBLE = 3, 100, 80
SAME = [set(words) for words in (*SHAPES.values(), *SIZES.values())] + [
    {f"{row} {column}" for row in rows for column in columns}
    for rows in ROWS.values() for columns in COLUMNS.values()]  # answers that mean the same
VALUES = {"colour": COLOURS, "background": BACKGROUNDS, "count": NUMBERS, "yes/no": ("yes", "no"),
          "shape": [word for words in SHAPES.values() for word in words],
          "size": [word for words in SIZES.values() for word in words],
          "where": [f"{row} {column}" for rows in ROWS.values() for row in rows
                    for columns in COLUMNS.values() for column in columns]}
HEDGES = ("probably", "maybe", "surely", "clearly", "perhaps", "certainly", "definitely", "likely",
          "possibly", "obviously", "apparently")
# How an answer is said. Many ways, so that half of 100 candidates can answer the same question.
FORMS = ("{}", *(f"{word} {{}}" for word in HEDGES), *(f"{{}} {word}" for word in HEDGES))
FOLLOW_UPS = {"colour": "what colour is it?", "size": "how large is it?", "shape": "what is it?",
              "where": "where is it?"}


@dataclass(frozen=True)
class Round:
    """A question of a dialog, its answer, and the candidates among which `target` is that
    answer."""

    question: str
    answer: str
    candidates: tuple[str, ...]
    target: int


def candidates_of(answer: str, kind: str, rng: random.Random) -> tuple[str, tuple[str, ...], int]:
    """-> the answer as somebody says it ("surely red"), CANDIDATES that are said, and which of them
    is the answer. The others are wrong: none means the same; up to PLAUSIBLE of them answer the
    same kind of question."""
    meant = next((words for words in SAME if answer in words), {answer})
    plausible, other = [], []
    for name, values in VALUES.items():
        said = [form.format(value) for value in values if value not in meant for form in FORMS]
        (plausible if name == kind else other).extend(said)
    plausible = rng.sample(plausible, min(PLAUSIBLE, len(plausible)))
    right = rng.choice(FORMS).format(answer)
    chosen = [right, *plausible, *rng.sample(other, CANDIDATES - 1 - len(plausible))]
    rng.shuffle(chosen)
    return right, tuple(chosen), chosen.index(right)


def converse(scene: Scene, rng: random.Random) -> tuple[str, list[Round]]:
    """-> a caption that tells a part of the scene, and ROUNDS of a dialog. A question may ask about
    "it": the thing that the question before was about, so that the history is needed."""
    told = rng.choice(scene.things)
    caption = f"a {in_words({'colour': told.colour}, rng)} on {scene.background}"
    rounds, topic = [], None
    for _ in range(ROUNDS):
        if topic is not None and rng.random() < 0.5:
            kind = rng.choice([kind for kind in FOLLOW_UPS if kind != topic[1]])
            asked = Question(FOLLOW_UPS[kind], (answer_about(topic[0], kind, rng),), kind)
            thing = topic[0]
        else:
            kind = rng.choice(KINDS)
            asked = ask(scene, rng, kind)
            thing = thing_asked(scene, asked.text)
            kind = asked.kind
        topic = (thing, kind) if thing else None
        rounds.append(Round(asked.text, *candidates_of(asked.answers[0], asked.kind, rng)))
    return caption, rounds


def answer_about(thing: Thing, kind: str, rng: random.Random) -> str:
    """What is asked of one thing."""
    if kind == "where":
        row, column = thing.place.split()
        return f"{rng.choice(ROWS[row])} {rng.choice(COLUMNS[column])}"
    value = thing.facts()[kind]
    return rng.choice({"colour": {value: (value,)}, "shape": SHAPES, "size": SIZES}[kind][value])


def thing_asked(scene: Scene, question: str) -> Thing | None:
    """The thing that a question of `ask` is about ("the small circle"), if it is about one."""
    facts = dict(WORDS[word] for word in question.rstrip("?").split() if word in WORDS)
    found = [thing for thing in scene.things if holds(thing, facts)]
    return found[0] if facts and len(found) == 1 else None


class Dialogs(OfWorld):
    """Items as those of task_data.DialogDataset: {image, caption, rounds, dialog, seed, index}."""

    def __getitem__(self, index: int) -> dict:
        world, purpose = self.world, f"dialog {self.world.epoch}"
        caption, rounds = converse(world.scene(index), world.rng(index, purpose))
        return {"image": world[index]["image"], "caption": caption, "rounds": rounds,
                "dialog": index, "seed": f"{purpose} {world.seed} {index}", "index": index,
                "broken": []}


# ---- clips ---------------------------------------------------------------------------------------

FRAMES = 8  # of a clip


def film(scene: Scene) -> list[Scene]:
    """What each of FRAMES shows. With two things, the first half shows one and the second half the
    other: no frame alone tells all of it."""
    if len(scene.things) == 1:
        return [scene] * FRAMES
    first, second = (replace(scene, things=(thing,)) for thing in scene.things)
    return [first] * (FRAMES // 2) + [second] * (FRAMES - FRAMES // 2)


class Clips(OfWorld):
    """`size` clips of one split with captions. Items are those of data.PairDataset, but for image
    (F, 3, S, S): `frames` of them, uniformly drawn (1: the middle one)."""

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0,
                 frames: int = FRAMES):
        super().__init__(split, size, image_size, seed)
        self.frames = frames

    def needs_time(self, index: int) -> bool:
        """Whether one frame does not tell all."""
        return len(self.world.scene(index).things) > 1

    def clip(self, index: int) -> torch.Tensor:
        """-> (frames, 3, S, S) uint8."""
        shown, rng = film(self.world.scene(index)), self.world.rng(index, "clip")
        chosen = [int((i + 0.5) * FRAMES / self.frames) for i in range(self.frames)]
        return torch.stack([torch.from_numpy(render(shown[i], self.world.image_size, rng))
                            for i in chosen])

    def __getitem__(self, index: int) -> dict:
        text = self.world.text(index)
        return {"image": self.clip(index), "text": text, "texts": (text,), "image_id": index,
                "index": index, "broken": []}


class ClipQuestions(Clips):
    """Questions about clips, which one frame may not answer; items as those of Questions."""

    def question(self, index: int) -> Question:
        """What is asked about clip `index`."""
        rng = self.world.rng(index, "clip question")
        return ask(self.world.scene(index), rng, KINDS[index % len(KINDS)])

    def __getitem__(self, index: int) -> dict:
        asked = self.question(index)
        return {"image": self.clip(index), "question": asked.text, "answers": asked.answers,
                "question_id": index, "kind": asked.kind, "index": index, "weight": 1.0,
                "broken": []}


# ---- words ---------------------------------------------------------------------------------------

def all_texts(count: int = 2000) -> list[str]:
    """What a vocabulary is trained on that is to serve the tasks as well: captions, questions,
    answers as they are said, statements."""
    rng = random.Random("words of the tasks")
    asked = [ask(random_scene(rng), rng) for _ in range(count)]
    return [*all_captions(count), *(question.text for question in asked), *FOLLOW_UPS.values(),
            *(f"{rng.choice(('', *HEDGES))} {question.answers[0]}" for question in asked),
            *(draw_statement(rng)[0] for _ in range(count))]
