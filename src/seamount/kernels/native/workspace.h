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
void multiply_rows(const Matrix& w, const Rows& rows, float* out, int64_t stride, bool add);

}  // namespace seamount
