// What the library as a whole does: its log, its registration with TensorRT.
#pragma once

namespace less {

// Says an error: to the sink of lessOnError, to the logger of the TensorRT that loaded the library, or to stderr.
void logError(char const* message) noexcept;

// TensorRT-RTX's ONNX parser opens "libtensorrt_rtx.so" by that name when a model has plugins, but the Python wheel
// holds libtensorrt_rtx.so.1 alone, and the process aborts. Loads an empty library of that name which depends on
// `soname`, the TensorRT-RTX in this process. Does nothing where the name is known, or memory files are impossible.
void provideUnversionedName(char const* soname) noexcept;

}  // namespace less
