"""12. Predict: nucleus sampling or beam search for synthetic texts? (BLIP sec. 4.3, Table 2)

Write your predictions first. Then run `python -m exercises.check 12`. To measure it yourself (about
an hour on two cores):

    python ablate.py table2 --seeds 5 --jobs 2

Beam search looks for the likeliest caption. Nucleus sampling draws one. Answer "beam", "nucleus"
or "tie".

a   whose synthetic texts are more often true?
b   of whose synthetic texts does the filter drop more?
c   in the paper: with whose texts does the new model get better?
d   in the picture world with five seeds: with whose texts does it get better? A tie is a
    difference that could well be chance (p above 0.05).
"""

PREDICTIONS = {"a": ..., "b": ..., "c": ..., "d": ...}

HINT = """A likely caption is a safe one. But what does a model learn from a text that it would
have written itself?"""
