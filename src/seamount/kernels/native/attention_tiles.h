// Tiles of attention: how a unit's work lies in memory, and the softmax between the two products.
//
//   queries  [row/16][D/32] tiles:   pair of d (16) x row (16) x 2
//   scores   [row/16][key]:          row (16), fp32
//   weights  [row/16][key/32] tiles: row (16) x key (32)
//   values   [key/32][Dv/16] tiles:  pair of keys (16) x column (16) x 2
//   partial  maxima [rows], sums [rows], then sums of values [rows][Dv], rows a multiple of 16, Dv of 32
#pragma once

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

}  // namespace
}  // namespace amx
}  // namespace seamount
