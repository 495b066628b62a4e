// The routed experts of a layer: rows are grouped by expert, each group passes its expert's SwiGLU network, and every
// token adds its experts' results in the order in which they were chosen.

#include <algorithm>

#include "replay.h"
#include "workspace.h"

namespace seamount {
namespace {

// Where the rows of each expert lie: whole tiles of 16, so that an expert's rows never share a tile with another's.
struct Groups {
    int64_t active = 0;  // experts that have rows
    int64_t tiles = 0;
    int32_t* expert;     // [active]
    int64_t* first_tile; // [active + 1]
    int64_t* count;      // [active] rows
    int64_t* token;      // [tiles * 16], -1 where there is none
    int64_t* row;        // [tokens, chosen]: where a token's term lies
    int64_t* itself;     // [tiles * 16]: the row's own number, -1 where there is none
};

Groups group(const int32_t* ids, int64_t tokens, int64_t chosen, int64_t experts) {
    const int64_t pairs = tokens * chosen;
    const int64_t most_tiles = std::min(pairs, pairs / 16 + experts) + 1;
    const size_t words = size_t(4 * experts + 3 + pairs + 2 * most_tiles * 16);
    auto* memory = workspace().order.get_as<int64_t>(words);
    Groups g;
    int64_t* place = memory;  // per expert: rows, then the next free row
    g.first_tile = place + experts;
    g.count = g.first_tile + experts + 1;
    g.expert = reinterpret_cast<int32_t*>(g.count + experts);
    g.row = g.count + 2 * experts + 2;
    g.token = g.row + pairs;
    g.itself = g.token + most_tiles * 16;
    std::fill(place, place + experts, 0);
    for (int64_t i = 0; i < pairs; i++) place[ids[i]]++;
    for (int64_t e = 0; e < experts; e++) {
        if (!place[e]) continue;
        g.expert[g.active] = int32_t(e);
        g.count[g.active] = place[e];
        g.first_tile[g.active++] = g.tiles;
        const int64_t tiles = (place[e] + 15) / 16;
        place[e] = g.tiles * 16;
        g.tiles += tiles;
    }
    g.first_tile[g.active] = g.tiles;
    std::fill(g.token, g.token + g.tiles * 16, -1);
    std::fill(g.itself, g.itself + g.tiles * 16, -1);
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t row = place[ids[i]]++;
        g.row[i] = row;
        g.token[row] = i / chosen;
        g.itself[row] = row;
    }
    return g;
}

// Every group of rows times its own expert's matrix; `place` says where the results of rows from a tile on go.
template <class Place>
void multiply_groups(const Groups& g, const Matrix* matrices, const Rows& rows, Place&& place) {
    const Matrix& shape = matrices[0];
    const int64_t panels = num_panels(shape), bytes = is_tiled(shape.kind) ? 16 * num_tiles(shape) * 64 : 16 * shape.k * 4;
    const int64_t chunks = is_tiled(shape.kind) ? num_chunks(num_tiles(shape)) : 0;
    const int64_t wanted = num_threads() * 8;
    const int64_t per_expert = std::max<int64_t>(1, std::min(panels / 2, (wanted + g.active - 1) / g.active));
    const int64_t step = round_up((panels + per_expert - 1) / per_expert, 2);
    const int64_t parts = (panels + step - 1) / step;
    parallel(g.active * parts, [&](int64_t task, int thread) {
        const int64_t i = task / parts, first = task % parts * step, tile = g.first_tile[i];
        const Rows own{g.count[i], static_cast<const uint8_t*>(rows.data) + tile * bytes,
                       rows.scale ? rows.scale + tile * 16 * chunks : nullptr};
        functions->multiply(matrices[g.expert[i]], own, place(tile), first, std::min(panels, first + step),
                            workspace().multiply[thread]);
    });
}

}  // namespace
}  // namespace seamount

using namespace seamount;

// out[t] += sum over a of weights[t, a] * down[e](gate_up[e](x[t])) with e = ids[t, a].
SEAMOUNT_API void seamount_experts(const Matrix* gate_up, const Matrix* down, int64_t experts, const float* x,
                                   int64_t x_stride, int64_t tokens, const float* weights, const int32_t* ids,
                                   int64_t chosen, float* out, int64_t out_stride) {
    if (!tokens) return;
    auto& space = workspace();
    const Groups g = group(ids, tokens, chosen, experts);
    const int64_t rows = g.tiles * 16, width = down[0].n;
    const Source source{x, x_stride, nullptr, 0, nullptr};
    const Between between(gate_up[0], down[0], rows, space.inner);
    multiply_groups(g, gate_up, prepare_rows(gate_up[0], source, g.token, rows, space.rows, space.scales),
                    [&](int64_t tile) { return between.out(tile); });
    auto* terms = space.terms.get_as<float>(size_t(rows * width));
    multiply_groups(
        g, down, prepare_rows(down[0], between.source(), g.itself, rows, space.inner_rows, space.inner_scales),
        [&](int64_t tile) { return Out{terms + tile * 16 * width, width, false, nullptr}; });
    const int64_t step = 8;
    parallel((tokens + step - 1) / step, [&](int64_t task, int) {
        for (int64_t t = task * step; t < std::min(tokens, (task + 1) * step); t++)
            for (int64_t a = 0; a < chosen; a++)
                functions->accumulate(out + t * out_stride, terms + g.row[t * chosen + a] * width,
                                      weights[t * chosen + a], width);
    });
}
SEAMOUNT_STEP(seamount_experts)
