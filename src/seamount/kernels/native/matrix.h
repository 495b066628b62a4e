// Packed weight matrices, packed rows of activations, and the functions that differ by instruction set.
//
// A weight [n, k] is cut into panels of 16 columns of the result (rows of the weight) and, for the 8- and 16-bit kinds,
// into tiles of 16 rows x 64 bytes, one after the other:
//
//   int8  tile: k/4 (16) x column (16) x k%4 (4)           64 k
//   bf16  tile: k/2 (16) x column (16) x k%2 (2)           32 k
//   int4  tile: as int8, two rows in one: the low nibble holds row 2i, the high nibble row 2i + 1
//   f32, f16  panel: k x column (16)
//
// Panels of a gated matrix take turns: 16 gates, then the 16 columns that they gate.
//
// It is what an AMX tile and `vpdpbusd` both read. Rows of activations lie in tiles of 16 rows x 64 bytes likewise.
//
// The sum over k is cut into chunks of a fixed length (`kChunkTiles` tiles, 2,048 bytes a row); within one it is exact (int8) or has the
// order of the instruction (bf16), and chunks are added in order in fp32. So a row's result has the same bits whatever
// other rows are computed with it.
#pragma once

#include "common.h"

namespace seamount {

constexpr int kPanel = 16;
constexpr int kTileBytes = 1024;
constexpr int64_t kChunkTiles = 32;

// The ABI with `kernels/packed.py`: keep both in step.
struct Matrix {
    int32_t kind;
    int32_t group;         // int4: k per group, 32 or a multiple of 64
    int32_t gated;         // the first n/2 outputs are gates, the others what they gate: the product is silu(gate) * up
    int64_t n, k;          // outputs (before gating), inputs
    const void* data;      // packed
    const float* scale;    // int8, int4: per packed column, [panels * 16]
    const uint8_t* group_scale;  // int4: [panel][group][16] multipliers, then [16] zero levels
    const float* bias;     // per packed column, or null
};

inline bool is_tiled(int32_t kind) { return kind == kBF16 || kind == kInt8 || kind == kInt4; }
inline int64_t tile_k(int32_t kind) { return kind == kBF16 ? 32 : 64; }
inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t num_tiles(const Matrix& w) { return round_up(w.k, tile_k(w.kind)) / tile_k(w.kind); }
// Columns of the product, and of the panels that give it.
inline int64_t out_columns(const Matrix& w) { return w.gated ? w.n / 2 : w.n; }
inline int64_t num_panels(const Matrix& w) {
    return round_up(out_columns(w), kPanel) / kPanel * (w.gated ? 2 : 1);
}
// The row of the unpacked weight that a packed column holds; -1 for padding.
inline int64_t source_row(const Matrix& w, int64_t packed_column) {
    if (!w.gated) return packed_column < w.n ? packed_column : -1;
    const int64_t panel = packed_column / kPanel, column = panel / 2 * kPanel + packed_column % kPanel;
    return column < w.n / 2 ? panel % 2 * (w.n / 2) + column : -1;
}
inline int64_t num_chunks(int64_t tiles) { return round_up(tiles, kChunkTiles) / kChunkTiles; }
inline int64_t num_groups(const Matrix& w) { return round_up(w.k, w.group) / w.group; }
inline int64_t panel_bytes(const Matrix& w) {
    switch (w.kind) {
        case kF32: return w.k * kPanel * 4;
        case kF16: return w.k * kPanel * 2;
        case kInt4: return num_tiles(w) * (kTileBytes / 2);
        default: return num_tiles(w) * kTileBytes;
    }
}

// Activations, ready to be multiplied. Tiled kinds: [m/16][tiles][16][64 bytes], zeros in what is padded; int8 with a
// factor per row and chunk, [m rounded up to 16][chunks]. Others: fp32 [m][k].
struct Rows {
    int64_t m;
    const void* data;
    const float* scale;
};
inline int64_t rows_bytes(const Matrix& w, int64_t m) {
    return is_tiled(w.kind) ? round_up(m, 16) * num_tiles(w) * 64 : m * w.k * 4;
}
inline int64_t rows_scales(const Matrix& w, int64_t m) { return round_up(m, 16) * num_chunks(num_tiles(w)); }

// Rows as they are before they are packed: fp32, or what a gated product left in panels of bf16 (and then in order).
struct Source {
    const float* x;
    int64_t stride;
    const float* norm_weight; // [k]: rows are RMS-normalised with it; or null
    float eps;
    const uint16_t* panels;   // or null: see `Out`
};

// Where a product goes: to rows of fp32, or, if it is gated, to panels of bf16 for the product behind it:
// [m/16][columns/16][16 rows][16 columns]. A third of the memory traffic of rows of fp32; int8 codes are made of them.
struct Out {
    float* rows;
    int64_t stride;
    bool add;
    uint16_t* panels;  // or null
};
// bf16 numbers in a tile of 16 rows of such panels.
inline int64_t panel_row_size(int64_t columns) { return round_up(columns, kPanel) * 16; }

// Packs 16 rows of activations into `tile_row`'s place; `index[i]` is the source row of packed row i, -1 for none.
using PrepareFn = void (*)(const Matrix&, const Source&, const int64_t* index, int64_t tile_row, void* data,
                           float* scale, float* scratch);
// out[rows, columns of panels first..last) = (add ? out : 0) + bias + rows x weight, or, gated, silu(gate) * up of that
// sum; for all rows, on the calling thread. Panels of a gated matrix come in pairs, and nothing is added to them.
using MultiplyFn = void (*)(const Matrix&, const Rows&, const Out&, int64_t first_panel, int64_t last_panel,
                            Scratch& scratch);
// Packs panels first..last) of a weight whose rows lie at `source` (kind f32, f16 or bf16), and sets their scales.
using PackFn = void (*)(const Matrix&, const void* source, int32_t source_kind, int64_t first_panel,
                        int64_t last_panel);
// Packs panels first..last) of an int8 or int4 weight from rows of codes [n][k], and sets their scales. int8: signed
// codes, a scale per row. int4: value = scale * (code - zero), with scales and zeros [n][groups].
using PackCodesFn = void (*)(const Matrix&, const uint8_t* codes, const float* scales, const float* zeros,
                             int64_t first_panel, int64_t last_panel);
using NormFn = void (*)(const float* x, int64_t stride, const float* weight, float eps, int64_t rows, int64_t k,
                        float* out);

struct Functions {
    PrepareFn prepare;
    MultiplyFn multiply;
    PackFn pack;
    NormFn norm;
    // out[0..n) += w * x[0..n)
    void (*accumulate)(float* out, const float* x, float w, int64_t n);
    // The largest of `count` values and its first index; a NaN anywhere is the largest.
    void (*argmax)(const float* x, int64_t count, float* value, int64_t* index);
    // out = e^((x - best) * inverse); returns the sum, to double precision and in a fixed order.
    double (*weigh)(const float* x, int64_t count, float best, float inverse, float* out);
    // See heads.inc.
    void (*normalize_head)(float* x, const float* weight, float eps, int64_t count);
    void (*rotate_head)(const float* x, const float* cos, const float* sin, int64_t half, bool interleaved, float* out);
    void (*store_head)(const float* from, int64_t count, int32_t kind, void* cache, int64_t offset);
    PackCodesFn pack_codes;
};
extern const Functions* functions;

namespace plain { extern const Functions table; }
namespace avx2 { extern const Functions table; }
namespace avx512 { extern const Functions table; }
namespace amx {
void multiply(const Matrix&, const Rows&, const Out&, int64_t first_panel, int64_t last_panel, Scratch& scratch);
}

}  // namespace seamount
