"""Other objectives than BLIP's, as worked examples: CLIP, SigLIP, ALBEF, SimVLM and more."""
