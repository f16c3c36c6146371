// The attention of a chunk over slots, chunk and low-rank state (LESS, arXiv 2402.09398, section 3).
#pragma once

#include <cstddef>
#include <vector>

#include "layer.h"

namespace less {

// Memory that keeps its size between steps, on the boundaries of vectors.
class Scratch {
 public:
    float* reserve(size_t floats);

 private:
    std::vector<float> memory_;
};

// What queries of a KV head see: the slots, then the tokens of the chunk, each padded to whole vectors.
class Seen {
 public:
    // Reads keys and values, and turns keys by their distances. Columns without a token hold zeros.
    void prepare(Layer const& layer, State const& state, Tokens const& tokens);

    int columns() const { return slot_columns_ + chunk_columns_; }
    // The column of the chunk's token j, and of slot j.
    int column(int j) const { return slot_columns_ + j; }

    int tiles() const { return tiles_; }
    // Attends the queries of a tile and writes their outputs. Of layers with scores, leaves in `gain` [columns] what
    // each column gains from them.
    void attend(int tile, float* gain) const;

 private:
    static constexpr int kTile = 32;

    float* panel(int column) const;  // of the column's key, whose channels are kLanes apart
    void clear(int column);
    void put_key(int column, float const* key, int distance);
    void read_slots();
    void read_chunk();
    void read_means();
    void logits(float const* queries, int rows, int columns, float* out) const;

    Layer const* layer_ = nullptr;
    State const* state_ = nullptr;
    Tokens const* tokens_ = nullptr;
    int slot_columns_ = 0, chunk_columns_ = 0, width_ = 0, tiles_ = 0;
    Scratch scratch_;
    float* keys_ = nullptr;                     // panels of kLanes columns: [columns / kLanes, D, kLanes]
    float* values_ = nullptr;                   // [columns, width]
    float* means_ = nullptr;                    // [R, width]
    float* log_z_ = nullptr;                    // [R]
    float *key_ = nullptr, *turned_ = nullptr;  // [D]
    std::vector<int32_t> positions_;
};

}  // namespace less
