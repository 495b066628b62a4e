// The choice of experts: what `reference.route_softmax` and `reference.route_sigmoid` mean. Of equal scores the lowest
// index wins. Tokens are computed one by one, in an order that only the number of experts decides.

#include <algorithm>

#define SEAMOUNT_TARGET plain
#include "replay.h"
#include "vector.h"

namespace seamount {
namespace {

using namespace plain;

constexpr int64_t kTokensPerTask = 16;
enum Router : int32_t { kSoftmax = 0, kSigmoid = 1 };

struct Route {
    int num_experts, num_chosen, num_groups, num_chosen_groups;
    const float* bias;  // kSigmoid: null is none
    Router router;
    bool normalize;
    float scale;
};

// exp(x - top) of one token, in rows of sixteen; what is behind the last expert is 0.
void score(const float* logits, const Route& r, float* scores) {
    const int n = r.num_experts;
    float top = 0;
    if (r.router == kSoftmax) {
        top = logits[0];
        for (int i = 1; i < n; i++) top = logits[i] > top ? logits[i] : top;
    }
    f32x16 total = splat(0);
    for (int i = 0; i < n; i += 16) {
        const int count = std::min(16, n - i);
        const f32x16 x = load_part(logits + i, count);
        f32x16 y = r.router == kSoftmax ? exponential(x - top) : 1.0f / (1.0f + exponential(-x));
        store(scores + i, splat(0));
        store_part(scores + i, y, count);
        total += load<f32x16>(scores + i);
    }
    if (r.router == kSigmoid) return;
    const float divisor = sum(total);
    for (int i = 0; i < n; i += 16) store(scores + i, load<f32x16>(scores + i) / divisor);
}

// The `count` greatest of `values`, greatest first; `taken` has one byte per value and is left all zero.
void choose(const float* values, int num_values, int count, uint8_t* taken, int32_t* chosen) {
    for (int k = 0; k < count; k++) {
        int best = -1;
        for (int i = 0; i < num_values; i++)
            if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
        taken[best] = 1;
        chosen[k] = best;
    }
    for (int k = 0; k < count; k++) taken[chosen[k]] = 0;
}

// Sets the ranks of experts outside the best groups to `lowest`.
void keep_best_groups(const Route& r, float lowest, float* ranks, float* group_ranks, uint8_t* taken, int32_t* chosen) {
    const int size = r.num_experts / r.num_groups;
    for (int g = 0; g < r.num_groups; g++) {
        float first = ranks[g * size], second = -HUGE_VALF;
        for (int i = 1; i < size; i++) {
            const float x = ranks[g * size + i];
            second = std::max(second, std::min(first, x));
            first = std::max(first, x);
        }
        group_ranks[g] = r.router == kSoftmax || size == 1 ? first : first + second;
    }
    choose(group_ranks, r.num_groups, r.num_chosen_groups, taken, chosen);
    for (int k = 0; k < r.num_chosen_groups; k++) taken[chosen[k]] = 1;
    for (int g = 0; g < r.num_groups; g++) {
        if (!taken[g]) std::fill_n(ranks + g * size, size, lowest);
        taken[g] = 0;
    }
}

void route_token(const float* logits, const Route& r, float* scratch, float* weights, int32_t* ids) {
    const int room = (r.num_experts + 15) / 16 * 16;
    float *scores = scratch, *ranks = scratch + room, *group_ranks = ranks + room;
    auto* taken = reinterpret_cast<uint8_t*>(group_ranks + room);
    auto* groups = reinterpret_cast<int32_t*>(taken + room);
    std::memset(taken, 0, size_t(room));
    score(logits, r, scores);
    for (int i = 0; i < r.num_experts; i++) ranks[i] = r.bias ? scores[i] + r.bias[i] : scores[i];
    if (r.num_chosen_groups < r.num_groups)
        keep_best_groups(r, r.router == kSoftmax ? 0.0f : -HUGE_VALF, ranks, group_ranks, taken, groups);
    choose(ranks, r.num_experts, r.num_chosen, taken, ids);
    // An expert of a group that lost can still be chosen, by softmax with weight 0.
    const float* source = r.router == kSoftmax ? ranks : scores;
    float total = 0;
    for (int k = 0; k < r.num_chosen; k++) total += weights[k] = source[ids[k]];
    const float divisor = r.normalize ? total + 1e-20f : 1.0f;
    for (int k = 0; k < r.num_chosen; k++) weights[k] = weights[k] / divisor * r.scale;
}

}  // namespace
}  // namespace seamount

using namespace seamount;

SEAMOUNT_API void seamount_route(const float* logits, int64_t stride, int64_t num_tokens, int32_t num_experts,
                                 const float* bias, int32_t router, int32_t num_chosen, int32_t num_groups,
                                 int32_t num_chosen_groups, int32_t normalize, float scale, float* weights,
                                 int32_t* ids) {
    const Route route{num_experts, num_chosen,     num_groups,     num_chosen_groups,
                      bias,        Router(router), normalize != 0, scale};
    parallel((num_tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
        thread_local Scratch memory;
        float* scratch = memory.get_as<float>(size_t(5 * (num_experts + 16)));
        const int64_t end = std::min(num_tokens, (task + 1) * kTokensPerTask);
        for (int64_t t = task * kTokensPerTask; t < end; t++)
            route_token(logits + t * stride, route, scratch, weights + t * num_chosen, ids + t * num_chosen);
    });
}
SEAMOUNT_STEP(seamount_route)
