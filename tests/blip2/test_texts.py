"""What a language model reads and writes: prompts, targets, dialogs."""

from blip2.texts import encode_prompts, encode_texts, question_prompt, split_text


class Words:
    """A tokenizer whose words are numbers."""

    pad, bos, eos = 0, 1, 2

    def ids(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def test_what_a_decoder_reads_and_what_gives_a_loss():
    batch = encode_texts(Words(), "decoder", ["5 6", ""], ["7 8 9", "7"], 3)
    assert batch["ids"].tolist() == [[1, 5, 6, 7, 8, 2], [1, 7, 2, 0, 0, 0]]
    assert batch["targets"].tolist() == [[-100, -100, -100, 7, 8, 2],
                                         [1, 7, 2, -100, -100, -100]]  # bos, without a prompt
    ids, mask = encode_prompts(Words(), "decoder", ["5 6", "7"])
    assert ids.tolist() == [[1, 5, 6], [0, 1, 7]] and mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    ids, mask = encode_prompts(Words(), "encoder-decoder", ["5 6", "7"])
    assert ids.tolist() == [[5, 6, 2], [7, 2, 0]] and mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_what_an_encoder_decoder_reads_and_writes():
    batch = encode_texts(Words(), "encoder-decoder", ["5 6", "5"], ["7 8", "7"], 9)
    assert batch["ids"].tolist() == [[5, 6, 2], [5, 2, 0]]
    assert batch["targets"].tolist() == [[7, 8, 2], [7, 2, -100]]
    splits = {split_text("", "a b c d", share / 10) for share in range(10)}
    assert splits == {("a", "b c d"), ("a b", "c d")}  # from the first word to the middle
    assert split_text("a photo of", "a b", 0.0) == ("a photo of", "a b")


def test_a_dialog_stands_in_front_of_the_question():
    assert question_prompt("decoder", "where?", [("what?", "a dog")]) == (
        "Question: what? Answer: a dog Question: where? Answer:")
    assert question_prompt("encoder-decoder", "where?") == "Question: where? Short answer:"
    assert question_prompt("encoder-decoder", "where?", finetuned=True) == (
        "Question: where? Answer:")
