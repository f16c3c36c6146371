"""From a Hugging Face decoder to ONNX files: wrapper, operator, weights, trace and self-check."""
