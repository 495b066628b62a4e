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
// Few rows: int4 tiles are unpacked so many before they are multiplied.
constexpr int64_t kAhead = 4;
constexpr int64_t kFewRows = 64;
// How far ahead weights are fetched when few rows wait for them.
constexpr int64_t kAheadBytes = 2048;
constexpr int64_t kVectorRows = 4;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Target {
    const Matrix& w;
    const Rows& rows;
    const Out& out;  // of row 0 and column 0
    float* partial;  // gated, several chunks: [kBlockRows][32] sums of a pair of panels
};

// Sums of a block leave the tiles for memory at once and reach their place while the next block is multiplied: tiles
// and vectors work side by side.
template <bool kInt>
class Drain {
   public:
    explicit Drain(const Target& to, uint8_t* memory)
        : to_(to), memory_(memory), chunks_(num_chunks(num_tiles(to.w))), columns_(out_columns(to.w)) {}

    // Memory for the sums of the block that is being multiplied: tiles of 16 x 16, two panels side by side.
    uint8_t* next_sums() { return memory_ + (turn_ ^= 1) * 4 * kTileBytes; }

    void begin(const uint8_t* sums, int64_t row, int64_t panel, bool two_panels, int64_t chunk) {
        const Matrix& w = to_.w;
        sums_ = sums;
        row_ = row;
        first_ = chunk == 0;
        last_ = chunk + 1 == chunks_;
        done_ = 0;
        // Panels are written two rows at a time; the row behind an odd last one has room there.
        count_ = int(std::min<int64_t>(32, to_.out.panels ? round_up(to_.rows.m - row, 2) : to_.rows.m - row));
        panels_ = two_panels ? 2 : 1;
        column_ = w.gated ? panel / 2 * kPanel : panel * kPanel;
        for (int p = 0; p < panels_; p++) {
            if constexpr (kInt) scale_[p] = load<f32x16>(w.scale + (panel + p) * kPanel);
            // Minus zero changes no sum, not even minus zero.
            bias_[p] = !first_ ? splat(-0.0f) : w.bias ? load<f32x16>(w.bias + (panel + p) * kPanel) : splat(0);
        }
        if constexpr (kInt) row_scale_ = to_.rows.scale + row * chunks_ + chunk;
        if (to_.out.panels)
            gated_ = to_.out.panels + row / 16 * panel_row_size(columns_) + panel / 2 * 256;
        else
            out_ = to_.out.rows + row * to_.out.stride + column_;
        whole_ = column_ + (w.gated ? 1 : panels_) * kPanel <= columns_;
        fresh_ = first_ && !to_.out.add;
    }
    int left() const { return count_ - done_; }
    inline void some(int most) {
        const int end = std::min(count_, done_ + (to_.out.panels ? (most + 1) & ~1 : most));
        if (done_ == end) return;
        if (to_.w.gated && !last_)
            keep_gated(end);
        else if (to_.w.gated)
            to_.out.panels ? finish_panels(end) : finish_gated(end);
        else if (!whole_)
            finish_edge(end);
        else if (panels_ == 2)
            fresh_ ? finish<2, true>(end) : finish<2, false>(end);
        else
            fresh_ ? finish<1, true>(end) : finish<1, false>(end);
        done_ = end;
    }

   private:
    inline f32x16 scaled(int row, int panel) const {
        const uint8_t* from = sums_ + (row / 16 * 2 + panel) * kTileBytes + row % 16 * 64;
        if constexpr (!kInt) return load<f32x16>(from);
        return __builtin_convertvector(load<i32x16>(from), f32x16) * (scale_[panel] * row_scale_[row * chunks_]);
    }
    template <int kPanels, bool kFresh>
    inline void finish(int end) const {
        for (int row = done_; row < end; row++)
            for (int p = 0; p < kPanels; p++) {
                float* out = out_ + row * to_.out.stride + p * kPanel;
                f32x16 value = kFresh ? bias_[p] : load<f32x16>(out) + bias_[p];
                store(out, value + scaled(row, p));
            }
    }
    // The last columns of a matrix whose width is no multiple of a panel's.
    void finish_edge(int end) const {
        for (int row = done_; row < end; row++)
            for (int p = 0; p < panels_; p++) {
                float* out = out_ + row * to_.out.stride + p * kPanel;
                const int columns = int(std::min<int64_t>(kPanel, columns_ - column_ - p * kPanel));
                const f32x16 before = fresh_ ? splat(0) : load_part(out, columns);
                store_part(out, before + bias_[p] + scaled(row, p), columns);
            }
    }
    float* partial(int row) const { return to_.partial + (row_ + row) % kBlockRows * 2 * kPanel; }
    inline f32x16 gated_sum(int row, int panel) const {
        return (first_ ? bias_[panel] : load<f32x16>(partial(row) + panel * kPanel)) + scaled(row, panel);
    }
    void keep_gated(int end) const {
        for (int row = done_; row < end; row++)
            for (int p = 0; p < 2; p++) store(partial(row) + p * kPanel, gated_sum(row, p));
    }
    inline f32x16 gated(int row) const { return silu(gated_sum(row, 0)) * gated_sum(row, 1); }
    void finish_gated(int end) const {
        for (int row = done_; row < end; row++)
            store_part(out_ + row * to_.out.stride, gated(row), int(std::min<int64_t>(kPanel, columns_ - column_)));
    }
    inline void finish_panels(int end) const {
        const int64_t next_tile = panel_row_size(columns_);
        for (int row = done_; row < end; row += 2) {
            const __m256i even = (__m256i)to_bf16(gated(row)), odd = (__m256i)to_bf16(gated(row + 1));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
            auto* to = reinterpret_cast<__m512i*>(gated_ + row / 16 * next_tile + row % 16 * 16);
            // Many rows are read again only when others have filled the cache.
            to_.rows.m > kFewRows ? _mm512_stream_si512(to, both) : _mm512_store_si512(to, both);
        }
    }

    const Target& to_;
    uint8_t* memory_;
    const int64_t chunks_, columns_;
    const uint8_t* sums_ = nullptr;
    const float* row_scale_ = nullptr;
    float* out_ = nullptr;
    uint16_t* gated_ = nullptr;
    f32x16 scale_[2], bias_[2];
    int64_t row_ = 0, column_ = 0;
    bool first_ = false, last_ = false, whole_ = false, fresh_ = false;
    int panels_ = 2, turn_ = 0, done_ = 0, count_ = 0;
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

// Adds `count` tiles of products of one or two row tiles and one or two panels to the sums; drains the block before, and
// lets `fetch(t)` ask for what will be wanted later.
template <bool kInt, bool kTwoRows, bool kTwoPanels, class Fetch>
inline void multiply_tiles(const uint8_t* a0, const uint8_t* a1, const uint8_t* b0, const uint8_t* b1, int64_t count,
                           const Fetch& fetch, Drain<kInt>& drain, int share) {
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
        fetch(t);
        drain.some(share);
    }
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// The sums leave the tiles; the block before has left its memory.
template <bool kInt, bool kTwoRows, bool kTwoPanels>
inline void store_sums(Drain<kInt>& drain, int64_t row, int64_t panel, int64_t chunk) {
    drain.some(32);
    uint8_t* sums = drain.next_sums();
    _tile_stored(0, sums, 64);
    if constexpr (kTwoPanels) _tile_stored(1, sums + kTileBytes, 64);
    if constexpr (kTwoRows) _tile_stored(2, sums + 2 * kTileBytes, 64);
    if constexpr (kTwoRows && kTwoPanels) _tile_stored(3, sums + 3 * kTileBytes, 64);
    drain.begin(sums, row, panel, kTwoPanels, chunk);
}

struct Weights {
    const uint8_t* tiles[2];   // of the two panels, packed as stored
    const uint8_t* groups[2];  // int4
};

// One chunk, rows `row` to `row + 32`; weights as they are stored, or unpacked by the caller.
template <bool kInt, bool kTwoRows, bool kTwoPanels, class Fetch>
void block(const Target& to, Drain<kInt>& drain, int64_t row, int64_t panel, int64_t chunk, const uint8_t* b0,
           const uint8_t* b1, const Fetch& fetch) {
    const int64_t tiles = num_tiles(to.w), first = chunk * kChunkTiles;
    const int64_t count = std::min(kChunkTiles, tiles - first);
    auto* a0 = static_cast<const uint8_t*>(to.rows.data) + (row / 16 * tiles + first) * kTileBytes;
    zero_sums();
    multiply_tiles<kInt, kTwoRows, kTwoPanels>(a0, a0 + tiles * kTileBytes, b0, b1, count, fetch, drain,
                                                 int((drain.left() + count - 1) / count));
    store_sums<kInt, kTwoRows, kTwoPanels>(drain, row, panel, chunk);
}

// As `block`, for int4 and few rows: tiles are unpacked `kAhead` before they are multiplied, so that they have reached the
// cache by then, and vectors unpack while tiles multiply.
template <bool kTwoRows, bool kTwoPanels>
void block_int4(const Target& to, Drain<true>& drain, int64_t row, int64_t panel, int64_t chunk, const Weights& from,
                uint8_t* unpacked) {
    const int64_t tiles = num_tiles(to.w), first = chunk * kChunkTiles;
    const int64_t end = std::min(tiles, first + kChunkTiles);
    const auto place = [&](int64_t t, int p) { return unpacked + (t % (2 * kAhead) * 2 + p) * kTileBytes; };
    const auto unpack = [&](int64_t t) {
        for (int p = 0; p < (kTwoPanels ? 2 : 1); p++) {
            const uint8_t* packed = from.tiles[p] + t * (kTileBytes / 2);
            for (int line = 0; line < 8; line++) _mm_prefetch(packed + kAheadBytes + line * 64, _MM_HINT_T1);
            unpack_int4(packed, from.groups[p], t, to.w.group, place(t, p));
        }
    };
    for (int64_t t = first; t < std::min(end, first + kAhead); t++) unpack(t);
    auto* a = static_cast<const uint8_t*>(to.rows.data) + row / 16 * tiles * kTileBytes;
    zero_sums();
    for (int64_t t = first; t < end; t++) {
        if (t + kAhead < end) unpack(t + kAhead);
        const uint8_t* a0 = a + t * kTileBytes;
        multiply_tiles<true, kTwoRows, kTwoPanels>(a0, a0 + tiles * kTileBytes, place(t, 0), place(t, 1), 1,
                                                   [](int64_t) {}, drain, 2);
    }
    store_sums<true, kTwoRows, kTwoPanels>(drain, row, panel, chunk);
}

// All rows, one or two panels: every weight is read from memory once.
template <bool kInt, bool kTwoPanels>
void few_rows(const Target& to, Drain<kInt>& drain, int64_t panel, uint8_t* unpacked) {
    const Matrix& w = to.w;
    const int64_t bytes = panel_bytes(w);
    auto* data = static_cast<const uint8_t*>(w.data) + panel * bytes;
    Weights from{{data, data + bytes}, {nullptr, nullptr}};
    if (w.kind == kInt4)
        for (int p = 0; p < 2; p++) from.groups[p] = w.group_scale + (panel + p) * num_groups(w) * 32;
    for (int64_t chunk = 0; chunk < num_chunks(num_tiles(w)); chunk++) {
        const uint8_t* b0 = from.tiles[0] + chunk * kChunkTiles * kTileBytes;
        const uint8_t* b1 = from.tiles[kTwoPanels ? 1 : 0] + chunk * kChunkTiles * kTileBytes;
        for (int64_t row = 0; row < to.rows.m; row += 32) {
            const bool two = row + 16 < to.rows.m;
            if constexpr (kInt) {
                if (w.kind == kInt4) {
                    two ? block_int4<true, kTwoPanels>(to, drain, row, panel, chunk, from, unpacked)
                        : block_int4<false, kTwoPanels>(to, drain, row, panel, chunk, from, unpacked);
                    continue;
                }
            }
            const auto fetch = [&](int64_t t) {
                for (int64_t i = 0; i < kTileBytes; i += 64) {
                    _mm_prefetch(b0 + kAheadBytes + t * kTileBytes + i, _MM_HINT_T1);
                    _mm_prefetch(b1 + kAheadBytes + t * kTileBytes + i, _MM_HINT_T1);
                }
            };
            two ? block<kInt, true, kTwoPanels>(to, drain, row, panel, chunk, b0, b1, fetch)
                : block<kInt, false, kTwoPanels>(to, drain, row, panel, chunk, b0, b1, fetch);
        }
    }
}

// One chunk of two panels (or of the last, odd one) against a block of rows; the next panels' weights are fetched
// meanwhile.
template <bool kInt, bool kTwoPanels>
void many_rows(const Target& to, Drain<kInt>& drain, int64_t first_row, int64_t last_row, int64_t panel, bool more,
               int64_t chunk, uint8_t* unpacked) {
    const Matrix& w = to.w;
    const int64_t tiles = num_tiles(w), bytes = panel_bytes(w), stored_tile = bytes / tiles;
    const int64_t first = chunk * kChunkTiles, count = std::min(kChunkTiles, tiles - first);
    auto* begin = static_cast<const uint8_t*>(w.data) + panel * bytes + first * stored_tile;
    const uint8_t* b[2] = {begin, kTwoPanels ? begin + bytes : begin};
    if (w.kind == kInt4)
        for (int p = 0; p < (kTwoPanels ? 2 : 1); p++) {
            const uint8_t* groups = w.group_scale + (panel + p) * num_groups(w) * 32;
            uint8_t* to_tiles = unpacked + p * kChunkTiles * kTileBytes;
            for (int64_t t = 0; t < count; t++)
                unpack_int4(b[p] + t * stored_tile, groups, first + t, w.group, to_tiles + t * kTileBytes);
            b[p] = to_tiles;
        }
    const int64_t blocks = (last_row - first_row + 31) / 32, share = round_up((stored_tile + blocks - 1) / blocks, 64);
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t row = first_row + i * 32, at = i * count * share;
        const uint8_t* next = begin + 2 * bytes + at;
        const int64_t fetched = more && at < count * stored_tile ? share : 0;
        const auto fetch = [&](int64_t t) {
            for (int64_t b = t * fetched; b < (t + 1) * fetched; b += 64) {
                _mm_prefetch(next + b, _MM_HINT_T1);
                _mm_prefetch(next + bytes + b, _MM_HINT_T1);
            }
        };
        if (row + 16 < last_row)
            block<kInt, true, kTwoPanels>(to, drain, row, panel, chunk, b[0], b[1], fetch);
        else
            block<kInt, false, kTwoPanels>(to, drain, row, panel, chunk, b[0], b[1], fetch);
    }
}

template <bool kInt>
void multiply_kind(const Target& to, int64_t first_panel, int64_t last_panel, uint8_t* scratch) {
    const Matrix& w = to.w;
    Drain<kInt> drain(to, scratch);
    uint8_t* unpacked = scratch + 8 * kTileBytes;
    const int64_t chunks = num_chunks(num_tiles(w)), m = to.rows.m;
    // With more rows than one block has, codes would be unpacked again for each.
    if (m <= (w.kind == kInt4 ? 32 : kFewRows)) {
        for (int64_t panel = first_panel; panel < last_panel; panel += 2)
            panel + 1 < last_panel ? few_rows<kInt, true>(to, drain, panel, unpacked)
                                   : few_rows<kInt, false>(to, drain, panel, unpacked);
        drain.some(32);
        return;
    }
    const auto chunk_of = [&](int64_t first_row, int64_t last_row, int64_t panel, int64_t chunk) {
        const bool more = panel + 3 < last_panel;
        panel + 1 < last_panel ? many_rows<kInt, true>(to, drain, first_row, last_row, panel, more, chunk, unpacked)
                               : many_rows<kInt, false>(to, drain, first_row, last_row, panel, false, chunk, unpacked);
    };
    // Gated sums stay in scratch memory until they are whole: all chunks of a pair of panels follow one another, and
    // so fewer rows at a time fit the cache.
    const int64_t rows = w.gated ? std::max<int64_t>(64, kBlockRows / chunks / 32 * 32) : kBlockRows;
    for (int64_t first = 0; first < m; first += rows) {
        const int64_t last = std::min(m, first + rows);
        if (w.gated)
            for (int64_t panel = first_panel; panel < last_panel; panel += 2)
                for (int64_t chunk = 0; chunk < chunks; chunk++) chunk_of(first, last, panel, chunk);
        else
            for (int64_t chunk = 0; chunk < chunks; chunk++)
                for (int64_t panel = first_panel; panel < last_panel; panel += 2) chunk_of(first, last, panel, chunk);
    }
    drain.some(32);
}

}  // namespace

void multiply(const Matrix& w, const Rows& rows, const Out& out, int64_t first_panel, int64_t last_panel,
              Scratch& scratch) {
    // Integer sums are exact, so whichever instructions make them give the same bits: with few rows, vectors need not
    // wait until codes that were just written can be read as a tile.
    const bool vectors = !is_tiled(w.kind) || (w.kind != kBF16 && rows.m <= kVectorRows);
    if (vectors) return avx512::table.multiply(w, rows, out, first_panel, last_panel, scratch);
    const TileConfig config;
    _tile_loadconfig(&config);
    const size_t tiles_bytes = size_t(8 + 2 * kChunkTiles) * kTileBytes;
    auto* memory = scratch.get_as<uint8_t>(tiles_bytes + kBlockRows * 2 * kPanel * sizeof(float));
    const Target to{w, rows, out, reinterpret_cast<float*>(memory + tiles_bytes)};
    if (w.kind == kBF16)
        multiply_kind<false>(to, first_panel, last_panel, memory);
    else
        multiply_kind<true>(to, first_panel, last_panel, memory);
    _tile_release();
}

}  // namespace amx
}  // namespace seamount
