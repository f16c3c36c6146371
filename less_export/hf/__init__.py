"""Hugging Face decoders: where a model comes from, LESS put into it, its weights by reference."""
