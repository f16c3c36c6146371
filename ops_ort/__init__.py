"""Sources of the operators for ONNX Runtime's CPU and CUDA providers; ``less_export.native`` compiles them."""
