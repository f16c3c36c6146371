// Chooses tokens on a device, as less_export/runtime/device_sampler.py does.
#pragma once

#include <functional>
#include <vector>

#include "../../sampler/sample.h"
#include "engine.hpp"

namespace less {

// lessSample on the stream of a device. Throws BackendError.
using SampleKernel = std::function<void(float const* logits, int64_t vocab, LessSampleRow const* rows, int32_t count,
                                        uint32_t* histories, int32_t* picks)>;

// Choices by logits on a device, and what penalties need there: a history for each of `rows` sequences, from the first
// one with penalties on, which the kernel keeps. It is copied there when a sequence gets one, and when the host has
// chosen meanwhile.
class DeviceSampler {
 public:
    DeviceSampler(Device& device, SampleKernel kernel, int64_t vocab, int64_t rows);

    // Whether the kernel can choose for a sequence: not with penalties if there is no memory for histories.
    bool suits(Sampler const& sampler);

    // Queues the choice of a token for each of `samplers` by the rows `places` of `logits` [*, vocab] on the device;
    // nothing that was queued before is under way any more when the device has been waited for. Throws BackendError.
    void ask(float const* logits, std::vector<Sampler*> const& samplers, std::vector<int64_t> const& places);
    // What was chosen, or kLessNoChoice, once the device has been waited for.
    std::vector<int32_t> chosen(std::vector<Sampler*> const& samplers);
    // Forgets the histories: the device has failed, and they may hold anything.
    void forget();

 private:
    // Whose history a place has, with how many choices, and the call of pick() that used it last; 0: nobody's.
    struct History {
        uint64_t sampler = 0;
        int64_t count = 0;
        uint64_t used = 0;
    };
    bool hasHistories();
    int32_t historyOf(Sampler const& sampler);

    Device& device_;
    SampleKernel kernel_;
    int64_t vocab_;
    Memory asked_, hostAsked_, picks_, hostPicks_, memory_;
    std::vector<History> histories_;
    std::vector<std::vector<uint32_t>> copied_;  // to the device, until the stream has run
    uint64_t calls_ = 0;
    bool triedHistories_ = false;
};

}  // namespace less
