"""11. Predict: what is lost when one objective is switched off? (BLIP sec. 3.2)

Write your predictions first. Then run `python -m exercises.check 11`. To measure it yourself, in
the picture world (about 20 minutes on two cores):

    python ablate.py losses --seeds 1 --jobs 2

With all three objectives the model has, in percent: R@1 of 1,000 by ITC 95 text-to-image and 91
image-to-text (chance 0.1); ITM prefers the true text to one with a word swapped 96 (chance 50);
captions wholly true 96. A number counts as right within 10 points. A word is about the mean of five
seeds, whether or not a test calls the difference a tie.

a   without ITM: how often does ITM prefer the true text?
b   without LM: does image-to-text R@1 by ITC get "worse" or "better", or does it stay the "same"?
c   without ITC: do the captions get "worse" or "better", or do they stay the "same"?
d   without ITC: does ITM get "worse" or "better", or does it stay the "same"?
"""

PREDICTIONS = {"a": ..., "b": ..., "c": ..., "d": ...}

HINT = """A head that no loss reaches stays as random as it was made. All objectives train the same
ViT: which of them teach it what another one needs?"""
