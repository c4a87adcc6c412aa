"""11. The measured values; results/losses.md and results/pretrain_world.md have all of them."""

PREDICTIONS = {"a": 0.1, "b": 50.0, "c": 0.0, "d": "worse"}

WHY = {
    "a": "The projections are never trained, so the order is random: one of 1,000.",
    "b": "The ITM head is never trained, so it chooses between the two texts at random.",
    "c": "The decoder's self-attention and head are never trained: it writes no sentence.",
    "d": "ITC's similarities choose the hard negatives. Without them the negatives are drawn at "
         "random, most are easy, and ITM learns less from them.",
}
