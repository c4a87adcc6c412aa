"""The small language models: what a text sees, where heads look at the start."""

import pytest
import torch

from attention import split_heads
from blip2.language import LanguageConfig
from blip2.task_language import TextModel
from blip2.transformers_language import describe_library_model
from data.files import InputError


def test_a_caption_is_run_once_and_its_questions_do_not_see_each_other():
    """Each answer's logits are those of caption, question and answer alone."""
    torch.manual_seed(0)
    config = LanguageConfig(width=16, depth=2, heads=2, head_width=8, ffn=32, max_positions=40,
                            tied=False, dropout=0.0, vocab_size=30, pad_id=0, bos_id=1, eos_id=2,
                            near_heads=1)
    model = TextModel(config)
    captions = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    asked = torch.tensor([[1, 9, 10, 2], [1, 11, 2, 0], [1, 12, 13, 2], [1, 14, 2, 0]])
    targets = asked.masked_fill(asked == 0, -100)
    losses, _ = model(asked, (asked > 0).long(), targets, captions, (captions > 0).long(),
                      captions[:, :0], captions[:, :0])
    total = count = 0
    for row, text in enumerate(asked):
        caption = captions[row // 2]
        ids = torch.cat([caption[caption > 0], text[text > 0]])[None]
        states, _ = model.language(model.language.embed(ids), torch.ones_like(ids))
        start = int((caption > 0).sum())
        log_p = model.language.logits(states)[0, start:-1].log_softmax(-1)
        total -= log_p.gather(1, ids[0, start + 1:, None]).sum()
        count += ids.shape[1] - start - 1
    assert torch.allclose(losses["lm"], total / count, atol=1e-5)


def test_where_heads_of_a_new_encoder_decoder_look():
    """In an encoder: left, right, at equal tokens; in a decoder: behind, at equal tokens."""
    torch.manual_seed(0)
    config = LanguageConfig(kind="encoder-decoder", width=64, depth=1, heads=4, head_width=32,
                            ffn=32, near_heads=2, vocab_size=30)
    language = TextModel(config).language
    ids = torch.tensor([[5, 6, 7, 8, 9, 6, 10]])  # 6 stands twice
    for stack, second in ((language.encoder, 1), (language.decoder, -1)):
        layer = stack.layers[0]
        x = layer.norm1(language.embed(ids))
        k, _ = layer.attn.project(x)
        scores = split_heads(layer.attn.q(x), 4) @ k.transpose(2, 3) + stack.bias(7, 7)
        looked_at = scores.argmax(-1)[0]  # (H, L)
        assert looked_at[0, 1:].tolist() == [0, 1, 2, 3, 4, 5]
        assert looked_at[1, 1:6].tolist() == [i + second for i in range(1, 6)]
        shares = scores.softmax(-1)[0, 2:, 5].mean(0)  # of the second 6, by heads for equal tokens
        assert shares[[1, 5]].min() > 3 * shares[[0, 2, 3, 4, 6]].max()
    assert torch.allclose(layer.cross_attn.k.weight, layer.cross_attn.q.weight * 32 ** 0.5)


def test_without_the_library_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InputError) as error:
        describe_library_model("facebook/opt-125m")
    assert str(error.value) == (
        "--language-model names a model of the transformers library, which is not installed: `pip "
        "install transformers`, or train a small language model with `python train.py "
        "language-model`")
