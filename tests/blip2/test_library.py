"""Language models of the transformers library in stage 2, where it is installed."""

import pytest
import torch

from blip2 import weights
from blip2.stage2 import Stage2, Stage2Config
from blip2.task_stage1 import SIZES
from blip2.texts import encode_prompts, encode_texts, open_tokenizer
from blip2.transformers_language import describe_library_model
from data.files import InputError

transformers = pytest.importorskip("transformers")
SENTENCES = ["question: what colour is it? answer: red", "a photo of a red circle\n"]


def save_model(folder, kind: str, tokenizer: bool = True) -> str:
    """A small random OPT, GPT-2 or T5 in a folder, as from_pretrained reads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    torch.manual_seed(0)
    if kind == "decoder":
        special = dict(bos_token="</s>", eos_token="</s>", pad_token="<pad>")
        model = transformers.OPTForCausalLM(transformers.OPTConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=2, ffn_dim=32,
            num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=200,
            pad_token_id=0, bos_token_id=1, eos_token_id=1))
    elif kind == "gpt2":
        special = dict(bos_token="</s>", eos_token="</s>", pad_token="<pad>")
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=200, bos_token_id=1,
            eos_token_id=1, initializer_range=0.3))
    else:
        special = dict(eos_token="</s>", pad_token="<pad>")
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))
    model.save_pretrained(folder)
    if tokenizer:
        transformers.PreTrainedTokenizerFast(tokenizer_object=pieces,
                                             **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_it_is_trained_on_and_writes(tmp_path, kind):
    """A gradient reaches the bridge alone; greedy writing is the library's own."""
    language = describe_library_model(save_model(tmp_path / "m", kind))
    assert language["kind"] == kind
    model, tokens = small_stage2(language).train(), torch.randn(2, 5, 16)
    assert not any(name.startswith("language.") for name in model.state_dict())
    tokenizer = open_tokenizer(language)
    batch = encode_texts(tokenizer, kind, ["a photo of"] * 2, ["a red", "a circle"], 10)
    losses, _ = model(tokens, **batch)
    losses["lm"].backward()
    assert model.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.language.model.parameters())

    model.eval()
    ids, mask = encode_prompts(tokenizer, kind, ["a photo of", "question: what colour is it?"])
    ours = model.generate(tokens, ids, mask, beams=1, min_length=1, max_length=9)
    embeds, whole = model.with_soft(model.soft_tokens(tokens), ids, mask)
    theirs = model.language.model.generate(
        inputs_embeds=embeds, attention_mask=whole.long(), max_new_tokens=8, min_new_tokens=0,
        do_sample=False, eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad)
    for (hypothesis, *_), row in zip(ours, theirs.tolist()):
        row = row[1:] if kind == "encoder-decoder" else row
        row = row[:row.index(tokenizer.eos)] if tokenizer.eos in row else row
        assert hypothesis[0] == row and row
    beams = model.generate(tokens, ids, mask, beams=3, min_length=1, max_length=9)
    assert all(len(hypotheses) == 1 for hypotheses in beams)


def test_a_model_without_a_tokenizer_is_one_sentence(tmp_path):
    language = describe_library_model(save_model(tmp_path / "m", "decoder", tokenizer=False))
    with pytest.raises(InputError, match="comes without a tokenizer"):
        open_tokenizer(language)


@pytest.mark.parametrize("kind", ["decoder", "gpt2"])
def test_padding_in_front_of_a_prompt_moves_nothing(tmp_path, kind):
    """GPT-2 counts positions from the row's start unless it is told better."""
    language = describe_library_model(save_model(tmp_path / "m", kind))
    model, tokens = small_stage2(language).eval(), torch.randn(2, 5, 16)
    tokenizer = open_tokenizer(language)
    prompts = ["question: what colour is it? answer:", "a photo"]
    ids, mask = encode_prompts(tokenizer, "decoder", prompts)
    together = model.generate(tokens, ids, mask, beams=2, min_length=1, max_length=9)
    for row, prompt in enumerate(prompts):
        one = encode_prompts(tokenizer, "decoder", [prompt])
        alone, = model.generate(tokens[row:row + 1], *one, beams=2, min_length=1, max_length=9)
        assert together[row][0][0] == alone[0][0]
        assert together[row][0][1] == pytest.approx(alone[0][1], abs=1e-4)


def test_released_weights_in_front_of_a_library_model(tmp_path):
    """The bridge comes from the file, the language model from its folder; both go out."""
    language = describe_library_model(save_model(tmp_path / "m", "decoder"))
    model = small_stage2(language)
    state = weights.to_transformers(model)
    inner = model.language.model.state_dict()
    assert all(torch.equal(state[f"language_model.{name}"], inner[name]) for name in inner)
    loaded, report = weights.load_stage2(state, model.config)
    assert not report.left_over and not [n for n in report.missing if not n.startswith("vit.")]
    assert torch.equal(loaded.proj.weight, model.proj.weight)


def small_stage2(language: dict) -> Stage2:
    return Stage2(Stage2Config(**SIZES["tiny"] | dict(vit_depth=0, vit_width=16, vit_heads=1,
                                                      image_size=14), language=language))
