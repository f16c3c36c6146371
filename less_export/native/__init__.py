"""Native code that this machine builds: its cache, the compilers, and the operators for ONNX Runtime."""
