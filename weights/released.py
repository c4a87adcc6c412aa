"""Released BLIP models in and out.

    load_released(path)   a released pretraining, retrieval, ITM, caption, VQA or NLVR2 model, with
                          the released or transformers' key names -> (model, report)
    export(model, kind)   -> state dict with the released key names
"""

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from blip import BLIP
from config import SIZES, BLIPConfig, TrainConfig
from data.files import InputError
from data.text import Tokenizer
from tasks.registry import make_model, preset_settings
from weights.files import fill, shorten, state_dict_of
from weights.names import names_of, pretrain_names
from weights.transformers_library import from_transformers

KNOWN_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}  # of a ViT (DeiT) or BERT of this width


@dataclass
class Report:
    """What a foreign state dict lacked, what of it was not used, what it was trained for.

    missing: our names, left_over: its names.
    """

    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    kind: str = "pretrain"  # pretrain, retrieval (also ITM), caption, vqa or nlvr2
    preset: str = "base"  # or large
    notes: list[str] = field(default_factory=list)  # what was taken for granted

    def settings(self) -> dict:
        """Its training's settings, as far as the paper tells them: TrainConfig's fields."""
        own = preset_settings(self.kind, self.preset)
        return asdict(TrainConfig(**own, task=self.kind, preset=self.preset))

    def __str__(self) -> str:
        lines = list(self.notes)
        if self.missing:
            lines.append(f"missing, left at their initial values: {shorten(self.missing)}")
        if self.left_over:
            lines.append(f"left over, not used: {shorten(self.left_over)}")
        return "\n".join(lines) or "every weight found its place"


def kind_of(weights: dict[str, Tensor]) -> str:
    """What a released model was trained for."""
    encodes = "text_encoder.embeddings.word_embeddings.weight" in weights
    if "cls_head.0.weight" in weights:
        return "nlvr2"
    if "text_decoder.cls.predictions.bias" not in weights:
        return "retrieval"
    if not encodes:
        return "caption"
    return "pretrain" if "vision_proj.weight" in weights else "vqa"


def infer_config(weights: dict[str, Tensor], path, vit_heads: int | None,
                 text_heads: int | None) -> BLIPConfig:
    """Sizes from the tensors' shapes. Raises InputError for what is no released BLIP model.

    Heads leave no trace there: those of BERT and ViT of that width (KNOWN_HEADS), unless given.
    """
    text = "text_decoder.bert."
    if "text_encoder.embeddings.word_embeddings.weight" in weights:
        text = "text_encoder."

    if any(name.startswith(("Qformer.", "qformer.")) for name in weights):
        raise InputError(f"{path} holds weights of BLIP-2: load them from Python with "
                         "blip2.weights (blip2/README.md)")

    def size(name: str, dim: int) -> int:
        if name not in weights:
            raise InputError(f"{path} lacks {name}: this is not a released BLIP model of a task "
                             "that is known here")
        return weights[name].shape[dim]

    vit_width, vit_depth = size("visual_encoder.cls_token", 2), depth_of(
        weights, "visual_encoder.blocks.")
    vocab_size = size(f"{text}embeddings.word_embeddings.weight", 0)
    text_width = size(f"{text}embeddings.word_embeddings.weight", 1)
    patch_size = size("visual_encoder.patch_embed.proj.weight", 3)
    grid = round((size("visual_encoder.pos_embed", 1) - 1) ** 0.5)
    large = SIZES["large"]
    is_large = (vit_width, vit_depth) == (large["vit_width"], large["vit_depth"])
    return BLIPConfig(
        image_size=grid * patch_size, patch_size=patch_size, vit_width=vit_width,
        vit_depth=vit_depth, vit_heads=heads_of(vit_width, vit_heads, "vit_heads"),
        drop_path=large["drop_path"] if is_large else 0.0, text_width=text_width,
        text_depth=depth_of(weights, f"{text}encoder.layer."),
        text_heads=heads_of(text_width, text_heads, "text_heads"),
        text_ffn=size(f"{text}encoder.layer.0.intermediate.dense.weight", 0),
        max_positions=size(f"{text}embeddings.position_embeddings.weight", 0),
        embed_dim=size("vision_proj.weight", 0) if "vision_proj.weight" in weights else 256,
        queue_size=size("image_queue", 1) if "image_queue" in weights else 57600,
        vocab_size=vocab_size, dec_id=vocab_size - 2, enc_id=vocab_size - 1)


def depth_of(weights: dict[str, Tensor], prefix: str) -> int:
    """How many layers PREFIX0., PREFIX1., ... there are."""
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in weights
               if name.startswith(prefix)]
    return 1 + max(numbers, default=-1)


def first_merging_layer(weights: dict[str, Tensor], depth: int) -> int:
    """The first layer of a released NLVR2 model that merges two images; `depth` if none does."""
    merging = [int(re.search(r"layer\.(\d+)\.", name)[1]) for name in weights
               if name.endswith("merge_layer.weight")]
    return min(merging, default=depth)


def heads_of(width: int, given: int | None, flag: str) -> int:
    """The number of heads that was given or is known. Raises InputError where it cannot be."""
    if given is None and width not in KNOWN_HEADS:
        raise InputError(f"how many attention heads a model of width {width} has cannot be told "
                         f"from its weights; give {flag}, on the command line "
                         f"--{flag.replace('_', '-')}")
    if given is not None and width % given:
        raise InputError(f"{flag} {given} does not divide the model's width {width}")
    return given or KNOWN_HEADS[width]


def load_released(path: str | Path, image_size: int | None = None, vit_heads: int | None = None,
                  text_heads: int | None = None,
                  tokenizer: Tokenizer | None = None) -> tuple[nn.Module, Report]:
    """A released BLIP model, or one with transformers' key names -> model, report.

    The model is in eval mode. Positions are resized when `image_size` (pixels) differs from the
    stored grid. The special ids are BERT's unless a tokenizer is given. Raises InputError where the
    file or a size does not fit.
    """
    weights = {from_transformers(name): value for name, value in state_dict_of(str(path)).items()}
    config = infer_config(weights, path, vit_heads, text_heads)
    if image_size is not None:
        config = replace(config, image_size=image_size)
    if tokenizer is not None:
        if len(tokenizer.vocab) != config.vocab_size:
            raise InputError(f"the vocabulary has {len(tokenizer.vocab)} tokens with [DEC] and "
                             f"[ENC], the word embeddings of {path} have {config.vocab_size}; give "
                             "the vocab.txt that it was trained with")
        config = replace(config, **tokenizer.config())
    kind = kind_of(weights)
    if kind == "nlvr2":
        config = replace(config, merge_from=first_merging_layer(weights, config.text_depth))
    model = make_model(kind, config)
    filled, used = fill(model, weights, names_of(kind, config), path)
    if isinstance(model, BLIP):
        fill_twins(model, weights, filled, used)
    # Stored a second time, or constant: not information.
    redundant = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    left_over = [name for name in weights if name not in used and not name.endswith(redundant)]
    missing = [name for name, p in model.named_parameters() if p.data_ptr() not in filled]
    notes = []
    if tokenizer is None and config.vocab_size != BLIPConfig.vocab_size:
        notes = [f"no tokenizer given: [PAD] {config.pad_id}, [CLS] {config.cls_id}, [SEP] "
                 f"{config.sep_id} as in BERT, though the vocabulary is another"]
    preset = "large" if config.drop_path else "base"
    return model.eval(), Report(missing, left_over, kind, preset, notes)


def fill_twins(model: BLIP, weights: dict[str, Tensor], filled: set, used: set) -> None:
    """Momentum twins and queues, as far as they are there; `filled` and `used` are added to."""
    if not any(name.startswith("visual_encoder_m.") for name in weights):
        model.update_momentum(0.0)  # no twins there: they start equal
        filled |= {p.data_ptr() for _, p in model.twin_parameters}
    for name, queue in (("image_queue", model.image_queue), ("text_queue", model.text_queue)):
        if name in weights:
            queue.copy_(weights[name].T)
            used.add(name)
    for name, buffer in (("idx_queue", model.queue_ids), ("queue_ptr", model.queue_ptr),
                         ("ptr_queue", model.queue_ptr)):
        if name in weights:
            buffer.copy_(weights[name].reshape(buffer.shape))
            used.add(name)


def export(model: BLIP, kind: str = "pretrain") -> dict[str, Tensor]:
    """State dict with the released key names.

    kind "caption" holds ViT and decoder, "retrieval" ViT, text encoder, projections and ITM head,
    "pretrain" all of it with twins and queues. Raises InputError for a model with other parts.
    """
    parts = {"caption": ("visual_encoder.", "text_decoder."),
             "retrieval": ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.",
                           "itm_head.")}.get(kind, ("",))
    ours, released = model.state_dict(), {}
    for name, sources in pretrain_names(model.config):
        if sources[0].startswith(parts):
            if name not in ours:
                raise InputError(f"the model has no {name}, which a released BLIP has; only one "
                                 "with this project's ViT and MED can be exported")
            for source, value in zip(sources, split_rows(ours[name], len(sources))):
                released[source] = value.clone()
    if kind != "retrieval":
        head, words = "text_decoder.cls.predictions.decoder", model.med.embeddings_dec.word.weight
        released |= {f"{head}.weight": words.detach().clone(),
                     f"{head}.bias": ours["med.lm_head.bias"]}
    if kind == "pretrain":
        released |= {"image_queue": ours["image_queue"].T.clone(),
                     "text_queue": ours["text_queue"].T.clone(),
                     "queue_ptr": ours["queue_ptr"][None]}
    return released


def split_rows(value: Tensor, parts: int) -> list[Tensor]:
    """Equal parts along dim 0; the value itself for one part (it may be a scalar)."""
    return [value] if parts == 1 else list(value.chunk(parts))
