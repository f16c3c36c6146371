"""Sources of the operator for ONNX Runtime's CPU provider; ``less_export.native.operator`` compiles them."""
