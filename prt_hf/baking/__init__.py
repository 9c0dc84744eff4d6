"""Bake rewards into a LoRA of their backbone, so that one model is left: [`~prt_hf.bake`] and its trainers."""
