"""BLIP-2, stage 2: a frozen language model reads what the queries extracted (sec. 3.2, Fig. 3).

    image -> image encoder (frozen) -> Q queries -> one linear layer -> Q soft tokens
    decoder:          [soft tokens ; text]  every text token is predicted from what is before it
    encoder-decoder:  [soft tokens ; prefix] -> encoder -> decoder -> suffix

The soft tokens have the width of word embeddings and stand for no word. Trained are the Q-Former's
query side, ln_vision and the linear layer, by the language model's loss alone. What is frozen gets
no gradient and no optimizer state, and stays in evaluation mode. But the gradient flows through the
language model to the soft tokens: so it does not run under no_grad. The image encoder does, because
nothing that is trained stands before it.
NOTE(differs from salesforce/LAVIS): there the frozen language model's dropout is on in training.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from blip2.config import Blip2Config
from blip2.language import LanguageConfig, make_language
from blip2.stage1 import FrozenVision, init_qformer_weights, make_qformer
from blip2.writing import logits_of_targets, write_behind
from config import SettingError, setting
from decoding import Hypothesis
from losses import lm_loss


@dataclass(frozen=True)
class Stage2Config(Blip2Config):
    """A BLIP-2 with a language model."""

    question_to_queries: bool = setting(False, "the Q-Former reads the question too (VQA "
                                               "finetuning, BLIP-2 sec. 4.3)", flag=False)
    split_captions: bool = setting(True, "an encoder-decoder reads the first part of a caption and "
                                         "writes the rest (BLIP-2 sec. 3.2); false: it writes all")
    soft_scale: float = setting(1.0, "in front of an encoder-decoder the soft tokens start this "
                                     "many times as large (paper: 1)", above=0)
    language_model: str = setting("", "a checkpoint of `train.py language-model` (.pt), or a name "
                                      "or folder of the transformers library")
    new_layers: int = setting(0, "this many last layers of the Q-Former are not taken from stage 1 "
                                 "(paper: 0)", least=0)
    text_from: str = setting("", "the blip2-stage1 checkpoint whose text stream reads the question "
                                 "(blip2-vqa; default: the one that --init started from)")
    # LanguageConfig's fields, of a language model of this project; else a name or folder of
    # the transformers library under "name".
    language: dict = field(default_factory=dict, metadata={"flag": False})

    def __post_init__(self):
        super().__post_init__()
        if self.new_layers > self.depth:
            raise SettingError(f"--new-layers {self.new_layers} is more than the Q-Former's "
                               f"{self.depth} layers; give a smaller one")

    @property
    def text_positions(self) -> float:
        """How many tokens a text may have: what the queries leave of a decoder's positions.

        Where the Q-Former reads questions, its own positions count as well.
        """
        most = math.inf
        if self.language.get("kind") == "decoder" and "max_positions" in self.language:
            most = self.language["max_positions"] - self.queries
        return min(most, self.max_positions) if self.question_to_queries else most


class Stage2(FrozenVision):
    """Image encoder (frozen), ln_vision, Q-Former, a linear layer, language model (frozen)."""

    def __init__(self, config: Stage2Config, language: nn.Module | None = None):
        """language: None makes the one that config.language describes, with new weights."""
        super().__init__(config)
        self.qformer = make_qformer(config, text=config.question_to_queries)
        if language is None and "name" in config.language:
            from blip2.transformers_language import LibraryModel  # optional
            language = LibraryModel(config.language)
        elif language is None:
            language = make_language(LanguageConfig(**config.language))
        self.proj = nn.Linear(config.width, language.width)
        init_qformer_weights(self, config)
        self.language = language.requires_grad_(False)
        if not self.is_decoder:
            # T5's encoder adds to its tokens and never normalises the sum. Large soft tokens pass
            # through it almost unchanged, and the decoder reads what the Q-Former made.
            self.proj.weight.data.mul_(config.soft_scale)
        if config.question_to_queries:  # no text is written, and no text's state is read at the end
            self.qformer.lm_head.requires_grad_(False)
            self.qformer.layers[-1].ffn_text.requires_grad_(False)

    def train(self, mode: bool = True) -> "Stage2":
        """Training mode, except for what is frozen."""
        super().train(mode)
        self.language.eval()
        return self

    def pretrained_name(self, name: str) -> str:
        """Parameter -> its name in the model that it starts from; "": it starts afresh.

        Afresh start the linear layer, the language model (task_stage2.initialise copies it) and the
        `new_layers`; stage 1's heads and text stream have no place here. Stage 1 makes the queries
        of a picture alike: ITC needs only the best of them. A small model unlearns that slowly
        (results/blip2_tried.md).
        """
        config = self.config
        new = [f"qformer.layers.{layer}."
               for layer in range(config.depth - config.new_layers, config.depth)]
        return "" if name.startswith(("proj.", "language.", *new)) else name

    @property
    def is_decoder(self) -> bool:
        """Whether the language model is a decoder; else it is an encoder-decoder."""
        return self.language.config.kind == "decoder"

    def soft_tokens(self, image: Tensor, question_ids: Tensor | None = None,
                    question_mask: Tensor | None = None) -> Tensor:
        """What the language model gets to see: (B, Q, language width).

        image (B, 3, S, S), or tokens (B, N, vit width) of the image encoder. With question_ids,
        question_mask (B, L) the queries see the question as well as the image.
        """
        kv = self.qformer.project(self.encode_tokens(image))
        if question_ids is None:
            states, _ = self.qformer.encode_queries(kv)
        elif not self.config.question_to_queries or question_mask is None:
            raise ValueError("question_ids need question_mask, and a model whose Q-Former reads "
                             "text: Stage2Config(question_to_queries=True)")
        else:
            states = self.qformer.encode_both(question_ids, question_mask, kv, queries_only=True)
        return self.proj(states)

    def with_soft(self, soft: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Soft tokens in front of a text: embeddings (B, Q + L, D), mask (B, Q + L).

        ids, mask (B, L), or (1, L): the same text for all.
        """
        ids, mask = ids.expand(len(soft), -1), mask.expand(len(soft), -1)
        words = self.language.embed(ids)
        embeds = torch.cat([soft.to(words.dtype), words], 1)
        return embeds, torch.cat([mask.new_ones(soft.shape[:2]), mask], 1)

    def logits(self, soft: Tensor, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Next-token logits that belong to the targets.

        soft (B, Q, D). Decoder: ids, mask (B, L) of one text -> (B, L, V): the first row comes from
        the last soft token; the targets are the ids, and are not read. Encoder-decoder: ids, mask
        (B, L) are read, targets (B, T) written -> (B, T, V).
        """
        embeds, mask = self.with_soft(soft, ids, mask)
        if self.is_decoder:
            states, _ = self.language(embeds, mask)
            return self.language.logits(states[:, soft.shape[1] - 1:-1])
        return logits_of_targets(self.language, embeds, mask, targets)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, targets: Tensor,
                question_ids: Tensor | None = None,
                question_mask: Tensor | None = None) -> tuple[dict[str, Tensor], dict]:
        """{"lm": the language model's loss}: mean over the targets, in nats, not smoothed.

        ids, mask, targets as in `logits`; targets are -100 where there is no loss.
        """
        soft = self.soft_tokens(image, question_ids, question_mask)
        return {"lm": lm_loss(self.logits(soft, ids, mask, targets), targets, 0.0)}, {}

    @torch.no_grad()
    def generate(self, image: Tensor, ids: Tensor, mask: Tensor, method: str = "beam",
                 num_return: int = 1, question_ids: Tensor | None = None,
                 question_mask: Tensor | None = None,
                 **options) -> list[list[Hypothesis]]:
        """Texts behind a prompt: for each image `num_return` pairs (ids, score), best first.

        ids, mask (B, L): the prompts, padded in front for a decoder. Options are those of
        decoding.write; lengths count one token more than what is written, and a score is the sum
        of log-probabilities / n ** length_penalty, n tokens with the closing one (Hypotheses that
        reach max_length: n + 1, as the released code's library has it). Raises ValueError where a
        decoder's prompts are padded behind.
        """
        if self.is_decoder and not mask[:, -1].all():
            raise ValueError("a decoder's prompts must be padded in front: texts.encode_prompts "
                             "does so")
        soft = self.soft_tokens(image, question_ids, question_mask)
        embeds, mask = self.with_soft(soft, ids, mask)
        return write_behind(self.language, embeds, mask, method, num_return, **options)
