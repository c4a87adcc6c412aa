"""The settings of a model and of a training, with the paper's values, and the schedules.

The fields of BLIPConfig and TrainConfig are flags of train.py, with their text as help. Later ones
override earlier ones: the field's default (the paper's pretraining of ViT-B), the task's settings
(its record in tasks/), the preset's, what the command line gives (training/settings.py).
"""

import math
from dataclasses import dataclass, field, fields

OBJECTIVES = ("itc", "itm", "lm")  # of BLIP.forward; each has a weight in TrainConfig
SHARE = ("all_but_sa", "all", "all_but_ca", "none")  # Table 3; the first one is the paper's choice


class SettingError(ValueError):
    """A setting that cannot be. The message is one sentence; programs print it alone."""


def setting(default, about: str = "", least: float | None = None, above: float | None = None,
            most: float | None = None, choices: tuple[str, ...] = (), flag: bool = True,
            in_weights: bool = False):
    """A field of a configuration: its default, its help and what it may be.

    least, above and most bound a number, `choices` lists the texts that are allowed; flag False
    keeps it off the command line; in_weights: a model's weights decide it, so a finetuning cannot
    change it.
    """
    return field(default=default, metadata={"about": about, "least": least, "above": above,
                                            "most": most, "choices": choices, "flag": flag,
                                            "in_weights": in_weights})


MOST = 1e12  # of a number whose field names no other bound


def check_settings(config) -> None:
    """Raise SettingError where fields are outside of what they may be; it names all of them."""
    sentences = []
    for f in fields(config):
        value, rules = getattr(config, f.name), f.metadata
        least, above, most = (rules.get(name) for name in ("least", "above", "most"))
        types = {int: int, float: (int, float), str: str, bool: bool}.get(f.type, object)
        if f.type in (int, float):
            most = MOST if most is None else most
            least = -MOST if least is None and above is None else least
        wrong = ""
        if not isinstance(value, types):
            wrong = f"it must be of type {f.type.__name__}"
        elif rules.get("choices") and value not in rules["choices"]:
            wrong = f"choose one of {', '.join(rules['choices'])}"
        elif isinstance(value, float) and not math.isfinite(value):
            wrong = "give a number"
        elif least is not None and value < least:
            wrong = f"it must be at least {least:g}"
        elif above is not None and value <= above:
            wrong = f"it must be above {above:g}"
        elif most is not None and value > most:
            wrong = f"it must be at most {most:g}"
        if wrong:
            sentences.append(f"--{f.name.replace('_', '-')} is {value!r}; {wrong}")
    if sentences:
        raise SettingError(", and ".join(sentences))


def check_multiples(config, *pairs: tuple[str, str]) -> None:
    """Raise SettingError where the first field of a pair is not a multiple of the second."""
    for whole, part in pairs:
        if getattr(config, whole) % getattr(config, part):
            raise SettingError(
                f"--{whole.replace('_', '-')} {getattr(config, whole)} is not a multiple of "
                f"--{part.replace('_', '-')} {getattr(config, part)}")


def check_lengths(config) -> None:
    """Raise SettingError where no caption can be as long as it must be."""
    if config.min_length > config.max_length:
        raise SettingError(f"--min-length {config.min_length} is more than --max-length "
                           f"{config.max_length}; give a smaller --min-length")


@dataclass(frozen=True)
class BLIPConfig:
    """Architecture and objectives. The defaults are the paper's ViT-B/16 + BERT-base."""

    image_size: int = setting(224, "pixels, square (BLIP sec. 4.1)", least=1, most=8192)
    patch_size: int = setting(16, "pixels", least=1, most=8192, in_weights=True)
    vit_width: int = setting(768, "ViT-B", least=1, most=16384, in_weights=True)
    vit_depth: int = setting(12, "ViT-B", least=1, most=1000, in_weights=True)
    vit_heads: int = setting(12, "ViT-B", least=1, most=16384, in_weights=True)
    drop_path: float = setting(0.0, "of the last ViT block; 0 for B, 0.1 for L", least=0, most=0.99)
    grad_checkpoint: bool = setting(False, "recompute ViT activations in the backward pass: less "
                                           "memory, more time")
    text_width: int = setting(768, "BERT-base", least=1, most=16384, in_weights=True)
    text_depth: int = setting(12, "BERT-base", least=1, most=1000, in_weights=True)
    text_heads: int = setting(12, "BERT-base", least=1, most=16384, in_weights=True)
    text_ffn: int = setting(3072, "BERT-base", least=1, most=65536, in_weights=True)
    max_positions: int = setting(512, "BERT-base", least=4, most=65536, in_weights=True)
    dropout: float = setting(0.1, "in MED; the ViT has none", least=0, most=0.99)
    share: str = setting("all_but_sa", "what encoder and decoder share: all_but_sa, all, "
                         "all_but_ca or none (Table 3)",
                         choices=SHARE, in_weights=True)
    embed_dim: int = setting(256, "joint space of the contrastive loss",
                             least=1, most=16384, in_weights=True)
    queue_size: int = setting(57600, "momentum features as further negatives (released code; "
                                     "ALBEF sec. 3.5: 65,536)", least=0, most=10_000_000)
    momentum: float = setting(0.995, "of the momentum twins (ALBEF sec. 3.5)", least=0, most=1)
    temp: float = setting(0.07, "initial temperature, learned", above=0, in_weights=True)
    temp_min: float = setting(0.001, "released code", above=0)
    temp_max: float = setting(0.5, "released code", above=0)
    label_smoothing: float = setting(0.1, "of the LM loss (BLIP sec. 3.2)", least=0, most=0.99)
    init_std: float = setting(0.02, "of the initial weights (BERT and ViT; released code); 0: by "
                                    "width, for narrow models (blip.init_weights)", least=0)
    merge_from: int = setting(-1, "NLVR2: the first layer that merges what is seen in two images; "
                                  "-1: half of the depth, which is the released 6 at base size",
                              least=-1)
    hard_negatives: bool = setting(True, "ITM's negatives by similarity (ALBEF sec. 3.2); false: "
                                         "at random")
    negative_floor: float = setting(1e-4, "added to each negative's probability of being drawn in "
                                          "pretraining (released code)", least=0)
    # NOTE(differs from salesforce/BLIP): false there, true in the tiny preset.
    mask_positives: bool = setting(False, "ITM's negatives: take the softmax over negatives alone, "
                                          "so that the hardest stay the likeliest")
    vocab_size: int = setting(30524, "BERT uncased + [DEC] + [ENC]", flag=False, in_weights=True)
    pad_id: int = setting(0, "the tokenizer's", flag=False, in_weights=True)
    cls_id: int = setting(101, "the tokenizer's", flag=False, in_weights=True)
    sep_id: int = setting(102, "the tokenizer's", flag=False, in_weights=True)
    dec_id: int = setting(30522, "the tokenizer's", flag=False, in_weights=True)
    enc_id: int = setting(30523, "the tokenizer's", flag=False, in_weights=True)

    def __post_init__(self):
        check_settings(self)
        check_multiples(self, ("vit_width", "vit_heads"), ("text_width", "text_heads"),
                        ("image_size", "patch_size"))


SIZES = {
    "base": {},
    # ViT-L/16 + BERT-base
    "large": dict(vit_width=1024, vit_depth=24, vit_heads=16, drop_path=0.1),
    "tiny": dict(image_size=64, vit_width=128, vit_depth=4, vit_heads=4, text_width=128,
                 text_depth=2, text_heads=4, text_ffn=512, max_positions=64, dropout=0.0,
                 embed_dim=64, queue_size=1024, momentum=0.99, init_std=0.0, label_smoothing=0.0,
                 mask_positives=True, negative_floor=0.0),
}


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. The defaults are the paper's for pretraining ViT-B (BLIP sec. 4.1)."""

    task: str = setting("pretrain", "what is trained: the first word of the command", flag=False)
    init: str = setting("", "checkpoint whose model and tokenizer a finetuning starts from")
    init_vit: str = setting("", "DeiT or timm ViT weights that pretraining starts from (paper: "
                                "ImageNet)")
    init_text: str = setting("", "BERT weights that pretraining starts from; needs --vocab")
    preset: str = setting("tiny", "sizes and recipe: tiny, base or large", choices=tuple(SIZES))
    data: str = setting("", 'json files, tar shards; "a.json,web/*.tar:0.2": a fifth of web an '
                            "epoch")
    val: str = setting("", "json of held-out pairs; a Karpathy file given as --data holds its own")
    val_split: str = setting("test", "of a Karpathy file: test or val judges the result; val alone "
                                     "chooses the best epoch",
                             choices=("val", "test"))
    image_root: str = setting("", "folder that image paths start from; none: the folder of each "
                                  "source")
    vocab: str = setting("", "BERT's vocab.txt; none: train a WordPiece vocabulary, or take "
                             "--init's")
    vocab_pieces: int = setting(30524, "at most this many pieces when the vocabulary is trained",
                                least=100, most=1_000_000)
    new_pieces: int = setting(0, "at most this many pieces are added to --init's vocabulary where "
                                 "it spells words of --data by letters", least=0, most=1_000_000)
    out: str = setting("runs/pretrain", "folder of the run")
    seed: int = setting(0, "of weights, data order, augmentation and dropout", least=0)
    epochs: int = setting(20, "passes over the data", least=1, most=1_000_000)
    min_steps: int = setting(0, "on own data: at least this many steps; epochs are added until "
                                "there are", least=0)
    batch_size: int = setting(2880, "pairs a step, over all processes and micro-batches", least=1)
    accumulate: int = setting(1, "micro-batches that a process adds up in a step: less memory",
                              least=1)
    lr: float = setting(3e-4, "peak learning rate", above=0)
    min_lr: float = setting(1e-6, "where the decay ends (released code)", least=0)
    schedule: str = setting("step", "step: x lr_decay an epoch; cosine; epoch_cosine: constant in "
                                    "an epoch", choices=("step", "cosine", "epoch_cosine"))
    lr_decay: float = setting(0.85, "per epoch, for schedule step (paper; the released yaml has "
                                    "0.9)", above=0, most=1)
    warmup_steps: int = setting(3000, "linear warm-up (released code)", least=0)
    warmup_lr: float = setting(1e-6, "where the warm-up starts (released code)", least=0)
    weight_decay: float = setting(0.05, "AdamW; not on biases, LayerNorms, temperature", least=0)
    beta2: float = setting(0.999, "AdamW", least=0, most=0.999999)
    grad_clip: float = setting(0.0, "largest gradient norm; 0 does not clip", least=0)
    alpha: float = setting(0.4, "weight of the momentum twins' soft targets (ALBEF eq. 6)", least=0,
                           most=1)
    alpha_epochs: float = setting(2.0, "alpha ramps up linearly over this many epochs", least=0)
    itc_weight: float = setting(1.0, "of the loss; 0 switches it off", least=0)
    itm_weight: float = setting(1.0, "of the loss; 0 switches it off", least=0)
    lm_weight: float = setting(1.0, "of the loss; 0 switches it off", least=0)
    all_negatives: bool = setting(False, "ITM's negatives from all processes in finetuning (paper: "
                                         "COCO)")
    answers: str = setting("", "json list of the answers that VQA ranks, as the released "
                               "answer_list.json; none: the commonest training answers")
    prompt: str = setting("", "words before each caption, which give no loss")
    lm_only_steps: int = setting(0, "steps of LM alone first (warm start for tiny models; not in "
                                    "the paper)", least=0)
    itm_from: int = setting(0, "step at which ITM joins (a tiny BLIP-2: its negatives need an ITC "
                               "that knows something; not in the papers)", least=0)
    augment: bool = setting(True, "random crop, flip, RandAugment on photographs; the world has "
                                  "none")
    rand_augment: bool = setting(True, "false: of these crop and flip alone (BLIP-2 sec. 3.4)")
    # NOTE(differs from salesforce/BLIP): there they are negatives like all others.
    equal_texts: bool = setting(False, "pretraining: pairs with the same caption are no negatives "
                                       "of one another (for texts that are labels)")
    # NOTE(differs from salesforce/BLIP): there every picture is mirrored half of the time.
    flip: str = setting("safe", "mirror half of the pictures: safe (not where a text says left or "
                                "right), always, never", choices=("safe", "always", "never"))
    crop_min: float = setting(0.2, "smallest share of the area in a random crop", above=0, most=1)
    max_words: int = setting(30, "a longer text is cut to this many words (released code)", least=1)
    max_tokens: int = setting(30, "and to this many tokens, [CLS] and [SEP] included", least=3)
    scenes: int = setting(60000, "train scenes in the picture world", least=1,
                          most=100_000_000)
    noise: float = setting(0.0, "share of bad texts in the picture world (web style)", least=0,
                           most=1)
    max_broken: float = setting(0.1, "stop when more than this share of images cannot be read",
                                least=0, most=1)
    workers: int = setting(4, "processes that load photographs", least=0, most=1024)
    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu")
    precision: str = setting("auto", "auto, bf16, fp16 or fp32; auto is bf16 on GPUs since Ampere "
                                     "and on a CPU with AMX, fp16 on older GPUs",
                             choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = setting(False, "torch.compile the layers, on a CPU those of the ViT alone; "
                                   "takes minutes at the start")
    log_every: int = setting(20, "steps", least=1)
    save_every: int = setting(500, "steps between checkpoints", least=1)
    save_minutes: float = setting(10.0, "a checkpoint at least so often", least=0)
    keep: int = setting(1, "the newest checkpoints that are kept", least=1)
    eval_size: int = setting(1000, "held-out items", least=1)
    eval_top_k: int = setting(16, "candidates that ITM re-ranks; 0 does not re-rank", least=0)
    rerank_score: str = setting(
        "released", "released: ITC cosine + ITM's matched logit; posterior: ITC cosine / "
        "temperature + ITM's log-odds", choices=("released", "posterior"))
    min_length: int = setting(5, "tokens of a caption that evaluation generates, [DEC] and prompt "
                                 "included", least=1)
    max_length: int = setting(20, "tokens of a caption that evaluation generates, [DEC] and prompt "
                                  "included", least=2)

    def __post_init__(self):
        check_settings(self)
        weights = [value for name, value in vars(self).items() if name.endswith("_weight")]
        if not any(weights):  # a loss of one's own may have a weight here as well
            raise SettingError("all losses are switched off; give one of them a weight above 0")

    def objective_weights(self) -> dict[str, float]:
        """Objective -> weight of its loss; the paper's are 1."""
        return {name: getattr(self, f"{name}_weight") for name in OBJECTIVES}


@dataclass(frozen=True)
class CapFiltConfig:
    """What CapFilt's set depends on, apart from the models and how they generate (sec. 3.3)."""

    captions: int = setting(1, "synthetic captions that each captioner writes for an image (paper: "
                               "1)", least=1, most=100)
    keep: str = setting("all", "of an image's accepted synthetic captions: all, best (by ITM) or "
                               "sample", choices=("all", "best", "sample"))
    agree: str = setting("mean", "of several filters, what must reach the threshold: their mean, "
                                 "or all", choices=("mean", "all"))
    threshold: float = setting(0.5, "ITM probability that makes a text a match (paper: the head's "
                                    "decision)", least=0, most=1)
    shard_size: int = setting(1000, "web texts in a shard, which is what an interruption costs at "
                                    "most", least=1)
    batch_size: int = setting(32, "images at a time", least=1)
    precision: str = setting("fp32", "of matrix products", flag=False)

    def __post_init__(self):
        check_settings(self)


# ---- schedules: functions of the step alone, so that a run can start anywhere --------------------

def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    least = min(config.min_lr, config.lr)
    if config.schedule == "step":
        return max(least, config.lr * config.lr_decay ** (step // steps_per_epoch))
    if config.schedule == "epoch_cosine":
        step = step // steps_per_epoch * steps_per_epoch
    progress = step / (config.epochs * steps_per_epoch)
    return least + (config.lr - least) * (1 + math.cos(math.pi * progress)) / 2


def alpha_at(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Weight of the soft targets: 0 -> alpha over alpha_epochs from the first step with ITC."""
    ramp = config.alpha_epochs * steps_per_epoch
    if not ramp:
        return config.alpha
    return config.alpha * min(1.0, max(0, step - lm_alone_until(config)) / ramp)


def lm_alone_until(config: TrainConfig) -> int:
    """The first step that is not of LM alone."""
    return config.lm_only_steps if config.lm_weight else 0


def objectives_at(config: TrainConfig, step: int) -> tuple[str, ...]:
    """The losses that are on in a step."""
    active = tuple(name for name, weight in config.objective_weights().items() if weight)
    if step < lm_alone_until(config):
        return ("lm",)
    if step < config.itm_from:
        active = tuple(name for name in active if name != "itm") or active
    return active
