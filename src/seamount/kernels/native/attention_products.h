// The two products of attention with AMX tiles: queries with keys, weights with values; and the way of keys and values
// from the cache into tiles.
#pragma once

#include "attention_tiles.h"

namespace seamount {
namespace amx {
namespace {

// Fetches the keys and values of the piece of work that comes next into the second-level cache, a little with every
// step of the present one, so that memory never rests while tiles multiply.
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
        const char* first = static_cast<const char*>(w.groups[g].data);
        const char* second = static_cast<const char*>(w.groups[g + 1].data);
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

// Interleaves 32 columns of 32 keys in pairs, to two tiles. Returns the columns with a value that is not finite and
// that only some rows see.
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

// Weighted sums of the values of `num_chunks` chunks of 32 keys, for one or two row groups. Values are packed already,
// or (few rows) on the way, through a small buffer; then it returns whether those that only some rows see are finite.
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

// Finds where each group of 16 keys lies: in the cache, if its slots follow each other and D fills tiles, else in a
// copy with zeros behind D. Units of many rows read keys often: they copy them, to have them close and in a row.
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

}  // namespace
}  // namespace amx
}  // namespace seamount
