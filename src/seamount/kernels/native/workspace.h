// Memory that operations share and reuse; it grows to what the largest step needed. One per process, like the pool.
#pragma once

#include "matrix.h"

namespace seamount {

constexpr int kMostThreads = 256;

struct Workspace {
    Scratch rows, scales;
    Scratch inner, inner_rows, inner_scales, terms, order;  // of experts
    Scratch row[kMostThreads], multiply[kMostThreads], head_rows[kMostThreads], head_scales[kMostThreads];
};
Workspace& workspace();

// Packs m rows for a product with `w`; row i is source row index[i], or i where `index` is null.
Rows prepare_rows(const Matrix& w, const Source& source, const int64_t* index, int64_t m, Scratch& data,
                  Scratch& scales);
void multiply_rows(const Matrix& w, const Rows& rows, const Out& out);

// What lies between the two products of a SwiGLU network: panels of bf16 where the second rounds its rows anyway, else
// rows of fp32.
class Between {
   public:
    Between(const Matrix& gate_up, const Matrix& down, int64_t rows, Scratch& memory)
        : columns_(out_columns(gate_up)), in_panels_(is_tiled(gate_up.kind) && is_tiled(down.kind)) {
        if (in_panels_)
            panels_ = memory.get_as<uint16_t>(size_t((rows + 15) / 16 * panel_row_size(columns_)));
        else
            rows_ = memory.get_as<float>(size_t(rows * columns_));
    }
    // From row `16 * tile_row` on.
    Out out(int64_t tile_row) const {
        if (in_panels_) return {nullptr, 0, false, panels_ + tile_row * panel_row_size(columns_)};
        return {rows_ + tile_row * 16 * columns_, columns_, false, nullptr};
    }
    Source source() const { return {rows_, columns_, nullptr, 0, panels_}; }

   private:
    int64_t columns_;
    bool in_panels_;
    float* rows_ = nullptr;
    uint16_t* panels_ = nullptr;
};

}  // namespace seamount
