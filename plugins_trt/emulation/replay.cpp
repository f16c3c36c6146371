// Replays recorded launches of the emulated kernels, for builds that cannot be loaded into Python (sanitizers).
//
// Usage: replay FILE ORDER...; for each launch, FILE contains AttentionShape, AttentionRules and the input tensors.
// Every tensor gets a heap block of its exact size, so that the address sanitizer detects accesses beyond it.
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "less_attention.h"

namespace {

using Block = std::unique_ptr<unsigned char[]>;

struct Launch {
    less::AttentionShape shape;
    less::AttentionRules rules;
    std::vector<std::vector<unsigned char>> inputs;
};

// In the order of AttentionTensors; 0 for tensors that the layer does not have.
std::vector<size_t> inputBytes(less::AttentionShape const& s) {
    bool const codes = s.slotType == less::SlotType::kInt8, means = s.stateType == less::StateType::kMeans16;
    size_t const item = s.dtype == less::DType::kFloat32 ? 4 : 2, batch = s.batch, slot = codes ? 1 : item;
    size_t const rows = s.stateRows > 0 ? s.stateRows : s.batch;
    size_t const q = batch * s.queryHeads * s.chunk, k = batch * s.kvHeads * s.chunk, c = rows * s.kvHeads * s.slots;
    size_t const r = rows * s.kvHeads * s.rank;
    return {q * s.headDim * item,
            k * s.headDim * item,
            k * s.headDim * item,
            q * s.rank * 4,
            k * s.rank * item,
            c * s.headDim * slot,
            c * s.headDim * slot,
            c * s.rank * (means ? 1 : item),
            c * 4,
            c * 4,
            r * s.headDim * (means ? 2 : 4),
            r * 4,
            codes ? c * 4 : 0,
            codes ? c * 4 : 0,
            means ? r * 4 : 0,
            batch * 4,
            batch * 4,
            codes ? static_cast<size_t>(s.kvHeads) * s.headDim * 4 : 0,
            codes ? static_cast<size_t>(s.kvHeads) * s.headDim * 4 : 0,
            static_cast<size_t>(s.distances) * s.rotary * 4,
            s.stateRows > 0 ? batch * 4 : 0};
}

bool read(std::FILE* file, void* target, size_t bytes) { return std::fread(target, 1, bytes, file) == bytes; }

Block copyOf(std::vector<unsigned char> const& bytes) {
    if (bytes.empty()) return nullptr;
    Block block(new unsigned char[bytes.size()]);
    std::memcpy(block.get(), bytes.data(), bytes.size());
    return block;
}

cudaError_t run(Launch const& launch) {
    std::vector<Block> blocks;
    for (auto const& input : launch.inputs) blocks.push_back(copyOf(input));
    Block const out(new unsigned char[launch.inputs[0].size()]);
    Block const workspace(new unsigned char[less::workspaceBytes(launch.shape, launch.rules)]);
    std::unique_ptr<uint32_t[]> const counters(new uint32_t[less::kCounterBytes / sizeof(uint32_t)]());
    less::AttentionTensors tensors{};
    auto* const pointers = reinterpret_cast<void**>(&tensors);
    for (size_t i = 0; i < blocks.size(); ++i) pointers[i] = blocks[i].get();
    pointers[21] = out.get();
    for (size_t i = 0; i < 10; ++i) pointers[22 + i] = blocks[5 + i].get();
    static_assert(sizeof(tensors) == 32 * sizeof(void*), "tensors are pointers, inputs first");
    return less::enqueue(launch.shape, launch.rules, tensors, workspace.get(), counters.get(), nullptr);
}

}  // namespace

int main(int argc, char** argv) {
    std::FILE* const file = argc > 2 ? std::fopen(argv[1], "rb") : nullptr;
    if (file == nullptr) return 2;
    std::vector<Launch> launches;
    for (Launch launch; read(file, &launch.shape, sizeof launch.shape); launches.push_back(launch)) {
        if (!read(file, &launch.rules, sizeof launch.rules)) return 2;
        launch.inputs.clear();
        for (size_t const bytes : inputBytes(launch.shape)) {
            launch.inputs.emplace_back(bytes);
            if (!read(file, launch.inputs.back().data(), bytes)) return 2;
        }
    }
    std::fclose(file);
    for (int i = 2; i < argc; ++i) {
        emu::order() = std::atoi(argv[i]);
        for (int const blocks : {1, 512}) {
            emu::blocksWanted() = blocks;
            for (Launch const& launch : launches) {
                if (run(launch) != cudaSuccess) return 3;
            }
        }
    }
    std::printf("%zu launches\n", launches.size());
    return 0;
}
