"""TensorRT: building plans, building the plugin, and TensorRT's log."""
