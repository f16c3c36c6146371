"""Hugging Face decoders: where models come from, how LESS is put into them, and their weights by reference."""
