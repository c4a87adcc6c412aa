"""Words, pictures and files of them, as users bring them."""
