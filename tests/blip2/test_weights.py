"""Weights under foreign names: what fits is taken, what does not is said."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from blip2 import weights
from blip2.config import Blip2Config
from blip2.language import LanguageConfig, make_language
from blip2.stage1 import Stage1
from blip2.stage2 import Stage2, Stage2Config
from blip2.texts import encode_texts
from config import SettingError
from data.files import InputError
from weights.files import fill

OPT = LanguageConfig(width=16, depth=1, heads=2, ffn=32, max_positions=40, vocab_size=30, eos_id=4)
T5 = LanguageConfig(kind="encoder-decoder", width=16, depth=1, heads=2, head_width=8, ffn=32,
                    vocab_size=30, pad_id=0, bos_id=0, eos_id=1)
SMALL = dict(vision="vit", image_size=28, patch_size=14, vit_width=16, vit_depth=1, vit_heads=2,
             vit_ffn=64, queries=3, width=16, depth=2, heads=2, ffn=32, max_positions=20,
             embed_dim=8, vocab_size=30, dec_id=29, init_std=0.2)


def out(model, names) -> dict[str, torch.Tensor]:
    """A model's weights under foreign names."""
    ours = model.state_dict()
    return {source: value.clone() for name, sources in names
            for source, value in zip(sources, ours[name].chunk(len(sources)))}


def new_language(config):
    torch.manual_seed(0)
    model = make_language(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("config", [OPT, replace(OPT, tied=False), T5])
def test_a_language_model_comes_in_whole_and_frozen(config):
    model = new_language(config)
    state = out(model, weights.language_names(config))
    loaded = weights.load_language(state, config)
    assert all(torch.equal(value, loaded.state_dict()[name])
               for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    with pytest.raises(InputError, match="lacks"):
        weights.load_language(state, replace(config, depth=2))
    with pytest.raises(InputError, match="has other weights"):
        weights.load_language(state | {"project_in.weight": torch.ones(2, 2)}, config)


def test_a_head_that_is_tied_in_one_of_the_two_is_refused():
    """Else the logits would be wrong, and nobody would know."""
    state = out(new_language(OPT), weights.language_names(OPT))
    words = state["model.decoder.embed_tokens.weight"]
    weights.load_language(state | {"lm_head.weight": words}, OPT)
    with pytest.raises(InputError, match="tied=False"):
        weights.load_language(state | {"lm_head.weight": words + 1}, OPT)
    state = out(new_language(T5), weights.language_names(T5))
    with pytest.raises(InputError, match="only T5 1.1"):
        weights.load_language(state | {"lm_head.weight": state["shared.weight"]}, T5)


def test_clips_image_encoder_comes_in_with_the_rest():
    """Under visual_encoder., in stage 1; positions resized alike at loading and on the way."""
    config = Blip2Config(**SMALL | dict(vision="clip"))
    model = Stage1(config)
    torch.nn.init.normal_(model.vit.pos_embed)
    torch.nn.init.zeros_(model.vit.patch_embed.bias)
    names = weights.vision_names(config, "vit.", "visual_encoder.")
    state = out(model, names + weights.qformer_names(config, text=True))
    for name in ("class_embedding", "positional_embedding"):
        state[f"visual_encoder.{name}"] = state[f"visual_encoder.{name}"][0]
    del state["visual_encoder.conv1.bias"]  # CLIP has none
    loaded, report = weights.load_stage1(state, config)
    assert not report.left_over and not any(name.startswith("vit.") for name in report.missing)
    images = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = loaded.vit(images)
        larger = weights.load_vision({name: value for name, value in state.items()
                                      if name.startswith("visual_encoder.")},
                                     replace(config, image_size=42))
        assert torch.allclose(larger(images), expected, atol=1e-6)
    assert not any(p.requires_grad for p in larger.parameters())
    with pytest.raises(InputError, match="not CLIP's"):
        weights.to_transformers(loaded)


def test_what_the_library_cannot_hold_does_not_go_out():
    for changes in (dict(near_heads=1), dict(tied=False)):
        language = vars(replace(OPT, **changes))
        model = Stage2(Stage2Config(**SMALL, language=language))
        with pytest.raises(InputError, match="no OPT"):
            weights.to_transformers(model)


@pytest.mark.parametrize("language", [OPT, T5])
def test_half_precision(language):
    """The frozen language model in bfloat16, then all of it: about the same loss."""
    torch.manual_seed(0)
    model = Stage2(Stage2Config(**SMALL, language=vars(language))).eval()
    inputs = [torch.randn(2, 3, 28, 28), *[torch.randint(5, 30, (2, 6)) for _ in range(3)]]
    inputs[2] = torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        expected = model(*inputs)[0]["lm"].item()
        model.language.bfloat16()
        assert model(*inputs)[0]["lm"].item() == pytest.approx(expected, rel=0.02)
        inputs[0] = inputs[0].bfloat16()
        assert model.bfloat16()(*inputs)[0]["lm"].item() == pytest.approx(expected, rel=0.05)


def test_misuse_is_said():
    model = Stage2(Stage2Config(**SMALL, language=vars(OPT))).eval()
    image, ids = torch.randn(1, 3, 28, 28), torch.tensor([[2, 5, 6]])
    with pytest.raises(ValueError, match="padded in front"):
        model.generate(image, ids, torch.tensor([[1, 1, 0]]))
    with pytest.raises(ValueError, match="question_to_queries"):
        model.soft_tokens(image, ids, torch.ones_like(ids))
    with pytest.raises(SettingError, match="dec_id"):
        Blip2Config(**SMALL | dict(dec_id=30))
    with pytest.raises(SettingError, match="--farthest 16"):
        replace(T5, farthest=16)
    names = [("word.weight", ["there"])]  # BLIP may have two words more than BERT, BLIP-2 none
    with pytest.raises(InputError, match="give weights of the model's size"):
        fill(nn.ModuleDict({"word": nn.Embedding(7, 3)}), {"there": torch.ones(5, 3)}, names, "x")
    Blip2Config(**SMALL | dict(vit_depth=0, vit_heads=12))  # no image encoder: heads do not matter


@torch.no_grad()
def test_queries_that_read_a_question():
    """Its words reach the soft tokens and the answer, its padding does not."""
    torch.manual_seed(0)
    model = Stage2(Stage2Config(**SMALL, language=vars(OPT), question_to_queries=True)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    image, prompt = torch.randn(1, 3, 28, 28), (torch.tensor([[2, 5]]), torch.ones(1, 2))
    asked = dict(one=[[2, 5, 6, 0]], padded=[[2, 5, 6, 9]], other=[[2, 5, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    soft = {name: model.soft_tokens(image, torch.tensor(ids), mask) for name, ids in asked.items()}
    score = {name: model.generate(image, *prompt, question_ids=torch.tensor(ids),
                                  question_mask=mask)[0][0][1] for name, ids in asked.items()}
    assert torch.allclose(soft["padded"], soft["one"], atol=1e-6)
    assert not torch.allclose(soft["other"], soft["one"], atol=1e-3)
    assert score["padded"] == pytest.approx(score["one"])
    assert score["other"] != pytest.approx(score["one"], abs=1e-4)
    with pytest.raises(InputError, match="does not read the question"):
        weights.to_transformers(model)


def test_one_prompt_serves_all_images():
    model = Stage2(Stage2Config(**SMALL, language=vars(OPT))).eval()
    images, ids = torch.randn(3, 3, 28, 28), torch.tensor([[2, 5, 6]])
    each = model.generate(images, ids.repeat(3, 1), torch.ones(3, 3))
    assert model.generate(images, ids, torch.ones(1, 3)) == each


def test_the_librarys_names():
    names = weights.to_transformers(Stage2(Stage2Config(**SMALL | dict(
        vision="eva", vit_heads=2), language=vars(OPT)))).keys()
    assert {"query_tokens", "language_projection.weight", "language_projection.bias",
            "qformer.encoder.layer.0.attention.attention.query.weight",
            "language_model.model.decoder.layers.0.fc1.weight"} <= names


class SpacedPieces:
    """A tokenizer in which a word's first piece holds the space in front of it, as OPT's does."""

    pad, bos, eos = 0, 1, 2

    def __init__(self):
        self.pieces = ["<pad>", "<s>", "\n"]

    def ids(self, text: str) -> list[int]:
        ids = []
        for number, word in enumerate(text.split()):
            piece = f" {word}" if number else word
            if piece not in self.pieces:
                self.pieces.append(piece)
            ids.append(self.pieces.index(piece))
        return ids


def test_prompt_and_text_are_one_text_for_a_decoder():
    pieces = SpacedPieces()
    batch = encode_texts(pieces, "decoder", ["a photo of"], ["a circle"], 10)
    written = "".join(pieces.pieces[i] for i in batch["ids"][0].tolist())
    assert written == "<s>a photo of a circle\n"
    targets = batch["targets"][0].tolist()
    assert targets[:4] == [-100] * 4 and [pieces.pieces[i] for i in targets[4:]] == [
        " a", " circle", "\n"]


@pytest.mark.parametrize("language, times", [(OPT, 1.0), (T5, 16.0)])
def test_soft_tokens_start_larger_in_front_of_an_encoder_decoder(language, times):
    """And as large as they were saved when a model comes back."""
    made = []
    for soft_scale in (1.0, 16.0):
        torch.manual_seed(0)
        config = Stage2Config(**SMALL, language=vars(language), soft_scale=soft_scale)
        made.append(Stage2(config).eval())
    plain, large = made
    assert torch.allclose(large.proj.weight, times * plain.proj.weight)
    assert torch.equal(large.qformer.queries, plain.qformer.queries)
    again, _ = weights.load_stage2(weights.to_transformers(large), large.config)
    assert torch.equal(again.proj.weight, large.proj.weight)
