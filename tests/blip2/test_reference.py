"""BLIP-2 against tensors of the released code (LAVIS) and of the transformers library."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import reference

from blip2 import weights
from blip2.config import Blip2Config
from blip2.language import LanguageConfig
from blip2.losses import query_similarity
from blip2.qformer import attention_mask
from blip2.stage1 import QFormerStep, Stage1
from blip2.stage2 import Stage2Config
from losses import next_token_targets
from training import distributed


def sizes(config: dict, **more) -> dict:
    """A reference file's `config` as Blip2Config's fields; the image encoder is not involved."""
    return dict(vision="vit", vit_depth=0, vit_width=config["vision"], vit_heads=1,
                image_size=14, patch_size=14, vit_ffn=4, queries=config["queries"],
                width=config["hidden"], depth=config["layers"], heads=config["heads"],
                ffn=config["ffn"], max_positions=config["positions"],
                look_every=config.get("freq", config.get("cross_attention_frequency")), **more)


def stage1(name: str) -> tuple[Stage1, dict]:
    """The model that a reference file describes, and the file."""
    file = reference(f"blip2/{name}")
    model_file = file if isinstance(file["model"], dict) else reference(f"blip2/{file['model']}")
    c = file["config"]
    config = Blip2Config(**sizes(c), embed_dim=c["embed"], temp=c["temp"], pad_id=c["pad_id"],
                         vocab_size=c["vocab_size"], cls_id=c["cls_id"], sep_id=c["sep_id"],
                         dec_id=c["dec_id"])
    model, report = weights.load_stage1(model_file["model"], config)
    assert not report.left_over
    heads = ("vit.", "vision_proj", "text_proj", "itm_head", "temp")  # a captioner has none
    assert all(name.startswith(heads) for name in report.missing)
    model.draw_negative = lambda weights: weights.argmax(1)
    return model, file


def close(ours, theirs, atol=1e-4):
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=atol), (ours - theirs).abs().max()


@torch.no_grad()
def test_stage1_parts():
    model, file = stage1("a_stage1.pt")
    inputs, out = file["inputs"], file["outputs"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens, image_feat = model.encode_image(inputs["vision_output"])
    kv = model.project(tokens)
    states, cache = model.qformer.encode_queries(kv)
    close(tokens, out["image_embeds"])
    close(states, out["query_output"])
    close(torch.stack([k for k, _ in cache]), out["query_past_keys"])
    close(torch.stack([v for _, v in cache]), out["query_past_values"])
    close(model.qformer.encode_text(ids, mask), out["text_last_hidden"])
    close(image_feat, out["image_feats"])
    close(model.encode_text(ids, mask), out["text_feat"])
    close(query_similarity(image_feat, model.encode_text(ids, mask)) / model.temp, out["sim_i2t"])
    decoded, _ = model.qformer.decode(ids, mask, cache)
    close(decoded, out["decoder_last_hidden"])
    close(model.qformer.logits(decoded), out["lm_logits"])
    assert torch.equal(next_token_targets(ids, mask), out["lm_targets"])
    own, image, text = torch.arange(4), out["neg_image_for_text"], out["neg_text_for_image"]
    texts, images = torch.cat([own, own, text]), torch.cat([own, image, own])
    some_kv = [pair and (pair[0][images], pair[1][images]) for pair in kv]
    close(model.qformer.encode_both(ids[texts], mask[texts], some_kv), out["itm_last_hidden"])
    close(model.match(some_kv, ids[texts], mask[texts]), out["itm_logits"])


def test_the_three_masks():
    file = reference("blip2/a_stage1.pt")
    masks, queries = file["masks"], file["config"]["queries"]
    text_mask = file["inputs"]["attention_mask"].bool()
    itc = attention_mask("itc", text_mask, queries)[:, 0]
    assert torch.equal(itc[:, queries:, queries:] | False, masks["text_only"] & text_mask[:, None])
    assert not itc[:, :queries, queries:].any() and not itc[:, queries:, :queries].any()
    for kind in ("itm", "itg"):
        assert torch.equal(attention_mask(kind, text_mask, queries)[:, 0], masks[kind])


@pytest.mark.parametrize("with_ids", [False, True])
def test_stage1_losses_and_gradients(with_ids):
    model, file = stage1("a_stage1.pt")
    inputs, out, more = file["inputs"], file["outputs"], {}
    grads = file["grads"]
    if with_ids:
        out = file["with_image_ids"]
        more = {"image_ids": torch.tensor([7, 7, 8, 9])}  # texts 0 and 1 share an image
    losses, _ = model(inputs["vision_output"], inputs["input_ids"], inputs["attention_mask"],
                      **more)
    for name, value in losses.items():
        close(value, out[f"loss_{name}"], 1e-5)
    if with_ids:
        return
    names = dict(weights.qformer_names(model.config, True))
    for of, of_grads in (("total", grads["total"]), ("itc", grads["loss_itc"]),
                         ("itm", grads["loss_itm"]), ("lm", grads["loss_lm"])):
        model.zero_grad()
        total = sum(losses.values()) if of == "total" else losses[of]
        total.backward(retain_graph=True)
        compare_gradients(model, names, of_grads, 90 if of == "total" else 20)


def compare_gradients(model, names, theirs, at_least):
    """Ours against theirs, part by part where one of our layers holds several of theirs."""
    compared = 0
    for name, p in model.named_parameters():
        sources = names.get(name, [name])
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        for source, ours in zip(sources, gradient.chunk(len(sources)) if p.ndim else [gradient]):
            if source in theirs and not source.endswith(".key.bias"):  # these are noise
                expected = theirs[source]
                scale = max(expected.abs().max().item(), 1e-3)
                assert (ours - expected).abs().max() / scale < 1e-3, source
                compared += 1
    assert compared >= at_least


@torch.no_grad()
def test_features_matching_and_retrieval():
    model, file = stage1("b_features.pt")
    inputs, out = file["inputs"], file["outputs"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens, image_feat = model.encode_image(inputs["vision_output"])
    kv = model.project(tokens)
    close(model.qformer.encode_queries(kv)[0], out["image_embeds"])
    close(image_feat, out["image_embeds_proj"])
    close(model.qformer.encode_text(ids, mask), out["text_embeds"])
    close(model.encode_text(ids, mask), out["text_embeds_proj"][:, 0])
    close(model.qformer.encode_both(ids, mask, kv, queries_only=True), out["multimodal_embeds"])
    for pair in out["pairs"]:
        i, t, txt = pair["image"], pair["text"], file["config"]["txt"]
        one = [k and (k[0][i:i + 1], k[1][i:i + 1]) for k in kv]
        some_ids, some_mask = ids[t:t + 1, :txt].clone(), mask[t:t + 1, :txt]
        if mask[t].sum() > txt:
            some_ids[:, -1] = model.config.sep_id  # a text that is cut keeps its [SEP]
        close(model.match(one, some_ids, some_mask), pair["itm"])
        close(query_similarity(image_feat[i:i + 1], model.encode_text(some_ids, some_mask)),
              pair["itc"])
    ids, mask = inputs["retrieval_input_ids"], inputs["retrieval_attention_mask"]
    _, image_feat = model.encode_image(inputs["retrieval_vision_output"])
    close(query_similarity(image_feat, model.encode_text(ids, mask)), out["retrieval_sims"])


@torch.no_grad()
def test_itg_captions():
    model, file = stage1("c_captions.pt")
    image, out = file["inputs"]["vision_output"], file["outputs"]
    for name, case in file["inputs"]["cases"].items():
        options = dict(beams=case["num_beams"], max_length=case["max_length"],
                       min_length=case["min_length"],
                       repetition_penalty=case["repetition_penalty"])
        if name != "rep2":  # the released method takes a penalty and ignores it
            options["repetition_penalty"] = 1.0
        found = model.generate(image, **options)
        for row, hypotheses in enumerate(found):
            ids, score = hypotheses[0]
            theirs = [i for i in out[name]["ids"][row].tolist()[1:]
                      if i not in (model.config.pad_id, model.config.sep_id)]
            assert ids == theirs, (name, row)
            if "sequences_scores" in out[name]:
                assert score == pytest.approx(out[name]["sequences_scores"][row].item(), abs=1e-4)
    _, cache = model.qformer.encode_queries(model.project(model.encode_tokens(image)))
    step, rows = QFormerStep(model.qformer, cache, torch.arange(4)), torch.arange(4)
    for t, logits in enumerate(out["step_logits"]):
        close(step(out["step_ids"][:, t:t + 1], rows), logits)


def stage2(name: str):
    """The stage-2 model that a reference file describes, and the file."""
    file = reference(f"blip2/{name}")
    c, llm = file["config"], file["llm_config"]
    if "opt" in name:
        language = LanguageConfig(
            "decoder", llm["hidden_size"], llm["num_hidden_layers"], llm["num_attention_heads"],
            ffn=llm["ffn_dim"], max_positions=llm["max_position_embeddings"], pad_id=1, bos_id=2,
            eos_id=file["vocab"].index("\n"), vocab_size=llm["vocab_size"])
    else:
        language = LanguageConfig(
            "encoder-decoder", llm["d_model"], llm["num_layers"], llm["num_heads"], llm["d_kv"],
            llm["d_ff"], buckets=llm["relative_attention_num_buckets"],
            farthest=llm["relative_attention_max_distance"], pad_id=0, bos_id=0, eos_id=1,
            vocab_size=llm["vocab_size"])
    config = Stage2Config(**sizes(c), language=vars(language))
    model, report = weights.load_stage2(file["model"], config)
    assert not report.left_over and all(n.startswith("vit.") for n in report.missing)
    return model, file


def words_of(ids: torch.Tensor, special: tuple[int, ...]) -> list[int]:
    return [i for i in ids.tolist() if i not in special]


def compare_answers(model, case, image, special, ids, mask):
    settings = case["settings"]
    longest = settings.get("max_length") or settings["max_new_tokens"] + 1
    found = model.generate(image, ids, mask, beams=settings["num_beams"], max_length=longest,
                           min_length=settings["min_length"],
                           length_penalty=settings["length_penalty"])
    for row, hypotheses in enumerate(found):
        ids, score = hypotheses[0]
        assert ids == words_of(case["ids"][row][1:], special), row
        assert score == pytest.approx(case["sequences_scores"][row].item(), abs=1e-4)


def test_stage2_with_opt():
    model, file = stage2("e_opt.pt")
    image, out = file["inputs"]["vision_output"], file["outputs"]
    soft = model.soft_tokens(image)
    close(soft, out["prefix"])
    queries = soft.shape[1]
    for name in ("train", "train_with_prompt"):
        case = out[name]
        ids, mask = out["train"]["input_ids"], out["train"]["text_attention_mask"]
        targets = case["targets"][:, queries:]
        losses, _ = model(image, ids, mask, targets)
        close(losses["lm"], case["loss"], 1e-5)
        if name == "train":
            embeds, full_mask = model.with_soft(soft, ids, mask)
            close(embeds, case["inputs_embeds"])
            states, _ = model.language(embeds, full_mask)
            real = full_mask.bool()
            close(model.language.logits(states)[real], case["logits"][real])
            losses["lm"].backward(retain_graph=True)
            names = dict(weights.qformer_names(model.config, False)) | {
                "proj.weight": ["opt_proj.weight"], "proj.bias": ["opt_proj.bias"]}
            compare_gradients(model, names, out["grads"], 10)
    assert all(p.grad is None for p in model.language.parameters())
    for name in ("caption", "answers_lp0", "answers_lp-1"):
        case = out[name]
        mask = case["attention_mask"][:, queries:]
        prompt = torch.tensor([2] + [file["vocab"].index(w) for w in ("a", "photo", "of")])
        ids = case["input_ids"] if "input_ids" in case else prompt.expand(4, -1)
        compare_answers(model, case, image, (1, 2, 4), ids, mask)


def test_stage2_with_t5():
    model, file = stage2("f_t5.pt")
    image, out = file["inputs"]["vision_output"], file["outputs"]
    soft = model.soft_tokens(image)
    close(soft, out["prefix"])
    case = out["train"]
    losses, _ = model(image, case["input_ids"], case["input_attention_mask"], case["targets"])
    close(losses["lm"], case["loss"], 1e-5)
    embeds, mask = model.with_soft(soft, case["input_ids"], case["input_attention_mask"])
    close(embeds, case["inputs_embeds"])
    real = mask.bool()
    close(model.language.encode(embeds, mask)[real], case["encoder_last_hidden"][real])
    written = case["targets"] >= 0
    logits = model.logits(soft, case["input_ids"], case["input_attention_mask"], case["targets"])
    close(logits[written], case["logits"][written])
    losses["lm"].backward()
    names = dict(weights.qformer_names(model.config, False)) | {
        "proj.weight": ["t5_proj.weight"], "proj.bias": ["t5_proj.bias"]}
    compare_gradients(model, names, out["grads"], 10)
    ids = out["train_without_prefix"]["input_ids"]
    losses, _ = model(image, ids, torch.ones_like(ids), case["targets"])
    close(losses["lm"], out["train_without_prefix"]["loss"], 1e-5)
    for name in ("caption", "answers_lp-1", "answers_lp1"):
        answers, queries = out[name], soft.shape[1]
        ids = case["input_ids"] if name == "caption" else out["answers_lp-1"]["input_ids"]
        compare_answers(model, answers, image, (0, 1), ids, answers["attention_mask"][:, queries:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eva", "clip"])
def test_image_encoders(kind):
    file = reference("blip2/g_vision.pt")
    c = file["config"]
    for size in (28, 42):
        config = Blip2Config(vision=kind, image_size=size, patch_size=c["patch"],
                             vit_width=c["width"], vit_depth=c["depth"], vit_heads=c["heads"],
                             vit_ffn=c["mlp_eva"] if kind == "eva" else 4 * c["width"])
        model = weights.load_vision(file["model"][kind], config)
        close(model(file["inputs"][f"image_{size}"]), file["outputs"][f"{kind}_{size}"])


@torch.no_grad()
def test_the_transformers_librarys_weights():
    file = reference("blip2/h_transformers.pt")
    c, inputs, out = file["config"], file["inputs"], file["outputs"]
    config = Blip2Config(**{**sizes(c), "vision": "eva", "vit_depth": c["vision_layers"],
                            "vit_heads": c["vision_heads"], "vit_ffn": c["vision_ffn"],
                            "image_size": c["image_size"], "patch_size": c["patch_size"]},
                         embed_dim=c["embed"], vocab_size=c["vocab_size"], dec_id=49)
    model, report = weights.load_stage1(file["model"], config)
    assert not report.left_over  # and missing is what the library does not have: ITG, temperature
    assert all("lm_head" in name or name == "temp" for name in report.missing)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    kv = model.project(inputs["encoder_hidden_states"])
    close(model.qformer.encode_queries(kv)[0], out["qformer_queries"])
    masked, _ = model.qformer.encode_queries(kv, image_mask=inputs["encoder_attention_mask"])
    close(masked, out["qformer_queries_encoder_masked"])
    both = model.qformer.encode_both(ids, mask, kv)
    real = torch.cat([torch.ones(3, config.queries), mask], 1).bool()
    close(both[real], out["qformer_queries_and_text"][real])
    close(model.qformer.encode_text(ids, mask), out["qformer_text"])
    tokens, image_feat = model.encode_image(inputs["pixel_values"])
    text_feat = model.encode_text(ids, mask)
    close(tokens, out["vision_last_hidden"])
    close(image_feat, out["itc_image_embeds"])
    close(query_similarity(image_feat, text_feat), out["itc_logits_per_image"])
    close(model.match(model.project(tokens), ids, mask), out["itm_logits_per_image"])


def test_names_out_to_the_transformers_library_and_in_again():
    model, _ = stage1("a_stage1.pt")
    state = weights.to_transformers(model)
    names = {theirs: ours for ours, theirs in reference("blip2/h_transformers.pt")[
        "key_map_from_released"]}
    unknown = [name for name in state if name not in names and name != "query_tokens"]
    assert all(name.startswith("vision_model.") for name in unknown) and "query_tokens" in state
    again, report = weights.load_stage1(state, model.config)
    assert all("lm_head" in name or name.startswith(("vit.", "temp")) for name in report.missing)
    for name, value in again.state_dict().items():
        if name not in report.missing and not name.startswith("vit."):
            assert torch.equal(value, model.state_dict()[name]), name


# ---- two processes ----

def one_of_two(rank: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, file = stage1("d_two_ranks.pt")
    case = file["ranks"][rank]
    losses, _ = model(case["vision_output"], case["input_ids"], case["attention_mask"])
    sum(losses.values()).backward()
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            gradients[name] = p.grad / 2
    torch.save({"losses": {name: loss.detach() for name, loss in losses.items()},
                "gradients": gradients}, f"{out}/{rank}.pt")
    distributed.finish()


def test_two_processes(tmp_path):
    """Columns and negatives of both; image tokens are gathered with gradient, columns without."""
    model, file = stage1("d_two_ranks.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port, str(tmp_path)), 2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank, case in enumerate(file["ranks"]):
        for name, loss in found[rank]["losses"].items():
            close(loss, case[f"loss_{name}"], 1e-5)
    for name, p in model.named_parameters():
        p.grad = found[0]["gradients"].get(name)
    compare_gradients(model, dict(weights.qformer_names(model.config, True)),
                      file["grads_mean_over_ranks"], 20)
