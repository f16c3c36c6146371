"""Sources of the TensorRT plugin (see README.md); ``less_export.plugin`` compiles them."""
