# %% [markdown]
"""A tour of BLIP: what each part computes, in shapes and numbers.

    python -m exercises.tour [CHECKPOINT]      default: runs/pretrain/checkpoint.pt

The same cells are in exercises/tour.ipynb. Without a checkpoint the tour trains a small model first
(python train.py makes a good one in minutes). Read the paper's section beside each cell.
"""

# %% From the project's root
import os
import sys
from pathlib import Path

if not Path("blip.py").exists():  # a notebook starts in its own folder
    os.chdir("..")
sys.path.insert(0, os.getcwd())

# %% A trained model, and eight scenes of the picture world with their captions
import torch

import train
from data.images import prepare_images
from data.text import clean_caption
from losses import itc_loss, mine_hard_negatives
from training import checkpoints
from world.datasets import World

given = [argument for argument in sys.argv[1:] if argument.endswith(".pt")]
PATH = given[0] if given else "runs/pretrain/checkpoint.pt"
if given and not Path(PATH).exists():
    sys.exit(f"{PATH} does not exist; give another checkpoint, or none")
if not Path(PATH).exists():
    PATH = "runs/tour/checkpoint.pt"
    if not Path("runs/tour/metrics.json").exists():  # it is the last that a run writes
        train.train_into(Path("runs/tour"), {"scenes": 9600, "lm_only_steps": 100,
                                             "eval_size": 100})
trained = checkpoints.open_model(PATH, to_train=True)  # with the momentum twins and the queues
model, tokenizer = trained.model.eval(), trained.tokenizer
torch.manual_seed(0)
torch.set_grad_enabled(False)

world = World("held-out", 8, trained.image_size)
image = prepare_images(torch.stack([world.picture(i) for i in range(8)]), torch.device("cpu"))
texts = [clean_caption(world.references(i, 1)[0]) for i in range(8)]
ids, mask = tokenizer.encode(texts, 40)
print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters are trained")
for text in texts[:3]:
    print(f"  {text}")

# %% The ViT (sec. 3.1): patches of an image become tokens, [CLS] first
tokens, image_feat = model.encode_image(image)
print(f"image {tuple(image.shape)} -> tokens {tuple(tokens.shape)}")
print(f"[CLS], projected and of length 1: {tuple(image_feat.shape)}, what ITC compares")

# %% MED, first mode (sec. 3.1, Fig. 2): a text by itself, for ITC
text_feat = model.encode_text(ids, mask)
print(f"ids {tuple(ids.shape)}, mask {tuple(mask.shape)} -> features {tuple(text_feat.shape)}")
similarity = image_feat @ text_feat.T
print(f"temperature {model.temp.item():.3f}; cosine of each image (row) with each text, times 100:")
print((100 * similarity).round().int().numpy())
print(f"own text is nearest in {(similarity.argmax(1) == torch.arange(8)).sum()} of 8 images")

# %% MED, second mode: the text looks at the image, for ITM
kv = model.project(tokens)  # keys and values, once an image
matched = model.match(kv, ids, mask).softmax(-1)[:, 1]
wrong = model.match(kv, ids.roll(1, 0), mask.roll(1, 0)).softmax(-1)[:, 1]
print("probability that the pair matches, own texts:  ", matched.numpy().round(2))
print("the same images with their neighbours' texts:  ", wrong.numpy().round(2))

# %% MED, third mode: the text is written word by word, for LM. A token sees those before it
print(torch.ones(5, 5, dtype=torch.int).tril().numpy())
states, _ = model.med.decode(ids[:, :-1], mask[:, :-1], kv)
next_word = model.med.logits(states).softmax(-1)
print(f"states {tuple(states.shape)} -> next-token logits over {next_word.shape[-1]} pieces")
for place in range(4):
    best = next_word[0, place].topk(3)
    guesses = [f"{tokenizer.decode([i])} {p:.2f}" for p, i in zip(best.values, best.indices)]
    print(f"  after {tokenizer.decode(ids[0, 1:1 + place])!r}: {', '.join(guesses)}")

# %% ITC's targets (sec. 3.2): the momentum twins soften the truth with alpha
twin_image = torch.nn.functional.normalize(model.vision_proj_m(model.vit_m(image)[:, 0]), dim=-1)
twin_text = torch.nn.functional.normalize(
    model.text_proj_m(model.med_m.encode_text(ids, mask, cls_only=True)[:, 0]), dim=-1)
image_keys = torch.cat([twin_image, model.image_queue])
text_keys = torch.cat([twin_text, model.text_queue])
belief = (twin_image @ text_keys.T / model.temp).softmax(1)
for alpha in (0.0, 0.4):
    share = 1 - alpha + alpha * belief[0, 0]
    loss = itc_loss(image_feat, text_feat, image_keys, text_keys, model.temp, alpha)
    print(f"alpha {alpha}: the true text of image 0 has {share:.3f} of the target; ITC {loss:.3f}")
print(f"columns: 8 of the batch and {len(model.text_queue)} of the queue; chance is ln of that")

# %% Hard negatives (sec. 3.2): ITM's wrong texts are drawn by ITC's similarity
positives = torch.eye(8, dtype=torch.bool)
drawn, _ = mine_hard_negatives(similarity / model.temp, positives, model.config.negative_floor,
                               model.config.mask_positives)
for i in range(3):
    print(f"own:   {texts[i]}\nwrong: {texts[drawn[i]]} (cosine {similarity[i, drawn[i]]:.2f})")

# %% Generation (sec. 4.3): beam search says the likeliest, nucleus sampling varies
beam = model.generate(image[:1], method="beam", beams=3, min_length=5, max_length=40)
print("beam:    ", tokenizer.decode(beam[0][0][0]))
for seed in range(3):
    generator = torch.Generator().manual_seed(seed)
    sample = model.generate(image[:1], method="nucleus", top_p=0.9, min_length=5, max_length=40,
                            generator=generator)
    print("nucleus: ", tokenizer.decode(sample[0][0][0]))

# %% Attention: where a word looks
model.med.encode_grounded(ids[:1], mask[:1], model.project(tokens[:1]), attn_maps=(maps := []))
grid = round((tokens.shape[1] - 1) ** 0.5)
weights = maps[-1].mean(1)[0]  # last layer, mean over heads: (L, N)
for place in range(1, min(8, ids.shape[1])):
    row, column = divmod(int(weights[place, 1:].argmax()), grid)
    print(f"  {tokenizer.decode([ids[0, place]]):12} looks most at row {row}, column {column}")

# %% Change a loss, compare: a margin for the true pair in ITC
def itc_with_margin(margin: float) -> float:
    """In-batch ITC, image to text, in which the true text must win by `margin` of cosine."""
    logits = (similarity - margin * torch.eye(8)) / model.temp
    return float(torch.nn.functional.cross_entropy(logits, torch.arange(8)))
for margin in (0.0, 0.1, 0.3):
    print(f"margin {margin}: {itc_with_margin(margin):.3f} nats")
print("To train with it: edit itc_loss in losses.py, run train.py with another --out, then "
      "python -m tools.compare (README, \"Change a loss\").")

print(f"try next: python -m exercises.check 1; python -m tools.look --checkpoint {PATH}; "
      "docs/reading.md")
