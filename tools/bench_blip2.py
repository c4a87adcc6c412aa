"""What BLIP-2's second stage costs beside its frozen models, and beside the transformers library.

    python -m tools.bench blip2     seconds of a training step and of captioning; with the
                                    transformers library's Blip2 of equal sizes and weights, where
                                    it is installed
"""

import torch

from blip2.stage2 import Stage2, Stage2Config
from blip2.weights import to_transformers
from losses import lm_loss
from tools.timing import fastest
from training.precision import speed_up_generation

# A ViT of EVA's form, BERT-base as Q-Former, OPT-125M: what a laptop can hold.
VISION = dict(vit_width=384, vit_depth=12, vit_heads=6, vit_ffn=1536, image_size=224)
LANGUAGE = dict(kind="decoder", width=768, depth=12, heads=12, ffn=3072, dropout=0.0)
BATCH, BEAMS, WRITTEN, PROMPT = 4, 5, 20, 4
IMAGE_TOKEN = 50271  # a row of OPT's embeddings that no text uses


def make_model() -> Stage2:
    """Random weights; the end token is made improbable, so that all texts are equally long."""
    torch.manual_seed(0)
    config = Stage2Config(**VISION, dropout=0.0, language=LANGUAGE)
    model = Stage2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    return model


def step_seconds(model: Stage2) -> dict[str, float]:
    """A training step, and the same work of the frozen models alone.

    The language model's own share is its forward pass, and the backward pass down to the soft
    tokens, which nobody can spare.
    """
    image = torch.randn(BATCH, 3, 224, 224)
    ids = torch.randint(5, 50000, (BATCH, PROMPT + WRITTEN))
    mask = torch.ones_like(ids)
    targets = ids.clone()
    targets[:, :PROMPT] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step():
        losses, _ = model(image, ids, mask, targets)
        losses["lm"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def frozen():
        with torch.no_grad():
            model.vit(image)
        soft = torch.randn(BATCH, model.config.queries, model.language.width, requires_grad=True)
        lm_loss(model.logits(soft, ids, mask, targets), targets, 0.0).backward()

    model.train()
    seconds = {"step": fastest(step), "frozen models alone": fastest(frozen)}
    model.eval()
    return seconds | {"share outside": 1 - seconds["frozen models alone"] / seconds["step"]}


def writing_seconds(model: Stage2) -> dict[str, float]:
    """Captions of BATCH images by beam search, and what they are written with."""
    image = torch.randn(BATCH, 3, 224, 224)
    prompt = torch.randint(5, 50000, (BATCH, PROMPT))
    mask = torch.ones_like(prompt)
    written = {}

    def ours():
        written["ours"] = model.generate(image, prompt, mask, beams=BEAMS, min_length=WRITTEN + 1,
                                         max_length=WRITTEN + 1)
    seconds = {"captions, ours": fastest(ours)}
    library = transformers_model(model)
    if library is None:
        return seconds
    placeholders = torch.full((BATCH, model.config.queries), IMAGE_TOKEN)

    def theirs():
        with torch.no_grad():
            written["theirs"] = library.generate(
                pixel_values=image, input_ids=torch.cat([placeholders, prompt], 1),
                attention_mask=torch.ones(BATCH, placeholders.shape[1] + PROMPT, dtype=torch.long),
                num_beams=BEAMS, min_new_tokens=WRITTEN, max_new_tokens=WRITTEN, do_sample=False)
    seconds["captions, transformers"] = fastest(theirs)
    same = [hypotheses[0][0][:WRITTEN] == row[-WRITTEN:] for hypotheses, row
            in zip(written["ours"], written["theirs"].tolist())]
    ratio = seconds["captions, transformers"] / seconds["captions, ours"]
    return seconds | {"times as fast": ratio,
                      "equal texts": f"{sum(same)} of {BATCH}"}


def transformers_model(model: Stage2):
    """Blip2ForConditionalGeneration with the model's weights; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    vision = transformers.Blip2VisionConfig(
        hidden_size=VISION["vit_width"], intermediate_size=VISION["vit_ffn"],
        num_hidden_layers=VISION["vit_depth"], num_attention_heads=VISION["vit_heads"],
        image_size=224, patch_size=14, layer_norm_eps=1e-6, qkv_bias=True)
    qformer = transformers.Blip2QFormerConfig(
        encoder_hidden_size=VISION["vit_width"], hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)
    text = transformers.OPTConfig(
        hidden_size=768, word_embed_proj_dim=768, num_hidden_layers=12, ffn_dim=3072,
        num_attention_heads=12, vocab_size=50272, dropout=0.0)
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=32,
        image_token_index=IMAGE_TOKEN)
    library = transformers.Blip2ForConditionalGeneration(config).eval()
    state = library.state_dict()
    mine = {name: value for name, value in to_transformers(model).items() if name in state}
    library.load_state_dict(mine, strict=False)
    return library


def blip2_seconds() -> dict[str, float | str]:
    """All of it, rounded."""
    model = make_model()
    seconds = step_seconds(model) | writing_seconds(speed_up_generation(model))
    return {name: round(value, 3) if isinstance(value, float) else value
            for name, value in seconds.items()}
