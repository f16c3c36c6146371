"""Sources of the TensorRT plugin (see README.md); ``less_export.tensorrt.plugin`` compiles them."""
