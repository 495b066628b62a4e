// Between a projection and attention: norms of heads, rotary angles, and the write to the cache.
//
// Tokens are computed one by one, in an order that only the widths decide.

#include <algorithm>

#include "matrix.h"
#include "replay.h"

namespace seamount {
namespace {

// Fewer tokens than this are not worth waking another thread for.
constexpr int64_t kTokensPerTask = 4;

template <class F>
void for_tokens(int64_t count, F&& body) {
    parallel((count + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
        const int64_t end = std::min(count, (task + 1) * kTokensPerTask);
        for (int64_t t = task * kTokensPerTask; t < end; t++) body(t);
    });
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
            if (norm) functions->normalize_head(head, norm, eps, width);
            functions->rotate_head(head, cos + t * (width / 2), sin + t * (width / 2), width / 2, interleaved, rotated);
            if (h < num_heads)
                std::memcpy(head, rotated, size_t(width) * 4);
            else
                functions->store_head(rotated, width, kind, keys, slots[t] * key_stride + int64_t(h - num_heads) * width);
        }
        functions->store_head(head, num_kv_heads * width, kind, values, slots[t] * value_stride);
    });
}
SEAMOUNT_STEP(seamount_rotary_write)

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
        functions->normalize_head(latent, norm, eps, rank);
        functions->rotate_head(latent + rank, c, s, half, interleaved, key);
        functions->store_head(latent, rank, kind, cache, slots[t] * cache_stride);
        functions->store_head(key, rope_width, kind, cache, slots[t] * cache_stride + rank);
        for (int64_t h = 0; h < num_heads; h++)
            functions->rotate_head(q + t * q_stride + h * (nope_width + rope_width) + nope_width, c, s, half, interleaved,
                   absorbed + t * absorbed_stride + h * (rank + rope_width) + rank);
    });
}
SEAMOUNT_STEP(seamount_latent_write)
