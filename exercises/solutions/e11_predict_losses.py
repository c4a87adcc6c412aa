"""11. The measured values: results/losses.md and results/losses-all-without_LM.md."""

PREDICTIONS = {"a": 50.0, "b": "worse", "c": "better", "d": "worse"}

WHY = {
    "a": "The ITM head is never trained, so it chooses between the two texts at random.",
    "b": "Worse in each of five seeds, by 6 to 43 points (90.5 to 72.3 in the mean, p 0.0502), "
         "though ITC is trained as before: LM teaches the ViT too. By the test it is a tie: p is "
         "a little above 0.05.",
    "c": "98.8 instead of 96.2 % (p 0.004): the objectives share one ViT, and ITC and ITM cost the "
         "captions a little.",
    "d": "ITM falls from 96 to 86. Random negatives alone cost about 1 point (the row without hard "
         "negatives). So most of it is probably that ITC no longer trains the ViT and the text "
         "encoder, which ITM shares.",
}
