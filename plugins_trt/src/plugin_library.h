// Functions of the library as a whole: logging, and registration with TensorRT.
#pragma once

namespace less {

// Reports an error to the sink of lessOnError, to the logger of the TensorRT that loaded the library, or to stderr.
void logError(char const* message) noexcept;

// TensorRT-RTX's ONNX parser opens "libtensorrt_rtx.so" by that name when a model has plugins, but the Python wheel
// contains only libtensorrt_rtx.so.1, and the process aborts. This function loads an empty library of that name, which
// depends on `soname`, the TensorRT-RTX in this process. It does nothing if a library of that name is already loaded or
// memory files are unavailable.
void provideUnversionedName(char const* soname) noexcept;

}  // namespace less
