// Linear layers: rows are prepared (normalised or gated, quantised) and multiplied, all threads at work.

#include <algorithm>

#include "replay.h"
#include "workspace.h"

namespace seamount {
namespace {

// Panels per task: enough tasks to balance the threads, and even, since panels are taken by twos.
int64_t panels_per_task(int64_t panels, int64_t rows) {
    const int64_t tasks = num_threads() * (rows > 64 ? 3 : 8);
    return std::max<int64_t>(2, round_up((panels + tasks - 1) / tasks, 2));
}

}  // namespace

Workspace& workspace() {
    // Never freed: another thread may compute while the process ends.
    static Workspace& shared = *new Workspace;
    return shared;
}

Rows prepare_rows(const Matrix& w, const Source& source, const int64_t* index, int64_t m, Scratch& data,
                  Scratch& scales) {
    void* packed = data.get(size_t(rows_bytes(w, m)));
    const bool integers = w.kind == kInt8 || w.kind == kInt4;
    float* factors = integers ? scales.get_as<float>(size_t(rows_scales(w, m))) : nullptr;
    parallel((m + 15) / 16, [&](int64_t tile_row, int thread) {
        auto* scratch = workspace().row[thread].get_as<float>(size_t(round_up(w.k, 64) + 16));
        int64_t rows[16];
        for (int64_t i = 0; i < 16; i++) {
            const int64_t at = tile_row * 16 + i;
            rows[i] = at >= m ? -1 : index ? index[at] : at;
        }
        functions->prepare(w, source, rows, tile_row, packed, factors, scratch);
    });
    return {m, packed, factors};
}

void multiply_rows(const Matrix& w, const Rows& rows, const Out& out) {
    const int64_t panels = num_panels(w), step = panels_per_task(panels, rows.m);
    parallel((panels + step - 1) / step, [&](int64_t task, int thread) {
        functions->multiply(w, rows, out, task * step, std::min(panels, (task + 1) * step),
                            workspace().multiply[thread]);
    });
}

}  // namespace seamount

using namespace seamount;

SEAMOUNT_API void seamount_linear(const Matrix* w, const float* x, int64_t x_stride, int64_t m,
                                  const float* norm_weight, float eps, float* out, int64_t out_stride, int32_t add) {
    const Source source{x, x_stride, norm_weight, eps, nullptr};
    const Rows rows = prepare_rows(*w, source, nullptr, m, workspace().rows, workspace().scales);
    multiply_rows(*w, rows, {out, out_stride, add != 0, nullptr});
}
SEAMOUNT_STEP(seamount_linear)

// out += down(gate_up(norm(x))): rows are taken in blocks, so that what lies between the products stays small.
SEAMOUNT_API void seamount_feed_forward(const Matrix* gate_up, const Matrix* down, const float* x, int64_t x_stride,
                                        int64_t m, const float* norm_weight, float eps, float* out,
                                        int64_t out_stride) {
    auto& space = workspace();
    const int64_t block = 512;
    const Between between(*gate_up, *down, std::min(m, block), space.inner);
    for (int64_t first = 0; first < m; first += block) {
        const int64_t count = std::min(block, m - first);
        const Source source{x + first * x_stride, x_stride, norm_weight, eps, nullptr};
        multiply_rows(*gate_up, prepare_rows(*gate_up, source, nullptr, count, space.rows, space.scales), between.out(0));
        multiply_rows(*down, prepare_rows(*down, between.source(), nullptr, count, space.rows, space.scales),
                      {out + first * out_stride, out_stride, true, nullptr});
    }
}
SEAMOUNT_STEP(seamount_feed_forward)

// One product per head: rows x[t, h, :k] (strides in floats) with `w[h]`, to out[t, h, :n].
SEAMOUNT_API void seamount_linear_per_head(const Matrix* w, int64_t heads, const float* x, int64_t x_stride,
                                           int64_t x_head_stride, int64_t m, float* out, int64_t out_stride,
                                           int64_t out_head_stride) {
    // Few rows at a time, because a row of all heads is long: the rows of one head lie on many pages.
    constexpr int64_t kRows = 64;
    const int64_t blocks = (m + kRows - 1) / kRows;
    parallel(heads * blocks, [&](int64_t task, int thread) {
        auto& space = workspace();
        const int64_t head = task % heads, first = task / heads * kRows, count = std::min(kRows, m - first);
        const Matrix& of_head = w[head];
        const Source source{x + first * x_stride + head * x_head_stride, x_stride, nullptr, 0, nullptr};
        auto* scratch = space.row[thread].get_as<float>(size_t(round_up(of_head.k, 64) + 16));
        void* packed = space.head_rows[thread].get(size_t(rows_bytes(of_head, count)));
        const bool integers = of_head.kind == kInt8 || of_head.kind == kInt4;
        float* factors =
            integers ? space.head_scales[thread].get_as<float>(size_t(rows_scales(of_head, count))) : nullptr;
        for (int64_t tile_row = 0; tile_row < (count + 15) / 16; tile_row++) {
            int64_t rows[16];
            for (int64_t i = 0; i < 16; i++) rows[i] = tile_row * 16 + i < count ? tile_row * 16 + i : -1;
            functions->prepare(of_head, source, rows, tile_row, packed, factors, scratch);
        }
        const Out place{out + first * out_stride + head * out_head_stride, out_stride, false, nullptr};
        functions->multiply(of_head, {count, packed, factors}, place, 0, num_panels(of_head), space.multiply[thread]);
    });
}
SEAMOUNT_STEP(seamount_linear_per_head)

SEAMOUNT_API void seamount_norm(const float* x, int64_t x_stride, const float* weight, float eps, int64_t rows,
                                int64_t k, float* out, int64_t out_stride) {
    const int64_t step = 16;
    parallel((rows + step - 1) / step, [&](int64_t task, int) {
        for (int64_t r = task * step; r < std::min(rows, (task + 1) * step); r++)
            functions->norm(x + r * x_stride, x_stride, weight, eps, 1, k, out + r * out_stride);
    });
}
SEAMOUNT_STEP(seamount_norm)

SEAMOUNT_API int64_t seamount_packed_bytes(const Matrix* w) { return num_panels(*w) * panel_bytes(*w); }

SEAMOUNT_API void seamount_pack(const Matrix* w, const void* source, int32_t source_kind, int64_t first_panel,
                                int64_t last_panel) {
    const int64_t step = 4;
    parallel((last_panel - first_panel + step - 1) / step, [&](int64_t task, int) {
        const int64_t first = first_panel + task * step;
        functions->pack(*w, source, source_kind, first, std::min(last_panel, first + step));
    });
}

SEAMOUNT_API void seamount_pack_codes(const Matrix* w, const uint8_t* codes, const float* scales, const float* zeros,
                                      int64_t first_panel, int64_t last_panel) {
    const int64_t step = 4;
    parallel((last_panel - first_panel + step - 1) / step, [&](int64_t task, int) {
        const int64_t first = first_panel + task * step;
        functions->pack_codes(*w, codes, scales, zeros, first, std::min(last_panel, first + step));
    });
}
