"""Weights from elsewhere, against tensors of the released code and, where it is installed, against
the transformers library."""

from dataclasses import asdict

import pytest
import torch
from conftest import REFERENCE, SMALL, TOY, photographs, reference, toy_batch, toy_model

import eval
import train
from blip import BLIP
from config import BLIPConfig
from data.files import InputError
from data.text import Tokenizer
from training import checkpoints
from training.settings import resolve
from vit import resize_positions
from weights.released import Report, export, infer_config, load_released
from weights.starting import start_from
from weights.transformers_library import to_transformers

TINY_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"word{i}" for i in range(33)]


def released(tmp_path, **changes):
    weights = {**reference("b_pretrain_parts.pt")["model"], **changes}
    torch.save({"model": {k: v for k, v in weights.items() if v is not None}},
               tmp_path / "released.pt")
    return tmp_path / "released.pt"


@torch.no_grad()
def test_released_pretraining_model_gives_the_released_outputs(tmp_path):
    model, report = load_released(released(tmp_path), vit_heads=4, text_heads=4)
    ref = reference("b_pretrain_parts.pt")
    inputs, out = ref["inputs"], ref["outputs"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert not report.missing
    assert all(name.startswith("text_encoder_m.") and "crossattention" in name
               for name in report.left_over)
    tokens, image_feat = model.encode_image(inputs["image"])
    kv = model.med.project(tokens)
    decoded, _ = model.med.decode(ids, mask, kv)
    found = {"image_embeds": tokens, "image_feat": image_feat,
             "text_last_hidden": model.med.encode_text(ids, mask),
             "text_feat": model.encode_text(ids, mask), "itm_logits": model.match(kv, ids, mask),
             "multimodal_last_hidden": model.med.encode_grounded(ids, mask, kv),
             "decoder_logits": model.med.logits(decoded)}
    for name, value in found.items():
        assert torch.allclose(value, out[name], atol=1e-4), name
    model.set_objectives(("lm",))
    assert model(inputs["image"], ids, mask)[0]["lm"].item() == pytest.approx(
        out["loss_lm"].item(), abs=1e-5)


def test_released_sizes_are_inferred_and_heads_are_asked_for(tmp_path):
    path = released(tmp_path)
    with pytest.raises(InputError, match="width 48 has cannot be told.* give vit_heads"):
        load_released(path)
    with pytest.raises(InputError, match="text_heads 5 does not divide"):
        load_released(path, vit_heads=4, text_heads=5)
    model, report = load_released(path, vit_heads=4, text_heads=4)
    config = model.config
    assert (config.text_heads, config.queue_size, config.vocab_size, config.enc_id) == (
        4, 24, 486, 485)
    assert "no tokenizer given: [PAD] 0, [CLS] 101, [SEP] 102 as in BERT" in str(report)
    larger = load_released(path, image_size=96, vit_heads=4, text_heads=4)[0]
    assert larger.vit.pos_embed.shape == (1, 37, 48)


def test_a_released_large_model_brings_its_own_recipe():
    """ViT-L is finetuned with drop path 0.1 and half of base's learning rate (BLIP sec. 5)."""
    names = {"cls_token": (1, 1, 1024), "pos_embed": (1, 197, 1024),
             "patch_embed.proj.weight": (1024, 3, 16, 16), "blocks.23.norm1.weight": (1024,)}
    weights = {f"visual_encoder.{name}": torch.empty(shape, device="meta")
               for name, shape in names.items()}
    for name, shape in {"embeddings.word_embeddings.weight": (30524, 768),
                        "embeddings.position_embeddings.weight": (512, 768),
                        "encoder.layer.11.x": (1,),
                        "encoder.layer.0.intermediate.dense.weight": (3072, 768)}.items():
        weights[f"text_encoder.{name}"] = torch.empty(shape, device="meta")
    config = infer_config(weights, "large.pth", None, None)
    assert (config.drop_path, config.vit_heads, config.text_heads) == (0.1, 16, 12)
    settings = Report(kind="retrieval", preset="large").settings()
    start = {"model_config": asdict(config), "train_config": settings}
    model, recipe = resolve({"task": "retrieval"}, start)
    assert (recipe.preset, recipe.lr, model.drop_path) == ("large", 5e-6, 0.1)


def test_what_is_missing_or_left_over_is_reported(tmp_path):
    path = released(tmp_path, **{"itm_head.weight": None, "something.else": torch.zeros(1)})
    _, report = load_released(path, vit_heads=4, text_heads=4)
    assert report.missing == ["itm_head.weight"] and "something.else" in report.left_over
    assert "itm_head.weight" in str(report) and "left over" in str(report)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a released BLIP"):
        load_released(tmp_path / "other.pt")


def test_captions_with_the_released_caption_models_weights(tmp_path):
    """A caption checkpoint has no text encoder: what it lacks is reported, its kind is known."""
    ref = reference("d_caption.pt")
    torch.save(ref["model"], tmp_path / "caption.pth")
    tokenizer = Tokenizer.from_file(REFERENCE / "vocab.txt")
    model, report = load_released(tmp_path / "caption.pth", vit_heads=4, text_heads=4,
                                  tokenizer=tokenizer)
    assert report.kind == "caption" and report.settings()["prompt"] == "a picture of"
    assert not report.left_over and "itm_head.weight" in report.missing
    assert not any("attn_causal" in name or name.startswith("vit.") for name in report.missing)
    case = ref["inputs"]["beam_cases"]["default"]
    how = {k: v for k, v in case.items() if k in ("min_length", "max_length")}
    prompt = tokenizer.piece_ids("a picture of")
    found = model.generate(ref["inputs"]["image"], prompt, beams=3, **how)
    expected = ref["outputs"]["beam_default"]["captions"]
    assert ["a picture of " + tokenizer.decode(h[0][0]) for h in found] == [
        text if text.startswith("a picture of") else "a picture of " + text for text in expected]


def test_a_retrieval_model_without_decoder_or_twins():
    model = toy_model().eval()
    assert {name.split(".")[0] for name in export(model, "retrieval")} == {
        "visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head"}


def test_an_image_encoder_of_ones_own_does_not_go_out():
    model = toy_model()
    model.vit = torch.nn.Conv2d(3, 8, 4)
    with pytest.raises(InputError, match="the model has no vit.* only one with this project's"):
        export(model)


@pytest.mark.parametrize("kind", ["pretrain", "caption", "retrieval"])
@pytest.mark.parametrize("transformers", [False, True])
def test_out_and_in_again(tmp_path, kind, transformers):
    torch.manual_seed(1)
    model = toy_model(share="all_but_sa")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    names = export(model, kind)
    if transformers:
        names = {to_transformers(name): value for name, value in names.items()}
    qkv = "vision_model.encoder.layers.0.self_attn.qkv.weight"
    assert (qkv in names) == transformers
    torch.save(names, tmp_path / "out.pth")
    again, report = load_released(tmp_path / "out.pth", vit_heads=2, text_heads=4)
    assert report.kind == kind and not report.left_over
    batch = toy_batch()
    again.config = model.config
    again.med.enc_id, again.med.dec_id = model.med.enc_id, model.med.dec_id
    with torch.no_grad():
        for m in (model.eval(), again.eval()):
            tokens, feat = m.encode_image(batch["image"])
            kv = m.med.project(tokens)
            m.out = {"caption": [m.med.logits(m.med.decode(batch["ids"], batch["mask"], kv)[0])],
                     "retrieval": [feat, m.encode_text(batch["ids"], batch["mask"]),
                                   m.match(kv, batch["ids"], batch["mask"])]}
    for wanted in ("caption", "retrieval") if kind == "pretrain" else (kind,):
        for a, b in zip(model.out[wanted], again.out[wanted]):
            assert torch.allclose(a, b, atol=1e-5)
    if kind == "pretrain":
        assert torch.equal(again.image_queue, model.image_queue) and not report.missing
        assert torch.equal(again.vit_m.norm.weight, model.vit_m.norm.weight)
    else:  # without twins in the file, they start equal to the online model
        assert torch.equal(again.vit_m.norm.weight, again.vit.norm.weight)


# ---- starting weights ----

def bert_and_vit(folder):
    """Files with the key names of BERT-base and DeiT, of the toy model's sizes."""
    torch.manual_seed(2)
    source = toy_model()
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    released = export(source)
    vit = {name.removeprefix("visual_encoder."): value for name, value in released.items()
           if name.startswith("visual_encoder.")} | {"head.weight": torch.zeros(10, 32)}
    bert = {"bert." + name.removeprefix("text_encoder.").replace("Norm.weight", "Norm.gamma"): value
            for name, value in released.items()
            if name.startswith("text_encoder.") and "crossattention" not in name}
    bert["bert.embeddings.word_embeddings.weight"] = source.med.embeddings.word.weight.data[:-2]
    head = "text_decoder.cls.predictions."
    bert |= {"cls.predictions." + name.removeprefix(head): value[:38] if name.endswith("s.bias")
             else value for name, value in released.items() if name.startswith(head)}
    torch.save({"model": vit}, folder / "deit.pth")
    torch.save(bert, folder / "bert.bin")
    return source


def test_pretraining_starts_from_an_imagenet_vit_and_bert(tmp_path):
    source, model = bert_and_vit(tmp_path), toy_model(image_size=64)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    report = start_from(model, str(tmp_path / "deit.pth"), str(tmp_path / "bert.bin"))
    assert "left over: head.weight" in report
    ours, theirs = model.state_dict(), source.state_dict()
    for name in ("vit.blocks.1.attn.qkv.weight", "vit.norm.bias", "med.layers.1.ffn.fc2.weight",
                 "med.layers.0.attn_bi.attn.qkv.bias", "med.embeddings.norm.weight",
                 "med.lm_head.dense.weight"):
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours["vit.pos_embed"], resize_positions(theirs["vit.pos_embed"], 17))
    # Encoder and decoder both start from BERT; cross-attention, [DEC] and [ENC] from noise.
    for part in ("attn.qkv.weight", "attn.out.bias", "add.norm.weight"):
        assert torch.equal(ours[f"med.layers.1.attn_causal.{part}"],
                           theirs[f"med.layers.1.attn_bi.{part}"])
    word = ours["med.embeddings.word.weight"]
    assert torch.equal(word[:-2], theirs["med.embeddings.word.weight"][:-2])
    assert torch.equal(word[-2:], fresh["med.embeddings.word.weight"][-2:])
    name = "med.layers.0.cross_attn.attn.kv.weight"
    assert torch.equal(ours[name], fresh[name])
    # The twins start equal.
    assert all(torch.equal(a, b) for a, b in model.twin_parameters)


def test_starting_weights_that_do_not_fit(tmp_path, capsys):
    bert_and_vit(tmp_path)
    with pytest.raises(InputError, match=r"deit.pth: .* makes .* where the model has"):
        start_from(toy_model(vit_width=48), str(tmp_path / "deit.pth"))
    with pytest.raises(InputError, match="bert.bin lacks cls_token and .* it is no ViT state dict"):
        start_from(toy_model(), str(tmp_path / "bert.bin"))
    (tmp_path / "vocab.txt").write_text("\n".join(TINY_BERT))
    flags = [*SMALL, "--scenes", "16", "--out", str(tmp_path / "a"), "--init-text",
             str(tmp_path / "bert.bin")]
    assert train.main(flags) == 2 and "--init-text needs --vocab" in capsys.readouterr().err
    sizes = {"vit-width": 32, "vit-depth": 2, "text-width": 48, "text-depth": 2, "text-heads": 4,
             "text-ffn": 96, "max-positions": 32}
    flags += [f"--{k}={v}" for k, v in sizes.items()] + [
        "--vocab", str(tmp_path / "vocab.txt"), "--init-vit", str(tmp_path / "deit.pth")]
    assert train.main([*flags, "--max-length", "30"]) == 0
    out = capsys.readouterr().out
    assert "deit.pth: " in out and "bert.bin: " in out


def test_released_weights_on_the_command_line(tmp_path, capsys):
    """From a downloaded file to a caption; a caption model cannot match."""
    (tmp_path / "vocab.txt").write_text("\n".join(TINY_BERT))
    model = BLIP(BLIPConfig(**{**TOY, "vit_width": 64, "vit_heads": 1, "text_width": 64,
                               "text_heads": 1, "dec_id": 38, "enc_id": 39}))
    torch.save({"model": export(model, "caption")}, tmp_path / "caption.pth")
    picture = str(photographs(tmp_path / "p", 1) / "0.jpg")
    asked = [picture, "--checkpoint", str(tmp_path / "caption.pth")]
    assert eval.main(["describe", *asked, "--out", str(tmp_path / "o")]) == 2
    assert "give --vocab with the vocab.txt" in capsys.readouterr().err
    asked += ["--vocab", str(tmp_path / "vocab.txt")]
    assert eval.main(["describe", *asked]) == 2
    assert "cannot be told from its weights; give vit_heads" in capsys.readouterr().err
    asked += ["--vit-heads", "1", "--text-heads", "1"]
    assert eval.main(["describe", *asked, "--out", str(tmp_path / "o"), "--prompt", ""]) == 0
    assert picture in capsys.readouterr().out
    assert eval.main(["match", asked[0], "x", *asked[1:]]) == 2
    assert "checkpoint of another task (caption)" in capsys.readouterr().err
    (tmp_path / "vocab.txt").write_text("\n".join(TINY_BERT[:20]))
    assert eval.main(["describe", *asked]) == 2
    assert "the vocabulary has 22 tokens" in capsys.readouterr().err


# ---- the transformers library ----

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["caption", "retrieval"])
def test_the_transformers_library_computes_the_same(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(TINY_BERT)
    model = toy_model(**tokenizer.config()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    checkpoints.save(tmp_path / "c.pt", {"model": model.state_dict(),
                                         "model_config": asdict(model.config),
                                         "tokenizer": tokenizer.state()})
    assert checkpoints.main(["export", str(tmp_path / "c.pt"), str(tmp_path / "hf"), "--kind",
                             kind]) == 0
    batch = toy_batch()
    image, ids, mask = batch["image"], batch["ids"], batch["mask"]
    with torch.no_grad():
        tokens, feat = model.encode_image(image)
        kv = model.med.project(tokens)
        if kind == "caption":
            kind_of = transformers.BlipForConditionalGeneration
            other = kind_of.from_pretrained(tmp_path / "hf").eval()
            ids[:, 0] = model.config.dec_id
            theirs = other(pixel_values=image, input_ids=ids, attention_mask=mask).logits
            ours = model.med.logits(model.med.decode(ids, mask, kv)[0])
            assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-4)
            torch.save(other.state_dict(), tmp_path / "theirs.pth")
        else:
            other = transformers.BlipForImageTextRetrieval.from_pretrained(tmp_path / "hf").eval()
            theirs = other(pixel_values=image, input_ids=ids, attention_mask=mask).itm_score
            states = model.med.encode_grounded(ids, mask, kv, first_token=model.config.cls_id)
            assert torch.allclose(model.itm_head(states[:, 0]), theirs, atol=1e-4)
            theirs = other(pixel_values=image, input_ids=ids, attention_mask=mask,
                           use_itm_head=False).itm_score
            assert torch.allclose(feat @ model.encode_text(ids, mask).T, theirs, atol=1e-4)
            torch.save(other.state_dict(), tmp_path / "theirs.pth")
    again, report = load_released(tmp_path / "theirs.pth", vit_heads=2, text_heads=4,
                                  tokenizer=tokenizer)
    assert report.kind == kind and not [n for n in report.left_over if "logit_scale" not in n]
    assert torch.equal(again.vit.blocks[1].attn.qkv.weight, model.vit.blocks[1].attn.qkv.weight)
