"""The picture world: what it says is true, what it swaps is false, splits share nothing,
everything repeats."""

import random

import numpy as np
import pytest
from PIL import Image

from world.datasets import World
from world.language import describe, is_complete, is_true, read_facts, web_text
from world.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    random_scene,
    render,
    scene_hash,
    split_of,
    swap,
)

RED_AND_BLUE = Scene("pink", (Thing("bottom right", "blue", "star", "large"),
                              Thing("top left", "red", "circle", "small")))


def test_it_is_rich_enough():
    assert (len(COLOURS) >= 8 and len(SHAPES) >= 8 and len(SIZES) == 2 and len(BACKGROUNDS) >= 6
            and len(PLACES) == 4)
    assert not set(COLOURS) & set(BACKGROUNDS)


def test_its_captions_are_true_complete_and_varied():
    rng, captions = random.Random(0), set()
    for _ in range(2000):
        scene = random_scene(rng)
        text = describe(scene, rng)
        assert is_true(text, scene) and is_complete(text, scene), text
    for _ in range(200):
        captions.add(describe(RED_AND_BLUE, rng))
    assert len(captions) > 100


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_swap_changes_one_attribute_and_is_false(attribute):
    rng = random.Random(1)
    for number in range(500):
        scene = random_scene(rng)
        false = swap(scene, attribute, rng)
        text, swapped = (describe(scene, random.Random(number)),
                         describe(false, random.Random(number)))
        assert (not is_true(swapped, scene) and is_true(swapped, false)
                and is_complete(swapped, scene))
        backgrounds, things = read_facts(text)
        other_backgrounds, other_things = read_facts(swapped)
        changed = [a != b for a, b in zip(backgrounds, other_backgrounds)]
        for a, b in zip(things, other_things):
            different = {key for key in a if a[key] != b[key]}
            assert different <= ({"row", "column"} if attribute == "place" else {attribute})
            changed.append(bool(different))
        assert sum(changed) == 1
        assert sum(a != b for a, b in zip(text.split(), swapped.split())) <= (
            2 if attribute == "place" else 1)


@pytest.mark.parametrize("text, true", [
    ("at the top left a small red circle and at the bottom right a large blue star on a pink "
     "background", True),
    # synonyms, other order
    ("lower right big blue star and upper left little red disc on pink", True),
    # vague, and every stated fact holds
    ("a red circle", True), ("a star and a circle", True), ("on pink", True),
    ("a blue circle", False), ("top right a red circle", False), ("a large circle", False),
    # mixed up: colour of one, shape of the other
    ("a red circle on white", False), ("a red star", False),
    ("a circle and a circle", False),  # two are stated, one is there
    ("a circle and a star and a square", False),
    ("on pink and on white", False), ("a red blue circle", False), ("red on pink", False),
    ("a yellow circle", False), ("a red circle and a hexagon", False), ("", False),
    ("the of and", False), ("stunning view july 2009", False),
])
def test_is_true_judges_every_stated_fact(text, true):
    assert is_true(text, RED_AND_BLUE) is true


def test_vague_captions_are_not_complete():
    assert not is_complete("a red circle on pink", RED_AND_BLUE)
    assert not is_complete("top left small red circle and bottom right blue star on pink",
                           RED_AND_BLUE)


@pytest.mark.parametrize("split", ["val", "held-out"])
def test_splits_share_no_scene(split):
    train, other = World("train", 3000, seed=5), World(split, 300, seed=9)
    assert all(split_of(train.scene(i)) == "train" for i in range(3000))
    assert all(split_of(scene) == split for scene in other.scenes)
    assert len(set(other.scenes)) == 300


def test_images_of_one_scene_share_an_id_and_references_are_true():
    world = World("train", 2000)
    by_scene = {}
    for i in range(2000):
        by_scene.setdefault(world.scene(i), []).append(i)
    twice = next(indices for indices in by_scene.values() if len(indices) > 1)
    assert world[twice[0]]["example"].image_id == world[twice[1]]["example"].image_id
    assert len({scene_hash(scene) for scene in by_scene}) == len(by_scene)
    noisy = World("train", 20, noise=1.0)
    assert all(is_true(text, noisy.scene(i)) and is_complete(text, noisy.scene(i))
               for i in range(20) for text in noisy.references(i))


def test_everything_is_a_function_of_the_seed():
    a, b, other = World("train", 50, seed=3), World("train", 50, seed=3), World("train", 50, seed=4)
    for i in (0, 17, 49):
        assert a[i]["example"] == b[i]["example"] and a[i]["image"].equal(b[i]["image"])
    assert [a.scene(i) for i in range(50)] != [other.scene(i) for i in range(50)]
    first = [a[i]["example"].captions for i in range(50)]
    a.set_epoch(1)
    assert [a[i]["example"].captions for i in range(50)] != first
    assert a[3]["image"].equal(b[3]["image"])


def test_pictures_show_the_scene():
    image = render(RED_AND_BLUE, 64)
    assert image.shape == (3, 64, 64) and image.dtype == np.uint8
    assert tuple(image[:, 0, 63]) == BACKGROUNDS["pink"]
    assert tuple(image[:, 16, 16]) == COLOURS["red"]
    assert tuple(image[:, 48, 48]) == COLOURS["blue"]
    large = render(RED_AND_BLUE, 224)
    shrunk = Image.fromarray(large.transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(np.asarray(shrunk, int).transpose(2, 0, 1) - image).mean() < 3


def test_every_two_values_of_an_attribute_look_different():
    def thing(**changes):
        return render(Scene("white", (Thing(**{
            **dict(place="top left", colour="red", shape="circle", size="small"), **changes}),)),
                      64).astype(int)
    for name, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES),
                         ("place", PLACES)):
        pictures = [thing(**{name: value}) for value in values]
        for i, a in enumerate(pictures):
            for b in pictures[:i]:
                # at least 20 of 4096 pixels differ clearly
                assert (np.abs(a - b).sum(0) > 60).sum() >= 20, name


def test_web_noise_comes_at_the_chosen_rate():
    rng, kinds = random.Random(0), []
    for _ in range(4000):
        scene = random_scene(rng)
        text, kind = web_text(scene, 0.5, rng)
        assert is_true(text, scene) == (kind == "true")
        kinds.append(kind)
    share = {kind: kinds.count(kind) / 4000 for kind in ("true", "other", "wrong", "junk")}
    assert (share["true"] == pytest.approx(0.5, abs=0.03)
            and share["other"] == pytest.approx(0.2, abs=0.03))
    assert (share["wrong"] == pytest.approx(0.15, abs=0.03)
            and share["junk"] == pytest.approx(0.15, abs=0.03))
    assert web_text(RED_AND_BLUE, 0.0, rng)[1] == "true"
