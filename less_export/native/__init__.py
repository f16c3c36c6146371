"""Native code that this machine builds: its cache, and the operator for ONNX Runtime's CPU provider."""
