"""11. The measured values; results/losses.md and results/pretrain_world.md have all of them."""

PREDICTIONS = {"a": 50.0, "b": 72.0, "c": "better", "d": "worse"}

WHY = {
    "a": "The ITM head is never trained, so it chooses between the two texts at random.",
    "b": "22 points are lost, though ITC is trained as before: LM teaches a small ViT most. (Three "
         "seeds differ so much that the test calls it a tie; re-ranked it is 18 points, p 0.04.)",
    "c": "98.8 instead of 95.8 % (p 0.04): the objectives share one ViT, and ITC and ITM cost the "
         "captions a little.",
    "d": "ITM falls from 96 to 83. Random negatives alone cost about 1 point (the row without hard "
         "negatives). So most of it is probably that ITC no longer trains the ViT and the text "
         "encoder, which ITM shares.",
}
