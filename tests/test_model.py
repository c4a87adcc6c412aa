"""ViT, MED and BLIP: structure, masks, caches, purity, the momentum arithmetic."""

import pytest
import torch
from conftest import TOY, SumsInAnyOrder, reference, toy_batch, toy_model

import blip
from attention import attend
from blip import BLIP, init_weights
from config import BLIPConfig
from med import MED, DecoderStep
from training.precision import CPULinear, linear_of_few_rows, speed_up_generation
from training.reach import freeze_unreached
from training.run import trainable_names
from vit import ViT, resize_positions


@pytest.mark.parametrize("share, millions", [("all", 224.1), ("all_but_sa", 252.4),
                                             ("all_but_ca", 252.4), ("none", 361.3)])
def test_parameter_counts_of_table_3(share, millions):
    with torch.device("meta"):
        model = BLIP(BLIPConfig(share=share))
    twins = {id(p) for _, twin in model.twins() for p in twin.parameters()}
    count = sum(p.numel() for p in model.parameters() if id(p) not in twins)
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("share, own", [("all", ""), ("all_but_sa", "sa"), ("all_but_ca", "ca"),
                                        ("none", "sa ca ffn")])
def test_sharing_is_identity(share, own):
    med = toy_model(share=share).med
    for layer in med.layers:
        assert (layer.attn_causal is layer.attn_bi) == ("sa" not in own)
        assert (layer.cross_attn_dec is layer.cross_attn) == ("ca" not in own)
        assert (layer.ffn_dec is layer.ffn) == ("ffn" not in own)
    assert (med.embeddings_dec is med.embeddings) == (share != "none")
    kv = med.project(torch.randn(2, 5, TOY["vit_width"]))
    assert (kv.dec is kv.enc) == ("ca" not in own)


@pytest.mark.parametrize("share", ["all", "all_but_sa", "all_but_ca", "none"])
def test_every_sharing_trains_what_it_says_and_nothing_else(share):
    model, batch = toy_model(share=share), toy_batch()
    trainable = trainable_names(model)
    for objectives in (("itc",), ("itm",), ("lm",), ("itc", "itm", "lm")):
        model.set_objectives(objectives)
        freeze_unreached(model, trainable, dict(batch, alpha=0.4))
        model.zero_grad(set_to_none=True)
        losses, _ = model(**batch, alpha=0.4)
        assert set(losses) == set(objectives)
        sum(losses.values()).backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, (objectives, name)
        reached = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        heads = {"itc": {"vision_proj", "text_proj", "temp"}, "itm": {"itm_head"}, "lm": set()}
        assert reached == {"vit", "med"}.union(*(heads[name] for name in objectives))


def test_twins_hold_only_what_itc_uses():
    layer = toy_model().med_m.layers[0]
    assert layer.cross_attn is layer.attn_causal is None and layer.attn_bi is not None
    only_question = MED(40, 48, 32, 2, 4, 96, 32, 0.0, 39, 38, modes=("grounded",))
    only_answer = MED(40, 48, 32, 2, 4, 96, 32, 0.0, 39, 38, modes=("decode",))
    assert only_question.layers[0].attn_causal is only_answer.layers[0].attn_bi is None
    kv = only_answer.project(torch.randn(1, 5, 32))
    assert only_answer.decode(torch.tensor([[2, 5]]), None, kv)[0].shape == (1, 2, 48)


def test_a_future_token_changes_the_past_in_the_encoder_but_not_in_the_decoder():
    model, batch = toy_model().eval(), toy_batch(2)
    kv = model.med.project(model.vit(batch["image"]))
    ids, mask = batch["ids"][:1].repeat(2, 1), torch.ones(2, 7, dtype=torch.long)
    ids[1, 5] = ids[0, 5] % 30 + 6
    kv = kv.select(torch.tensor([0, 0]))
    decoded, _ = model.med.decode(ids, mask, kv)
    logits = model.med.logits(decoded)
    assert (torch.allclose(logits[0, :5], logits[1, :5], atol=1e-6)
            and not torch.allclose(logits[0, 5:], logits[1, 5:]))
    encoded = model.med.encode_grounded(ids, mask, kv)
    assert not torch.allclose(encoded[0, :5], encoded[1, :5], atol=1e-4)


def test_the_first_state_alone_is_the_first_of_all():
    """And the last layer's feed-forward works for that one only."""
    model, batch = toy_model().eval(), toy_batch(2)
    ids, mask, seen = batch["ids"], batch["mask"], []
    model.med.layers[-1].ffn.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[1]))
    kv = model.med.project(model.vit(batch["image"]))
    for states in (lambda only: model.med.encode_text(ids, mask, cls_only=only),
                   lambda only: model.med.encode_grounded(ids, mask, kv, cls_only=only)):
        assert torch.allclose(states(False)[:, :1], states(True), atol=1e-6)
    assert seen == [ids.shape[1], 1] * 2


def test_the_image_matters_to_matching_and_to_captions():
    model, batch = toy_model().eval(), toy_batch(2)
    kv = model.med.project(model.vit(batch["image"]))
    other = kv.select(torch.tensor([1, 0]))
    for mode in (model.med.encode_grounded, lambda *a: model.med.decode(*a)[0]):
        assert not torch.allclose(mode(batch["ids"], batch["mask"], kv),
                                  mode(batch["ids"], batch["mask"], other))


def test_unimodal_text_ignores_the_image():
    model, batch = toy_model(), toy_batch()
    model.set_objectives(("itc",))
    # as if there were no image: nothing of cross-attention is left to be used
    for layer in model.med.layers:
        layer.cross_attn = layer.cross_attn_dec = None
    assert model.encode_text(batch["ids"], batch["mask"]).shape == (4, 16)


def test_first_tokens_cls_enc_dec():
    model, batch = toy_model().eval(), toy_batch(2)
    kv, seen = model.med.project(model.vit(batch["image"])), []
    model.med.embeddings.word.register_forward_hook(
        lambda module, args, out: seen.append(args[0][:, 0].tolist()))
    model.med.encode_text(batch["ids"], batch["mask"])
    model.med.encode_grounded(batch["ids"], batch["mask"], kv)
    model.med.decode(batch["ids"], batch["mask"], kv)
    model.med.encode_grounded(batch["ids"], batch["mask"], kv, first_token=2)
    assert seen == [[2, 2], [39, 39], [38, 38], [2, 2]] and batch["ids"][:, 0].tolist() == [2, 2]


def test_cache_equals_no_cache():
    model, batch = toy_model().eval(), toy_batch(2)
    kv, ids = model.med.project(model.vit(batch["image"])), batch["ids"]
    whole, _ = model.med.decode(ids, None, kv)
    start, past = model.med.decode(ids[:, :2], None, kv)
    parts = [start]
    for t in range(2, ids.shape[1]):
        state, past = model.med.decode(ids[:, t:t + 1], None, kv, past)
        parts.append(state)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_decoder_step_reorders_and_drops_rows():
    model, batch = toy_model().eval(), toy_batch(3)
    kv = model.med.project(model.vit(batch["image"]))
    step = DecoderStep(model.med, kv, torch.arange(3).repeat_interleave(2))
    start = torch.tensor([[38, 6], [38, 7], [38, 8], [38, 9], [38, 10], [38, 11]])
    step(start, torch.arange(6))
    # image 1 is finished, image 2 keeps one row
    rows, tokens = torch.tensor([1, 1, 4]), torch.tensor([[12], [13], [14]])
    ids = torch.cat([start[rows], tokens], 1)
    states, _ = model.med.decode(ids, None, kv.select(torch.tensor([0, 0, 2])))
    assert torch.allclose(step(tokens, rows), model.med.logits(states[:, -1]), atol=1e-5)


def test_padding_does_not_change_a_result():
    model, batch = toy_model().eval(), toy_batch()
    ids, mask = (torch.nn.functional.pad(batch["ids"], (0, 4)),
                 torch.nn.functional.pad(batch["mask"], (0, 4)))
    assert torch.allclose(model.encode_text(batch["ids"], batch["mask"]),
                          model.encode_text(ids, mask), atol=1e-6)
    kv = model.med.project(model.vit(batch["image"]))
    assert torch.allclose(model.match(kv, batch["ids"], batch["mask"]), model.match(kv, ids, mask),
                          atol=1e-5)
    model.set_objectives(("lm",))
    assert torch.allclose(model(**batch)[0]["lm"], model(batch["image"], ids, mask)[0]["lm"],
                          atol=1e-6)


def test_texts_stacked_on_one_image_equal_the_image_repeated():
    model, batch = toy_model().eval(), toy_batch(4)
    kv = model.med.project(model.vit(batch["image"][:2]))
    repeated = kv.select(torch.tensor([0, 0, 1, 1]))
    args = batch["ids"], batch["mask"]
    assert torch.allclose(model.match(kv, *args), model.match(repeated, *args), atol=1e-5)
    assert torch.allclose(model.med.decode(*args, kv)[0], model.med.decode(*args, repeated)[0],
                          atol=1e-5)
    with pytest.raises(ValueError, match="3 texts cannot be divided evenly among 2"):
        model.match(kv, batch["ids"][:3], batch["mask"][:3])


def test_an_image_is_projected_once_per_training_step():
    model, batch, calls = toy_model(), toy_batch(), []
    for layer in model.med.layers:
        layer.cross_attn.attn.kv.register_forward_hook(
            lambda module, args, out: calls.append(len(args[0])))
    model(**batch, alpha=0.4)
    assert calls == [4] * TOY["text_depth"]  # four passes over the text, one projection a layer


def test_context_mask_hides_what_is_masked():
    med = toy_model().med.eval()
    context, batch = torch.randn(2, 6, 32), toy_batch(2)
    short = med.project(context[:, :4])
    masked = med.project(context, torch.tensor([[1, 1, 1, 1, 0, 0]] * 2))
    args = batch["ids"], batch["mask"]
    assert torch.allclose(med.encode_grounded(*args, short), med.encode_grounded(*args, masked),
                          atol=1e-5)


def test_explicit_softmax_equals_the_fused_kernel():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (4, 5, 5))
    mask, attn_maps = torch.rand(2, 1, 4, 5) > 0.3, []
    mask[..., 0] = True
    assert torch.allclose(attend(q, k, v, mask), attend(q, k, v, mask, attn_maps=attn_maps),
                          atol=1e-6)
    assert torch.allclose(attn_maps[0].sum(-1), torch.ones(2, 3, 4))
    assert (attn_maps[0].masked_select(~mask.expand(2, 3, 4, 5)) == 0).all()


def test_gradient_checkpointing_changes_nothing_and_drop_path_only_training():
    torch.manual_seed(0)
    plain, image = ViT(32, 16, 32, 3, 2, drop_path=0.5), torch.randn(8, 3, 32, 32)
    saving = ViT(32, 16, 32, 3, 2, drop_path=0.5, grad_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    def gradient(vit):
        torch.manual_seed(3)
        vit.zero_grad()
        vit(image).square().sum().backward()
        return vit.patch_embed.weight.grad.clone()
    assert torch.allclose(gradient(plain.train()), gradient(saving.train()), atol=1e-4)
    assert not torch.equal(plain(image), plain(image))
    plain.eval()
    assert torch.equal(plain(image), plain(image))


def test_a_larger_image_resizes_the_positions():
    vit = ViT(32, 16, 32, 2, 2).eval()
    assert vit(torch.randn(1, 3, 64, 64)).shape == (1, 17, 32)
    assert resize_positions(vit.pos_embed, 5) is vit.pos_embed
    with pytest.raises(ValueError, match="square grid"):
        resize_positions(vit.pos_embed, 8)


def test_bytes_that_nobody_normalised_are_refused():
    with pytest.raises(ValueError, match="expected normalised images, got torch.uint8"):
        ViT(32, 16, 32, 1, 2)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_forward_leaves_all_state_as_it_was():
    for mode in (True, False):
        model = toy_model().train(mode)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        losses, _ = model(**toy_batch(), alpha=0.4)
        sum(losses.values()).backward()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_seed_gives_the_same_gradient_on_any_number_of_threads():
    model, rows = toy_model(), torch.zeros(2, requires_grad=True)
    with SumsInAnyOrder() as sums:
        sum(model(**toy_batch(8), alpha=0.4)[0].values()).backward()
        assert sums.count == 0
        rows[torch.tensor([1, 1])].sum().backward()
        assert sums.count == 1  # this is what it counts


def test_twins_stay_in_eval_mode_and_get_no_gradient():
    model = toy_model(dropout=0.5).train()
    assert model.med.training and not any(m.training for _, twin in model.twins()
                                          for m in twin.modules())
    sum(model(**toy_batch(), alpha=0.4)[0].values()).backward()
    assert all(p.grad is None for _, twin in model.twins() for p in twin.parameters())


def test_momentum_arithmetic():
    model = toy_model(momentum=0.9)
    online, twin = model.vision_proj.weight, model.vision_proj_m.weight
    assert torch.equal(online, twin)
    with torch.no_grad():
        online.add_(1.0)
    before = twin.clone()
    model.update_momentum()
    assert torch.allclose(twin, 0.9 * before + 0.1 * online, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4, 10, 13])
def test_queue_takes_any_batch_size_and_wraps(size):
    model, expected, number = toy_model(), [], 0
    for _ in range(5):
        ids = torch.arange(number, number + size)
        feat = ids[:, None].float().expand(-1, 16)
        model.enqueue({"image": feat, "text": -feat, "ids": ids})
        number += size
        expected = (expected + ids.tolist())[-10:]
    held = sorted(i for i in model.queue_ids.tolist() if i >= 0)
    assert held == sorted(expected)
    for slot, i in enumerate(model.queue_ids.tolist()):
        if i >= 0:
            assert (model.image_queue[slot] == i).all() and (model.text_queue[slot] == -i).all()
    if size < 10:  # the next one goes over the oldest
        assert model.queue_ptr.item() == number % 10


def test_keys_of_a_subclass_do_not_disturb_the_queue():
    """In steps without ITC there are no others; with it they are left alone."""
    model, own = toy_model(), {"patches": torch.zeros(4, 3)}
    model.enqueue(own)
    assert model.queue_ptr.item() == 0
    feat = torch.ones(4, 16)
    model.enqueue(own | {"image": feat, "text": feat, "ids": torch.arange(4)})
    assert model.queue_ptr.item() == 4 and model.queue_ids[:4].tolist() == [0, 1, 2, 3]


def test_temperature_is_clamped_between_the_steps():
    model = toy_model()
    for value, clamped in ((2.0, 0.5), (-1.0, 0.001), (0.1, 0.1)):
        model.temp.data.fill_(value)
        model.clamp_temperature()
        assert model.temp.item() == pytest.approx(clamped)


def test_one_pair_or_one_shared_id_is_no_crash():
    model = toy_model()
    for batch, image_ids in ((toy_batch(1), None), (toy_batch(3), torch.tensor([7, 7, 7]))):
        losses, _ = model(**batch, alpha=0.4, image_ids=image_ids, finetuning=True)
        assert all(torch.isfinite(loss) for loss in losses.values())


def test_finetuning_mines_with_online_features_and_without_a_floor(monkeypatch):
    """Pretraining: online x momentum, floor 1e-4. Finetuning: online x online, no floor. Equal ids
    are positives in both."""
    model, batch, seen = toy_model().eval(), toy_batch(3), []
    with torch.no_grad():
        model.vision_proj_m.weight.normal_()  # the twins now think otherwise
        model.text_proj_m.weight.normal_()
        image_feat = model.encode_image(batch["image"])[1]
        text_feat = model.encode_text(batch["ids"], batch["mask"])
    mine = blip.mine_hard_negatives
    def watch(*arguments):
        seen.append(arguments)
        return mine(*arguments)
    monkeypatch.setattr(blip, "mine_hard_negatives", watch)
    image_ids = torch.tensor([4, 9, 4])
    model(**batch)
    model(**batch, image_ids=image_ids, finetuning=True)
    model(**batch, image_ids=image_ids)
    online = image_feat @ text_feat.T / model.temp
    shared = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    for (sim, positives, floor, *_), expected, is_online, lowest in (
            (seen[0], torch.eye(3).bool(), False, 1e-4), (seen[2], shared, True, 0.0),
            (seen[4], shared, False, 1e-4)):
        assert torch.allclose(sim, online, atol=1e-4) == is_online
        assert positives.equal(expected) and floor == lowest
    assert torch.allclose(seen[3][0], online.T, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 48), (4, 1, 48), (3, 4, 48), (60, 48)])
def test_few_rows_come_out_as_many_do(shape):
    """Generation takes another road through a linear layer than training does."""
    x, layer = torch.randn(shape), torch.nn.Linear(48, 20)
    speed_up_generation(layer)
    assert isinstance(layer, CPULinear)
    expected = x @ layer.weight.T + layer.bias
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-5)
        assert torch.allclose(linear_of_few_rows(x, layer.weight, None), expected - layer.bias,
                              atol=1e-5)
    assert layer(x).requires_grad and torch.allclose(layer(x), expected, atol=1e-5)


def test_a_model_that_is_made_fast_generates_the_same():
    model, image = toy_model().eval(), toy_batch(3)["image"]
    plain = model.generate(image, max_length=8, min_length=3)
    names = list(model.state_dict())
    fast = speed_up_generation(model).generate(image, max_length=8, min_length=3)
    assert [[ids for ids, _ in h] for h in plain] == [[ids for ids, _ in h] for h in fast]
    assert list(model.state_dict()) == names


def test_initialisation_keeps_the_scale_at_every_width():
    for width in (64, 768):
        torch.manual_seed(0)
        layer = torch.nn.Linear(width, 256)
        init_weights(layer, 0.0)
        assert layer(torch.randn(512, width)).std().item() == pytest.approx(1.0, abs=0.05)


def test_eight_pairs_can_be_overfitted():
    torch.manual_seed(0)
    model, batch = toy_model(queue_size=0).train(), toy_batch(8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(150):
        losses, _ = model(**batch)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_momentum()
        model.clamp_temperature()
    assert losses["itc"] < 0.05 and losses["itm"] < 0.05
    captions = model.eval().generate(batch["image"], max_length=10, min_length=1)
    for row, found in enumerate(captions):
        real = int(batch["mask"][row].sum())
        assert found[0][0] == batch["ids"][row, 1:real - 1].tolist()


def test_generate_refuses_what_cannot_fit():
    model, image = toy_model().eval(), toy_batch(1)["image"]
    with pytest.raises(ValueError, match="prompt of 21 tokens"):
        model.generate(image, prompt=[5] * 20)
    with pytest.raises(ValueError, match="beam or nucleus"):
        model.generate(image, method="greedy")
    with pytest.raises(ValueError, match="multiple of --vit-heads"):
        BLIPConfig(vit_heads=7)


def test_vit_equals_the_released_one():
    ref = reference("a_vit.pt")
    from weights.names import vit_names
    vit = ViT(64, 16, 48, 2, 4).eval()
    weights = {ours: ref["model"][released[0]] for ours, released in vit_names("", "", 2)}
    vit.load_state_dict(weights)
    for size in (64, 96):
        assert torch.allclose(vit(ref["inputs"][f"image_{size}"]), ref["outputs"][f"embeds_{size}"],
                              atol=1e-4)
    for size, tokens in ((96, 37), (48, 10)):
        assert torch.allclose(resize_positions(vit.pos_embed, tokens),
                              ref["outputs"][f"pos_embed_{size}"], atol=1e-5)
