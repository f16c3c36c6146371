"""Run bundles: backends that own the state, and generation on top of them. Needs no torch."""
