// Between a projection and attention: norms of heads, rotary angles, and the write to the cache.
//
// Tokens are computed one by one, in an order that only the widths decide. The work is small beside the products before
// it and the attention behind it, so one baseline build serves every chip.

#include <algorithm>

#define SEAMOUNT_TARGET plain
#include "vector.h"

namespace seamount {
namespace {

using namespace plain;

// Fewer tokens than this are not worth waking another thread for.
constexpr int64_t kTokensPerTask = 16;

template <class F>
void for_tokens(int64_t count, F&& body) {
    parallel((count + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
        const int64_t end = std::min(count, (task + 1) * kTokensPerTask);
        for (int64_t t = task * kTokensPerTask; t < end; t++) body(t);
    });
}

// weight * x / root of the mean square, in place.
void normalize(float* x, const float* weight, float eps, int count) {
    f32x16 squares = splat(0);
    int i = 0;
    for (; i + 16 <= count; i += 16) {
        const f32x16 v = load<f32x16>(x + i);
        squares += v * v;
    }
    float total = sum(squares);
    for (; i < count; i++) total += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(total / float(count) + eps);
    for (i = 0; i < count; i++) x[i] = x[i] * factor * weight[i];
}

// Rotates one head, `x [2 * half]`, to `out` (another place), laid out in halves; see `reference.apply_rotary`.
void rotate(const float* x, const float* cos, const float* sin, int half, bool interleaved, float* out) {
    // Two loops, because only the second can be done several at a time.
    for (int i = 0; interleaved && i < half; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
    for (int i = 0; !interleaved && i < half; i++) {
        const float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

void store_as(const float* from, int count, Kind kind, void* cache, int64_t offset) {
    if (kind == kF32) {
        std::memcpy(static_cast<float*>(cache) + offset, from, size_t(count) * 4);
        return;
    }
    if (kind == kF16) {
        _Float16* to = static_cast<_Float16*>(cache) + offset;
        for (int i = 0; i < count; i++) to[i] = _Float16(from[i]);
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(cache) + offset;
    int i = 0;
    for (; i + 16 <= count; i += 16) store(to + i, plain::to_bf16(load<f32x16>(from + i)));
    for (; i < count; i++) to[i] = seamount::to_bf16(from[i]);
}

float* thread_row(int count) {
    thread_local Scratch scratch;
    return scratch.get_as<float>(size_t(count));
}

}  // namespace
}  // namespace seamount

using namespace seamount;

// Grouped-query attention: of `qkv [T, H + 2K, D]`, normalises (where weights are given) and rotates queries in place,
// and keys and values on their way to the caches, [slots, K, D] both, at `slots`.
SEAMOUNT_API void seamount_rotary_write(float* qkv, int64_t stride, int64_t num_tokens, int32_t num_heads,
                                        int32_t num_kv_heads, int32_t width, const float* q_norm, const float* k_norm,
                                        float eps, const float* cos, const float* sin, int32_t interleaved, void* keys,
                                        int64_t key_stride, void* values, int64_t value_stride, int32_t kind,
                                        const int64_t* slots) {
    for_tokens(num_tokens, [&](int64_t t) {
        float* head = qkv + t * stride;
        float* rotated = thread_row(width);
        for (int h = 0; h < num_heads + num_kv_heads; h++, head += width) {
            const float* norm = h < num_heads ? q_norm : k_norm;
            if (norm) normalize(head, norm, eps, width);
            rotate(head, cos + t * (width / 2), sin + t * (width / 2), width / 2, interleaved, rotated);
            if (h < num_heads)
                std::memcpy(head, rotated, size_t(width) * 4);
            else
                store_as(rotated, width, Kind(kind), keys, slots[t] * key_stride + int64_t(h - num_heads) * width);
        }
        store_as(head, num_kv_heads * width, Kind(kind), values, slots[t] * value_stride);
    });
}

// Latent attention: of `kv [T, R + Dr]`, normalises the latent in place and rotates the shared key on their way to the
// cache [slots, R + Dr]; and rotates the last Dr of each head of `q [T, H, Dn + Dr]` to the last Dr of `absorbed
// [T, H, R + Dr]`, whose first R are left alone.
SEAMOUNT_API void seamount_latent_write(float* kv, int64_t kv_stride, int64_t num_tokens, int32_t rank,
                                        int32_t rope_width, const float* norm, float eps, const float* q,
                                        int64_t q_stride, int32_t num_heads, int32_t nope_width, float* absorbed,
                                        int64_t absorbed_stride, const float* cos, const float* sin,
                                        int32_t interleaved, void* cache, int64_t cache_stride, int32_t kind,
                                        const int64_t* slots) {
    const int half = rope_width / 2;
    for_tokens(num_tokens, [&](int64_t t) {
        const float *c = cos + t * half, *s = sin + t * half;
        float* latent = kv + t * kv_stride;
        float* key = thread_row(rope_width);
        normalize(latent, norm, eps, rank);
        rotate(latent + rank, c, s, half, interleaved, key);
        store_as(latent, rank, Kind(kind), cache, slots[t] * cache_stride);
        store_as(key, rope_width, Kind(kind), cache, slots[t] * cache_stride + rank);
        for (int64_t h = 0; h < num_heads; h++)
            rotate(q + t * q_stride + h * (nope_width + rope_width) + nope_width, c, s, half, interleaved,
                   absorbed + t * absorbed_stride + h * (rank + rope_width) + rank);
    });
}
