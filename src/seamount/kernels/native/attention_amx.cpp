// Attention with AMX tiles over bfloat16 caches: 32 query rows at a time, fp32 sums and softmax.
//
// Scores come out transposed, keys x rows: a tile of 16 keys is then read straight from the cache, and the softmax goes
// down the keys with one row per lane. Values are interleaved in pairs of keys, as the tile product wants its second
// operand; the interleaving works within 128-bit lanes, so the columns of the sums are permuted until `finish`.

#include "attention_products.h"

namespace seamount {
namespace amx {
namespace {

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
