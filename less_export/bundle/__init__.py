"""Bundles: the files of one export, their manifest, and how files are written."""
