// Attention with AMX tiles over bfloat16 caches: 32 query rows at a time, fp32 sums and softmax.
//
// Scores come out transposed, keys x rows: a tile of 16 keys is then read straight from the cache, and the softmax goes
// down the keys with one row per lane. Values are interleaved in pairs of keys, as the tile product wants its second
// operand; the interleaving works within 128-bit lanes, so the columns of the sums are permuted until `finish`.
//
//   queries  [row/16][D/32] tiles:   pair of d (16) x row (16) x 2
//   scores   [row/16][key]:          row (16), fp32
//   weights  [row/16][key/32] tiles: row (16) x key (32)
//   values   [key/32][Dv/16] tiles:  pair of keys (16) x column (16) x 2
//   partial  maxima [rows], sums [rows], then sums of values [rows][Dv], rows a multiple of 16, Dv of 32

#include <immintrin.h>

#include "attention.h"

namespace seamount {
namespace amx {
namespace {

constexpr int kTile = 1024;
constexpr int kKeyGroups = kSplit / 16;
constexpr int kFewRows = 32;  // up to these many, memory is what a unit waits for

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct KeyGroup {
    const void* data;
    size_t stride;
};

// Everything a unit needs on its thread; the same memory serves all its splits.
struct Work {
    int rows, steps, columns;  // rows rounded to 16; tiles of 32 along D; Dv rounded to 32
    char *queries, *weights, *values, *keys;
    float *scores, *spare;
    int32_t* visible;
    int64_t *slots, *next_slots;
    KeyGroup groups[kKeyGroups];
};

int row_limit(const Attention& a) { return a.width + a.value_width <= 512 ? 256 : 64; }

// Cuts scratch into pieces; with no scratch, only measures.
size_t lay_out(const Attention& a, char* scratch, Work& w) {
    w.steps = round_to(a.width, 32) / 32;
    w.columns = round_to(a.value_width, 32);
    size_t used = 0;
    const auto take = [&](size_t bytes) {
        char* piece = scratch ? scratch + used : nullptr;
        used += (bytes + 63) & ~size_t(63);
        return piece;
    };
    w.queries = take(size_t(row_limit(a) / 16 * w.steps) * kTile);
    w.weights = take(size_t(2 * kSplit / 32) * kTile);
    w.values = take(size_t(kSplit / 32 * w.columns / 16) * kTile);
    w.keys = take(size_t(kSplit) * size_t(w.steps) * 64);
    w.scores = reinterpret_cast<float*>(take(2 * kSplit * 64));
    w.spare = reinterpret_cast<float*>(take(32 * size_t(w.columns) * 4));
    w.visible = reinterpret_cast<int32_t*>(take(size_t(row_limit(a)) * 4));
    w.slots = reinterpret_cast<int64_t*>(take(kSplit * 8));
    w.next_slots = reinterpret_cast<int64_t*>(take(kSplit * 8));
    return used;
}

struct Partial {
    float *maxima, *sums, *values;
    Partial(float* data, int rows) : maxima(data), sums(data + rows), values(data + 2 * rows) {}
};

// Transposes 16 rows of 16 dwords; `from` may have any stride, `to` is a tile.
inline void transpose(const void* from, size_t stride, void* to) {
    const char* source = static_cast<const char*>(from);
    __m512 out[16];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        __m512 x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const auto part = [&](int row) {
                return _mm_loadu_ps(reinterpret_cast<const float*>(source + size_t(row) * stride + k * 16));
            };
            __m512 v = _mm512_castps128_ps512(part(i));
            v = _mm512_mask_broadcast_f32x4(v, 0x00f0, part(i + 4));
            v = _mm512_mask_broadcast_f32x4(v, 0x0f00, part(i + 8));
            x[i] = _mm512_mask_broadcast_f32x4(v, 0xf000, part(i + 12));
        }
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
        const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
        const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
        const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
        out[4 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        out[4 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        out[4 * k + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        out[4 * k + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_ps(static_cast<float*>(to) + 16 * i, out[i]);
}

// 2^t for t <= 0 to 2e-7; exact at 0 and at minus infinity.
inline __m512 power_of_two(__m512 t) {
    const __m512 r = _mm512_reduce_ps(t, 8);
    __m512 p = _mm512_set1_ps(0.00132647273f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00967151299f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0555073358f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240222424f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693147004f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, _mm512_sub_ps(t, r));
}

// One chunk of 32 keys of one row group: scores become weights. Adds to the running sum in the order of the keys.
template <bool kMasked>
inline __m512 weigh(const float* scores, int first_key, __m512i visible, __m512 top, __m512 factor, __m512 sum,
                    char* tile) {
    alignas(64) char pairs[kTile];
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const auto weight = [&](int key) {
        const __m512 distance = _mm512_sub_ps(_mm512_load_ps(scores + 16 * key), top);
        const __m512 p = power_of_two(_mm512_mul_ps(distance, factor));
        if constexpr (!kMasked) return p;
        return _mm512_maskz_mov_ps(_mm512_cmpgt_epi32_mask(visible, _mm512_set1_epi32(first_key + key)), p);
    };
#pragma GCC unroll 2
    for (int i = 0; i < 16; i++) {
        const __m512 even = weight(2 * i), odd = weight(2 * i + 1);
        sum = _mm512_add_ps(_mm512_add_ps(sum, even), odd);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_store_si512(pairs + 64 * i, _mm512_permutexvar_epi16(interleave, both));
    }
    transpose(pairs, 64, tile);
    return sum;
}

// Softmax of 16 rows over `num_keys` (a multiple of 32) of one split, not divided by its sum.
void softmax(const float* scores, int num_keys, const int32_t* visible_keys, float scale, char* weights, float* maxima,
             float* sums) {
    const __m512i visible = _mm512_load_si512(visible_keys);
    const int seen_by_all = _mm512_reduce_min_epi32(visible);
    const __m512 lowest = _mm512_set1_ps(-HUGE_VALF);
    __m512 top = lowest, other = lowest;
    int key = 0;
    for (; key + 2 <= seen_by_all; key += 2) {
        top = _mm512_max_ps(top, _mm512_load_ps(scores + 16 * key));
        other = _mm512_max_ps(other, _mm512_load_ps(scores + 16 * key + 16));
    }
    for (; key < num_keys; key++) {
        const __mmask16 seen = _mm512_cmpgt_epi32_mask(visible, _mm512_set1_epi32(key));
        top = _mm512_mask_max_ps(top, seen, top, _mm512_load_ps(scores + 16 * key));
    }
    top = _mm512_max_ps(top, other);
    _mm512_store_ps(maxima, top);
    // A row that sees no key of this split: its weights are masked, and its maximum must not make NaN of them.
    const __m512 base = _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, lowest, _CMP_EQ_OQ), _mm512_setzero_ps());
    const __m512 factor = _mm512_set1_ps(scale * 1.44269504f);
    __m512 sum = _mm512_setzero_ps();
    for (int first = 0; first < num_keys; first += 32, weights += kTile) {
        const float* chunk = scores + 16 * first;
        sum = first + 32 <= seen_by_all ? weigh<false>(chunk, first, visible, base, factor, sum, weights)
                                        : weigh<true>(chunk, first, visible, base, factor, sum, weights);
    }
    _mm512_store_ps(sums, sum);
}

// Fetches the keys and values of the piece of work that comes next into the second-level cache, a little with every step
// of the present one, so that memory never rests while tiles multiply.
class Fetcher {
   public:
    Fetcher(const Attention& a, const Piece* next, int64_t* slots) : slots_(slots) {
        if (!next) return;
        const Unit& unit = *next->unit;
        const int start = next->split * kSplit;
        num_keys_ = num_visible(a, unit, unit.first_row + unit.num_rows - 1, start);
        find_slots(*a.pages, unit.sequence, start, num_keys_, slots);
        keys_ = rows(a.keys, unit.kv_head, a.width, a.key_stride);
        values_ = rows(a.values, unit.kv_head, a.value_width, a.value_stride);
        num_rows_ = a.keys == a.values ? num_keys_ : 2 * num_keys_;
    }
    // To be called with `done` growing to `total`: fetches that share of all rows, keys first.
    void reach(int done, int total) {
        for (const int end = num_rows_ * done / total; done_ < end; done_++)
            done_ < num_keys_ ? fetch(keys_, slots_[done_]) : fetch(values_, slots_[done_ - num_keys_]);
    }

    struct Rows {
        const char* first;
        int64_t stride;
        int lines;
    };
    static Rows rows(const void* cache, int head, int width, int64_t stride) {
        return {static_cast<const char*>(cache) + int64_t(head) * width * 2, stride * 2, (width * 2 + 63) / 64};
    }
    static void fetch(const Rows& rows, int64_t slot) {
        const char* line = rows.first + slot * rows.stride;
        for (int i = 0; i < rows.lines; i++) _mm_prefetch(line + 64 * i, _MM_HINT_T1);
    }

   private:
    const int64_t* slots_;
    Rows keys_ = {}, values_ = {};
    int num_keys_ = 0, num_rows_ = 0, done_ = 0;
};

// Scores of `num_groups` (a multiple of 2) groups of 16 keys for one or two row groups.
template <int kRowGroups>
void score(const Work& w, const char* queries, int num_groups, Fetcher& fetcher) {
    const char* more_queries = queries + w.steps * kTile;
    float* more_scores = w.scores + kSplit * 16;
    for (int g = 0; g < num_groups; g += 2) {
        fetcher.reach(g + 2, 2 * num_groups);
        const char *first = static_cast<const char*>(w.groups[g].data), *second = static_cast<const char*>(w.groups[g + 1].data);
        const size_t first_stride = w.groups[g].stride, second_stride = w.groups[g + 1].stride;
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kRowGroups == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int step = 0; step < w.steps; step++) {
            _tile_loadd(4, first + 64 * step, first_stride);
            _tile_loadd(6, queries + kTile * step, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, second + 64 * step, second_stride);
            _tile_dpbf16ps(1, 5, 6);
            if constexpr (kRowGroups == 2) {
                _tile_loadd(7, more_queries + kTile * step, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, w.scores + 256 * g, 64);
        _tile_stored(1, w.scores + 256 * g + 256, 64);
        if constexpr (kRowGroups == 2) {
            _tile_stored(2, more_scores + 256 * g, 64);
            _tile_stored(3, more_scores + 256 * g + 256, 64);
        }
    }
}

// Where a unit's values lie in the cache.
struct Values {
    const uint16_t* base;
    int64_t stride;
    const int64_t* slots;
    int width, count, seen_by_all;  // keys from `count` on are zeros

    Values(const Attention& a, const Unit& unit, const Work& w, int num_keys, int num_seen_by_all)
        : base(static_cast<const uint16_t*>(a.values) + int64_t(unit.kv_head) * a.value_width),
          stride(a.value_stride),
          slots(w.slots),
          width(a.value_width),
          count(num_keys),
          seen_by_all(num_seen_by_all) {}
};

// Interleaves 32 columns of 32 keys in pairs, to two tiles. Returns the columns with a value that is not finite and that
// only some rows see.
inline __mmask32 pack_chunk(const Values& v, int first_key, int column, char* to) {
    if (first_key + 32 <= std::min(v.count, v.seen_by_all) && column + 32 <= v.width) {
#pragma GCC unroll 4
        for (int key = first_key; key < first_key + 32; key += 2, to += 64) {
            const __m512i x = _mm512_loadu_si512(v.base + v.slots[key] * v.stride + column);
            const __m512i y = _mm512_loadu_si512(v.base + v.slots[key + 1] * v.stride + column);
            _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
            _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(x, y));
        }
        return 0;
    }
    const int width = std::min(32, v.width - column);
    const __mmask32 part = width == 32 ? ~0u : (1u << width) - 1;
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 bad = 0;
    const auto load = [&](int key) {
        if (key >= v.count) return _mm512_setzero_si512();
        const __m512i x = _mm512_maskz_loadu_epi16(part, v.base + v.slots[key] * v.stride + column);
        if (key >= v.seen_by_all) bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
        return x;
    };
    for (int key = first_key; key < first_key + 32; key += 2, to += 64) {
        const __m512i x = load(key), y = load(key + 1);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
        _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(x, y));
    }
    return bad;
}

// Packs all values, for units of many rows, which use them often. Returns whether those that only some rows see are
// finite.
bool pack_values(const Work& w, const Values& v) {
    __mmask32 bad = 0;
    for (int key = 0; key < v.count; key += 32)
        for (int column = 0; column < w.columns; column += 32)
            bad |= pack_chunk(v, key, column, w.values + size_t(key / 32 * (w.columns / 16) + column / 16) * kTile);
    return bad == 0;
}

// Weighted sums of the values of `num_chunks` chunks of 32 keys, for one or two row groups. Values are packed already, or
// (few rows) on the way, through a small buffer; then it returns whether those that only some rows see are finite.
template <int kRowGroups, bool kPacked>
bool mix(const Work& w, const Values& v, int num_chunks, float* out, Fetcher* fetcher) {
    const char* more_weights = w.weights + kSplit / 32 * kTile;
    const size_t stride = size_t(w.columns) * 4;
    const int num_steps = num_chunks * w.columns / 32;
    int step = 0;
    __mmask32 bad = 0;
    for (int column = 0; column < w.columns; column += 32) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kRowGroups == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int chunk = 0; chunk < num_chunks; chunk++, step++) {
            const char* values = w.values + size_t(chunk * (w.columns / 16) + column / 16) * kTile;
            if constexpr (!kPacked) {
                fetcher->reach(num_steps + step + 1, 2 * num_steps);
                char* buffer = w.values + step % 4 * 2 * kTile;
                bad |= pack_chunk(v, 32 * chunk, column, buffer);
                values = buffer;
            }
            _tile_loadd(4, w.weights + kTile * chunk, 64);
            _tile_loadd(6, values, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, values + kTile, 64);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (kRowGroups == 2) {
                _tile_loadd(5, more_weights + kTile * chunk, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out + column, stride);
        _tile_stored(1, out + column + 16, stride);
        if constexpr (kRowGroups == 2) {
            _tile_stored(2, out + 16 * w.columns + column, stride);
            _tile_stored(3, out + 16 * w.columns + column + 16, stride);
        }
    }
    return bad == 0;
}

// Finds where each group of 16 keys lies: in the cache, if its slots follow each other and D fills tiles, else in a copy
// with zeros behind D. Units of many rows read keys often: they copy them, to have them close and in a row.
// What lies behind the last key is never used: its scores are masked.
void find_keys(const Attention& a, const Unit& unit, Work& w, int count) {
    const uint16_t* base = static_cast<const uint16_t*>(a.keys) + int64_t(unit.kv_head) * a.width;
    const bool in_place = a.width % 32 == 0 && a.pages->block_size % 16 == 0 && unit.num_rows <= kFewRows;
    const size_t row_bytes = size_t(w.steps) * 64;
    for (int g = 0; g < round_to(count, 32) / 16; g++) {
        const int64_t* slots = w.slots + 16 * g;
        if (in_place && 16 * g < count) {
            w.groups[g] = {base + slots[0] * a.key_stride, size_t(a.key_stride) * 2};
            continue;
        }
        char* copy = w.keys + size_t(g) * 16 * row_bytes;
        w.groups[g] = {copy, row_bytes};
        for (int i = 0; i < std::min(16, count - 16 * g); i++, copy += row_bytes) {
            const uint16_t* key = base + slots[i] * a.key_stride;
            int d = 0;
            for (; d + 32 <= a.width; d += 32) _mm512_store_si512(copy + 2 * d, _mm512_loadu_si512(key + d));
            if (d < a.width)
                _mm512_store_si512(copy + 2 * d, _mm512_maskz_loadu_epi16((1u << (a.width - d)) - 1, key + d));
        }
    }
}

class Kernel final : public AttentionKernel {
   public:
    int max_rows(const Attention& a) const override { return row_limit(a); }

    size_t scratch_bytes(const Attention& a) const override {
        Work w;
        return lay_out(a, nullptr, w);
    }

    size_t partial_floats(const Attention& a, int num_rows) const override {
        return size_t(round_to(num_rows, 16)) * size_t(round_to(a.value_width, 32) + 2);
    }

    void prepare(const Attention& a, const Unit& unit, void* scratch) const override {
        Work w;
        lay_out(a, static_cast<char*>(scratch), w);
        const size_t row_bytes = size_t(w.steps) * 64;
        const auto mask = [](int count) { return __mmask16((1u << std::clamp(count, 0, 16)) - 1); };
        for (int group = 0; group < round_to(unit.num_rows, 16) / 16; group++) {
            char* rows = w.keys;
            for (int i = 0; i < 16; i++) {
                const bool real = group * 16 + i < unit.num_rows;
                const float* q = query_row(a, unit, unit.first_row + (real ? group * 16 + i : 0));
                for (int d = 0; d < 32 * w.steps; d += 32) {
                    const __m512 low = _mm512_maskz_loadu_ps(mask(real ? a.width - d : 0), q + d);
                    const __m512 high = _mm512_maskz_loadu_ps(mask(real ? a.width - d - 16 : 0), q + d + 16);
                    _mm512_store_si512(rows + size_t(i) * row_bytes + 2 * d, (__m512i)_mm512_cvtne2ps_pbh(high, low));
                }
            }
            for (int step = 0; step < w.steps; step++)
                transpose(rows + 64 * step, row_bytes, w.queries + size_t(group * w.steps + step) * kTile);
        }
    }

    void attend(const Attention& a, const Piece& piece, const Piece* next, void* scratch, float* data) const override {
        const Unit& unit = *piece.unit;
        Work w;
        lay_out(a, static_cast<char*>(scratch), w);
        w.rows = round_to(unit.num_rows, 16);
        const int start = piece.split * kSplit;
        for (int i = 0; i < w.rows; i++)
            w.visible[i] = num_visible(a, unit, unit.first_row + std::min(i, unit.num_rows - 1), start);
        const int count = w.visible[w.rows - 1];
        find_slots(*a.pages, unit.sequence, start, count, w.slots);
        find_keys(a, unit, w, count);
        const TileConfig config;
        _tile_loadconfig(&config);
        const Values values(a, unit, w, count, w.visible[0]);
        const Partial partial(data, w.rows);
        const bool few = unit.num_rows <= kFewRows;
        Fetcher fetcher(a, few ? next : nullptr, w.next_slots);
        bool clean = few || pack_values(w, values);
        for (int row = 0; row < w.rows; row += 32) {
            const int groups = std::min(2, (w.rows - row) / 16);
            const int num_keys = round_to(w.visible[row + 16 * groups - 1], 32);
            const char* queries = w.queries + row / 16 * w.steps * kTile;
            groups == 2 ? score<2>(w, queries, num_keys / 16, fetcher) : score<1>(w, queries, num_keys / 16, fetcher);
            for (int g = 0; g < groups; g++)
                softmax(w.scores + g * kSplit * 16, num_keys, w.visible + row + 16 * g, a.scale,
                        w.weights + g * (kSplit / 32) * kTile, partial.maxima + row + 16 * g,
                        partial.sums + row + 16 * g);
            float* out = partial.values + row * w.columns;
            const int chunks = num_keys / 32;
            if (!few)
                groups == 2 ? mix<2, true>(w, values, chunks, out, nullptr)
                            : mix<1, true>(w, values, chunks, out, nullptr);
            else
                clean = groups == 2 ? mix<2, false>(w, values, chunks, out, &fetcher)
                                    : mix<1, false>(w, values, chunks, out, &fetcher);
            if (!clean) mix_by_token(a, unit, w, row, groups, partial);
        }
        _tile_release();
    }

    void merge(const Attention& a, const Unit& unit, float* into, const float* next) const override {
        const int rows = round_to(unit.num_rows, 16), columns = round_to(a.value_width, 32);
        const Partial total(into, rows), part(const_cast<float*>(next), rows);
        const __m512 factor = _mm512_set1_ps(a.scale * 1.44269504f);
        alignas(64) float old_weight[16], new_weight[16];
        for (int row = 0; row < rows; row++) {
            if (row % 16 == 0) {
                const __m512 x = _mm512_loadu_ps(total.maxima + row), y = _mm512_loadu_ps(part.maxima + row);
                const __m512 top = _mm512_max_ps(x, y);
                const __m512 u = power_of_two(_mm512_mul_ps(_mm512_sub_ps(x, top), factor));
                const __m512 v = power_of_two(_mm512_mul_ps(_mm512_sub_ps(y, top), factor));
                const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(total.sums + row), u);
                _mm512_storeu_ps(total.sums + row, _mm512_fmadd_ps(_mm512_loadu_ps(part.sums + row), v, sum));
                _mm512_storeu_ps(total.maxima + row, top);
                _mm512_store_ps(old_weight, u);
                _mm512_store_ps(new_weight, v);
            }
            const __m512 u = _mm512_set1_ps(old_weight[row % 16]), v = _mm512_set1_ps(new_weight[row % 16]);
            float* to = total.values + row * columns;
            const float* from = part.values + row * columns;
            for (int i = 0; i < columns; i += 16)
                _mm512_storeu_ps(to + i, _mm512_fmadd_ps(_mm512_loadu_ps(from + i), v,
                                                         _mm512_mul_ps(_mm512_loadu_ps(to + i), u)));
        }
    }

    void finish(const Attention& a, const Unit& unit, const float* data) const override {
        const int rows = round_to(unit.num_rows, 16), columns = round_to(a.value_width, 32);
        const Partial partial(const_cast<float*>(data), rows);
        const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int row = 0; row < unit.num_rows; row++) {
            const __m512 factor = _mm512_set1_ps(1.0f / partial.sums[row]);
            float* out = out_row(a, unit, unit.first_row + row);
            for (int i = 0; i < columns; i += 32) {
                const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(partial.values + row * columns + i), factor);
                const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(partial.values + row * columns + i + 16), factor);
                const int left = a.value_width - i;
                const auto mask = [](int n) { return __mmask16((1u << std::clamp(n, 0, 16)) - 1); };
                _mm512_mask_storeu_ps(out + i, mask(left), _mm512_permutex2var_ps(low, first, high));
                _mm512_mask_storeu_ps(out + i + 16, mask(left - 16), _mm512_permutex2var_ps(low, second, high));
            }
        }
    }

   private:
    // A value that some rows must not see is not finite, and zero times it is NaN: mix once per token, with the values
    // behind that token's position taken as zeros.
    static void mix_by_token(const Attention& a, const Unit& unit, const Work& w, int row, int groups,
                             const Partial& partial) {
        const int end = std::min(row + 16 * groups, unit.num_rows);
        for (int first = row, last; first < end; first = last) {
            for (last = first + 1; last < end && w.visible[last] == w.visible[first];) last++;
            if (w.visible[first] == 0) continue;
            const Values values(a, unit, w, w.visible[first], kSplit);
            pack_values(w, values);
            mix<2, true>(w, values, round_to(w.visible[first], 32) / 32, w.spare, nullptr);
            std::memcpy(partial.values + first * w.columns, w.spare + (first - row) * w.columns,
                        size_t((last - first) * w.columns) * 4);
        }
        pack_values(w, Values(a, unit, w, w.visible[w.rows - 1], kSplit));
    }
};

}  // namespace

const AttentionKernel& attention_kernel() {
    static const Kernel kernel;
    return kernel;
}

}  // namespace amx
}  // namespace seamount
