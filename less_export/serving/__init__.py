"""An OpenAI-compatible server over the engine; needs the extra ``serve``."""
