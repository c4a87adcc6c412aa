"""11. Predict: what is lost when one objective is switched off? (BLIP sec. 3.2)

Write your predictions first. Then run `python -m exercises.check 11`. To measure it yourself, in
the picture world (about 20 minutes on two cores):

    python ablate.py losses --seeds 1 --jobs 2

With all three objectives the model has, in percent: text-to-image R@1 of 1,000 by ITC 94 (chance
0.1); ITM prefers the true text to one with a word swapped 96 (chance 50); captions wholly true 96.
A number counts as right within 10 points.

a   without ITC: text-to-image R@1?
b   without ITM: how often does ITM prefer the true text?
c   without LM: captions wholly true?
d   without ITC: does ITM get "worse" or "better", or does it stay the "same"? (Think of where its
    negatives come from.)
"""

PREDICTIONS = {"a": ..., "b": ..., "c": ..., "d": ...}

HINT = """A head that no loss reaches stays as random as it was made. And exercise 3: which
similarities choose ITM's negatives?"""
