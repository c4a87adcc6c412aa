"""BLIP-2 (Li et al. 2023): a Q-Former between a frozen image encoder and a language model."""
