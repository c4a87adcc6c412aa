"""12. The measured values; results/table2.md has all of them."""

PREDICTIONS = {"a": "beam", "b": "nucleus", "c": "nucleus", "d": "tie"}

WHY = {
    "a": "The likeliest caption is safe; a draw also takes unlikely words. In the picture world "
         "about 91 of 100 beam texts are true, and about 85 of 100 nucleus texts.",
    "b": "More of them are wrong, and the filter sees it. In the paper: 25 % against 19 %.",
    "c": "Its texts are more diverse and say something new; the filter removes the noise.",
    "d": "Here they differ by about a point at most, which five seeds cannot tell "
         "from chance. The world's language is small: there is little diversity to gain.",
}
