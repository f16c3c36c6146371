#include <cstdio>

#include "sample.cuh"

int32_t lessSampleInterface() noexcept { return kLessSampleInterface; }

char const* lessSampleWhyUnusable() noexcept {
    static char reason[200];
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return nullptr;
    if (driver / 1000 >= CUDART_VERSION / 1000) return nullptr;
    std::snprintf(reason, sizeof reason, "the driver supports CUDA up to %d.%d, and it was built with CUDA %d.%d",
                  driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return reason;
}

int32_t lessSample(float const* logits, int64_t vocab, LessSampleRow const* rows, int32_t count, uint32_t* histories,
                   int32_t* picks, void* stream) noexcept {
    if (vocab < 1 || vocab > kLessMaxVocab || count < 0) return cudaErrorInvalidValue;
    if (count == 0) return cudaSuccess;
    less::SampleParams const params{logits, rows, histories, picks, static_cast<int>(vocab)};
    return less::run(less::Mode::kLaunch, less::sampleKernel, dim3(count), sizeof(less::SampleShared), params,
                     static_cast<cudaStream_t>(stream), less::kSampleThreads);
}
