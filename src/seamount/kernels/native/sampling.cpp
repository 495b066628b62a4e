// From logits to what a token is drawn from: the likeliest of each row, and the candidates of one row.

#include "matrix.h"

#define SEAMOUNT_TARGET plain
#include "vector.h"

namespace seamount {
namespace {

using namespace plain;

// The first index of the largest value; a NaN anywhere is the largest.
void argmax(const float* x, int64_t count, float* value, int64_t* index) {
    f32x16 top = splat(-__builtin_inff());
    u32x16 bad = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const f32x16 v = load<f32x16>(x + i);
        top = larger(v, top);
        bad |= (u32x16)(v != v);
    }
    float best = largest(top);
    bool any_bad = false;
    for (int lane = 0; lane < 16; lane++) any_bad |= bad[lane] != 0;
    for (; i < count; i++) {
        best = x[i] > best ? x[i] : best;
        any_bad |= x[i] != x[i];
    }
    for (i = 0; i < count; i++)
        if (any_bad ? x[i] != x[i] : x[i] == best) break;
    *value = any_bad ? __builtin_nanf("") : best;
    *index = i < count ? i : 0;
}

}  // namespace
}  // namespace seamount

SEAMOUNT_API void seamount_argmax(const float* x, int64_t stride, int64_t rows, int64_t count, float* values,
                                  int64_t* indices) {
    seamount::parallel(rows, [&](int64_t r, int) { seamount::argmax(x + r * stride, count, values + r, indices + r); });
}

// Weights e^((x - best) / temperature) of one row: writes the columns whose weight is at least `floor`, in order, with
// their weights, and the sum of all weights. Returns how many; `ids` and `weights` have room for `count`.
SEAMOUNT_API int64_t seamount_candidates(const float* x, int64_t count, float best, float inverse_temperature,
                                         float floor, int64_t* ids, float* weights, double* total) {
    *total = seamount::functions->weigh(x, count, best, inverse_temperature, weights);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        const float weight = weights[i];
        ids[kept] = i;
        weights[kept] = weight;
        kept += weight >= floor;
    }
    return kept;
}
