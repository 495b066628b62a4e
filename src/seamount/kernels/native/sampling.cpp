// From logits to what a token is drawn from: the likeliest of each row, and the candidates of one row.

#include "matrix.h"

SEAMOUNT_API void seamount_argmax(const float* x, int64_t stride, int64_t rows, int64_t count, float* values,
                                  int64_t* indices) {
    seamount::parallel(rows, [&](int64_t r, int) { seamount::functions->argmax(x + r * stride, count, values + r, indices + r); });
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
