"""Running a bundle: backends that own the state, and generation on top of them. No torch needed."""
