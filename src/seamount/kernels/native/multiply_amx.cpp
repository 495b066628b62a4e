// Matrix products with AMX tiles: 32 rows x 32 columns at a time, int8 and bf16 alike, few rows and many.
//
// Weights stream from memory once per 512 rows; a chunk of those rows (1 MB) stays in the core's second-level cache while
// all its columns pass. Every row of a tile is computed by itself, so the bits of a row do not depend on its neighbours.

#include <immintrin.h>

#include <algorithm>

#define SEAMOUNT_TARGET amx
#include "int4.h"
#include "matrix.h"
#include "vector.h"

namespace seamount {
namespace amx {
namespace {

constexpr int64_t kBlockRows = 512;
// Few rows: int4 tiles are unpacked this many at a time, so that they are still in the first-level cache when used.
constexpr int64_t kSlice = 8;
constexpr int64_t kFewRows = 64;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0-3 hold sums, 4-5 rows of activations, 6-7 weights.
// A macro, because the instructions take literal numbers only.
#define MULTIPLY_TILE(sums, a, b) \
    do { \
        if constexpr (kInt) \
            _tile_dpbssd(sums, a, b); \
        else \
            _tile_dpbf16ps(sums, a, b); \
    } while (0)

// Adds `count` tiles of products of one or two row tiles and one or two panels to the sums.
template <bool kInt, bool kTwoRows, bool kTwoPanels>
inline void multiply_tiles(const uint8_t* a0, const uint8_t* a1, const uint8_t* b0, const uint8_t* b1, int64_t count,
                           const uint8_t* ahead, int64_t ahead_bytes) {
    for (int64_t t = 0; t < count; t++) {
        const int64_t at = t * kTileBytes;
        _tile_loadd(6, b0 + at, 64);
        _tile_loadd(4, a0 + at, 64);
        MULTIPLY_TILE(0, 4, 6);
        if constexpr (kTwoPanels) {
            _tile_loadd(7, b1 + at, 64);
            MULTIPLY_TILE(1, 4, 7);
        }
        if constexpr (kTwoRows) {
            _tile_loadd(5, a1 + at, 64);
            MULTIPLY_TILE(2, 5, 6);
            if constexpr (kTwoPanels) MULTIPLY_TILE(3, 5, 7);
        }
        for (int64_t i = 0; i < ahead_bytes; i += 64) _mm_prefetch(ahead + t * ahead_bytes + i, _MM_HINT_T1);
    }
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

struct Target {
    const Matrix& w;
    const Rows& rows;
    float* out;  // place of row 0 and packed column 0
    int64_t stride;
    int64_t columns;
    bool add;
};

// Adds a tile of sums (16 x 16, of one chunk) to the output, scaled.
void finish_tile(const Target& to, const void* sums, int64_t row, int64_t column, int64_t chunk, int64_t chunks) {
    const Matrix& w = to.w;
    if (row >= to.rows.m || column >= to.columns) return;
    const int64_t last = std::min<int64_t>(row + 16, to.rows.m);
    const int columns = int(std::min<int64_t>(16, to.columns - column));
    const bool integers = w.kind != kBF16;
    const f32x16 scale = integers ? load<f32x16>(w.scale + column) : splat(1);
    const f32x16 bias = w.bias && !chunk ? load<f32x16>(w.bias + column) : splat(0);
    const bool fresh = !chunk && !to.add;
    for (int64_t r = row; r < last; r++) {
        auto* from = static_cast<const uint8_t*>(sums) + (r - row) * 64;
        float* out = to.out + r * to.stride + column;
        f32x16 value = fresh ? splat(0) : columns == 16 ? load<f32x16>(out) : load_part(out, columns);
        if (!chunk) value += bias;
        if (integers)
            value += __builtin_convertvector(load<i32x16>(from), f32x16) * (scale * to.rows.scale[r * chunks + chunk]);
        else
            value += load<f32x16>(from);
        if (columns == 16)
            store(out, value);
        else
            store_part(out, value, columns);
    }
}

template <bool kTwoRows, bool kTwoPanels>
inline void finish(const Target& to, uint8_t* sums, int64_t row, int64_t column, int64_t chunk, int64_t chunks) {
    _tile_stored(0, sums, 64);
    if constexpr (kTwoPanels) _tile_stored(1, sums + kTileBytes, 64);
    if constexpr (kTwoRows) _tile_stored(2, sums + 2 * kTileBytes, 64);
    if constexpr (kTwoRows && kTwoPanels) _tile_stored(3, sums + 3 * kTileBytes, 64);
    finish_tile(to, sums, row, column, chunk, chunks);
    if constexpr (kTwoPanels) finish_tile(to, sums + kTileBytes, row, column + 16, chunk, chunks);
    if constexpr (kTwoRows) finish_tile(to, sums + 2 * kTileBytes, row + 16, column, chunk, chunks);
    if constexpr (kTwoRows && kTwoPanels) finish_tile(to, sums + 3 * kTileBytes, row + 16, column + 16, chunk, chunks);
}

struct Weights {
    const uint8_t* tiles[2];   // of the two panels, packed as stored
    const uint8_t* groups[2];  // int4
};

// One chunk, rows `row` to `row + 32`, weights as they are stored or unpacked by the caller.
template <bool kInt, bool kTwoRows, bool kTwoPanels>
void block(const Target& to, int64_t row, int64_t column, int64_t chunk, const uint8_t* b0, const uint8_t* b1,
           const uint8_t* ahead, int64_t ahead_bytes, uint8_t* sums) {
    const int64_t tiles = num_tiles(to.w), first = chunk * kChunkTiles;
    const int64_t count = std::min(kChunkTiles, tiles - first);
    auto* a0 = static_cast<const uint8_t*>(to.rows.data) + (row / 16 * tiles + first) * kTileBytes;
    zero_sums();
    multiply_tiles<kInt, kTwoRows, kTwoPanels>(a0, a0 + tiles * kTileBytes, b0, b1, count, ahead, ahead_bytes);
    finish<kTwoRows, kTwoPanels>(to, sums, row, column, chunk, num_chunks(tiles));
}

// As `block`, for int4 and few rows: unpacks a slice, uses it, goes on.
template <bool kTwoRows, bool kTwoPanels>
void block_int4(const Target& to, int64_t row, int64_t column, int64_t chunk, const Weights& from, uint8_t* unpacked,
                uint8_t* sums) {
    const int64_t tiles = num_tiles(to.w), first = chunk * kChunkTiles;
    const int64_t end = std::min(tiles, first + kChunkTiles);
    auto* a = static_cast<const uint8_t*>(to.rows.data) + row / 16 * tiles * kTileBytes;
    zero_sums();
    int turn = 0;
    for (int64_t t = first; t < end; t += kSlice) {
        const int64_t count = std::min(kSlice, end - t);
        uint8_t* slice = unpacked + (turn ^= 1) * 2 * kSlice * kTileBytes;
        for (int64_t i = 0; i < count; i++)
            for (int p = 0; p < (kTwoPanels ? 2 : 1); p++) {
                const uint8_t* packed = from.tiles[p] + (t + i) * (kTileBytes / 2);
                for (int line = 0; line < 8; line++) _mm_prefetch(packed + 2048 + line * 64, _MM_HINT_T1);
                unpack_int4(packed, from.groups[p], t + i, to.w.group, slice + (p * kSlice + i) * kTileBytes);
            }
        const uint8_t* a0 = a + t * kTileBytes;
        multiply_tiles<true, kTwoRows, kTwoPanels>(a0, a0 + tiles * kTileBytes, slice, slice + kSlice * kTileBytes,
                                                   count, a0, 0);
    }
    finish<kTwoRows, kTwoPanels>(to, sums, row, column, chunk, num_chunks(tiles));
}

template <bool kTwoPanels>
void few_rows(const Target& to, int64_t panel, const Weights& from, uint8_t* scratch) {
    const Matrix& w = to.w;
    uint8_t *sums = scratch, *unpacked = scratch + 4 * kTileBytes;
    for (int64_t chunk = 0; chunk < num_chunks(num_tiles(w)); chunk++) {
        const uint8_t* b0 = from.tiles[0] + chunk * kChunkBytes * 16;
        const uint8_t* b1 = kTwoPanels ? from.tiles[1] + chunk * kChunkBytes * 16 : b0;
        for (int64_t row = 0; row < to.rows.m; row += 32) {
            const bool two = row + 16 < to.rows.m;
            const int64_t column = panel * kPanel;
            if (w.kind == kInt4)
                two ? block_int4<true, kTwoPanels>(to, row, column, chunk, from, unpacked, sums)
                    : block_int4<false, kTwoPanels>(to, row, column, chunk, from, unpacked, sums);
            else if (w.kind == kInt8)
                two ? block<true, true, kTwoPanels>(to, row, column, chunk, b0, b1, b0 + 2048, 1024, sums)
                    : block<true, false, kTwoPanels>(to, row, column, chunk, b0, b1, b0 + 2048, 1024, sums);
            else
                two ? block<false, true, kTwoPanels>(to, row, column, chunk, b0, b1, b0 + 2048, 1024, sums)
                    : block<false, false, kTwoPanels>(to, row, column, chunk, b0, b1, b0 + 2048, 1024, sums);
        }
    }
}

// A chunk of two panels against a block of rows; the next panels' weights are fetched meanwhile.
template <bool kInt, bool kTwoPanels>
void many_rows(const Target& to, int64_t first_row, int64_t last_row, int64_t panel, int64_t chunk, const uint8_t* b0,
               const uint8_t* b1, const uint8_t* next, int64_t next_bytes, uint8_t* sums) {
    const int64_t pairs = (last_row - first_row + 31) / 32;
    const int64_t tiles = std::min(kChunkTiles, num_tiles(to.w) - chunk * kChunkTiles);
    const int64_t share = std::max<int64_t>(64, round_up(next_bytes / (pairs * tiles), 64));
    for (int64_t row = first_row; row < last_row; row += 32) {
        const int64_t at = (row - first_row) / 32 * tiles * share;
        const int64_t ahead = at + tiles * share <= next_bytes ? share : 0;
        if (row + 16 < last_row)
            block<kInt, true, kTwoPanels>(to, row, panel * kPanel, chunk, b0, b1, next + at, ahead, sums);
        else
            block<kInt, false, kTwoPanels>(to, row, panel * kPanel, chunk, b0, b1, next + at, ahead, sums);
    }
}

// One chunk of two panels (or of the last, odd one) against a block of rows.
void multiply_chunk(const Target& to, int64_t first_row, int64_t last_row, int64_t panel, bool two, bool more,
                    int64_t chunk, uint8_t* scratch) {
    const Matrix& w = to.w;
    const int64_t tiles = num_tiles(w), bytes = panel_bytes(w), stored_tile = bytes / tiles;
    const int64_t first = chunk * kChunkTiles, count = std::min(kChunkTiles, tiles - first);
    uint8_t *sums = scratch, *unpacked = scratch + 4 * kTileBytes;
    auto* begin = static_cast<const uint8_t*>(w.data) + panel * bytes + first * stored_tile;
    const uint8_t* b[2] = {begin, two ? begin + bytes : begin};
    // The next two panels lie apart; fetching the first of them keeps the stream going.
    const uint8_t* next = begin + 2 * bytes;
    const int64_t next_bytes = more ? count * stored_tile : 0;
    if (w.kind == kInt4) {
        for (int p = 0; p < (two ? 2 : 1); p++) {
            const uint8_t* groups = w.group_scale + (panel + p) * num_groups(w) * 32;
            uint8_t* to_tiles = unpacked + p * kChunkTiles * kTileBytes;
            for (int64_t t = 0; t < count; t++)
                unpack_int4(b[p] + t * stored_tile, groups, first + t, w.group, to_tiles + t * kTileBytes);
            b[p] = to_tiles;
        }
    }
    if (w.kind == kBF16)
        two ? many_rows<false, true>(to, first_row, last_row, panel, chunk, b[0], b[1], next, next_bytes, sums)
            : many_rows<false, false>(to, first_row, last_row, panel, chunk, b[0], b[0], next, 0, sums);
    else
        two ? many_rows<true, true>(to, first_row, last_row, panel, chunk, b[0], b[1], next, next_bytes, sums)
            : many_rows<true, false>(to, first_row, last_row, panel, chunk, b[0], b[0], next, 0, sums);
}

void multiply_many(const Target& to, int64_t first_panel, int64_t last_panel, uint8_t* scratch) {
    const int64_t chunks = num_chunks(num_tiles(to.w));
    for (int64_t first_row = 0; first_row < to.rows.m; first_row += kBlockRows)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t panel = first_panel; panel < last_panel; panel += 2)
                multiply_chunk(to, first_row, std::min<int64_t>(to.rows.m, first_row + kBlockRows), panel,
                               panel + 1 < last_panel, panel + 2 < last_panel, chunk, scratch);
}

void multiply_few(const Target& to, int64_t panel, bool two, uint8_t* scratch) {
    const Matrix& w = to.w;
    auto* data = static_cast<const uint8_t*>(w.data) + panel * panel_bytes(w);
    Weights from{{data, data + panel_bytes(w)}, {nullptr, nullptr}};
    if (w.kind == kInt4)
        for (int p = 0; p < 2; p++) from.groups[p] = w.group_scale + (panel + p) * num_groups(w) * 32;
    two ? few_rows<true>(to, panel, from, scratch) : few_rows<false>(to, panel, from, scratch);
}

// Sums of a pair of panels stay in scratch memory until they are whole, and leave it gated.
void multiply_gated(const Matrix& w, const Rows& rows, float* out, int64_t stride, int64_t first_panel,
                    int64_t last_panel, uint8_t* scratch, float* pairs) {
    const int64_t chunks = num_chunks(num_tiles(w));
    // All chunks of a block of rows are read again for each pair: they must stay in the cache together.
    const int64_t block = std::max<int64_t>(64, kBlockRows / chunks / 32 * 32);
    for (int64_t first_row = 0; first_row < rows.m; first_row += block) {
        const int64_t last_row = std::min(rows.m, first_row + block);
        for (int64_t panel = first_panel; panel < last_panel; panel += 2) {
            const Target to{w, rows, pairs - first_row * 2 * kPanel - panel * kPanel, 2 * kPanel,
                            num_panels(w) * kPanel, false};
            if (rows.m <= kFewRows)
                multiply_few(to, panel, true, scratch);
            else
                for (int64_t chunk = 0; chunk < chunks; chunk++)
                    multiply_chunk(to, first_row, last_row, panel, true, panel + 2 < last_panel, chunk, scratch);
            const int64_t column = panel / 2 * kPanel;
            avx512::table.gate(pairs, last_row - first_row, out + first_row * stride + column, stride,
                               int(std::min<int64_t>(kPanel, out_columns(w) - column)));
        }
    }
}

}  // namespace

void multiply(const Matrix& w, const Rows& rows, float* out, int64_t stride, bool add, int64_t first_panel,
              int64_t last_panel, Scratch& scratch) {
    if (!is_tiled(w.kind)) return avx512::table.multiply(w, rows, out, stride, add, first_panel, last_panel, scratch);
    const TileConfig config;
    _tile_loadconfig(&config);
    const size_t tiles_bytes = size_t(4 + 2 * kChunkTiles) * kTileBytes;
    auto* memory = scratch.get_as<uint8_t>(tiles_bytes + kBlockRows * 2 * kPanel * sizeof(float));
    const Target to{w, rows, out, stride, w.n, add};
    if (w.gated)
        multiply_gated(w, rows, out, stride, first_panel, last_panel, memory,
                       reinterpret_cast<float*>(memory + tiles_bytes));
    else if (rows.m > kFewRows)
        multiply_many(to, first_panel, last_panel, memory);
    else
        for (int64_t panel = first_panel; panel < last_panel; panel += 2)
            multiply_few(to, panel, panel + 1 < last_panel, memory);
    _tile_release();
}

}  // namespace amx
}  // namespace seamount
