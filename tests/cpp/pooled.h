// Pooled rectangles of the map (regard_pooled) against the weights themselves: the cells' sums and maxima,
// of rectangles that begin before the call, in it, and reach beyond; the bits whatever the threads, the
// other rectangles, and what stands in hidden keys.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "naive.h"

using Closeness = void (*)(const char* name, double ours, double truth, double tolerance);
using Failing = void (*)(const std::string& what);

constexpr long CELLS = 128;

inline std::vector<RegardTile> rectangles(const Case& c) {
    std::vector<RegardTile> tiles;
    const long places[][3] = {{0, 0, 0}, {0, -3, 5}, {1, -5, 3}, {3, 7, 0}, {4, -70, -90}, {6, 0, 0}, {7, -100, -9}, {9, 1, 2}};
    for (const auto& [zoom, row, col] : places) {
        const long number = (long)tiles.size();
        tiles.push_back({number % c.batch, number % c.heads, zoom, row, col});
    }
    return tiles;
}

// All of them at once, in buffers of exactly their size.
inline std::vector<float> pool(const RegardCall& call, const Buffer& lse, const std::vector<RegardTile>& tiles, bool largest,
                               Failing fail) {
    std::vector<float> out(tiles.size() * CELLS * CELLS, NAN);
    const RegardPooled wanted = {(int64_t)tiles.size(), largest, tiles.data(), lse.data<float>(), out.data()};
    if (regard_pooled(&call, &wanted)) fail("no memory for rectangles");
    return out;
}

inline void test_pooled(RegardCall call, RegardCall spoiled, const Truth& truth, Closeness close, Failing fail) {
    const Case& c = truth.c;
    if (!c.batch) return;
    Buffer lse(F32, {c.batch, c.heads, c.q_len});
    for (long i = 0; i < lse.count; i++) lse.set(i, truth.lse.held[i]);
    const std::vector<RegardTile> tiles = rectangles(c);
    for (const bool largest : {false, true}) {
        call.threads = 1;
        const std::vector<float> out = pool(call, lse, tiles, largest, fail);
        call.threads = 3;
        if (memcmp(out.data(), pool(call, lse, tiles, largest, fail).data(), out.size() * 4)) fail("threads change a rectangle");
        if (memcmp(out.data(), pool(spoiled, lse, tiles, largest, fail).data(), out.size() * 4)) fail("hidden keys change a rectangle");
        for (size_t t = 0; t < tiles.size(); t++) {
            const RegardTile& tile = tiles[t];
            const float* mine = &out[t * CELLS * CELLS];
            const std::vector<float> alone = pool(call, lse, {tile}, largest, fail);
            if (memcmp(mine, alone.data(), alone.size() * 4)) fail("rectangles change each other");
            std::vector<double> cells(CELLS * CELLS);
            for (long i = 0; i < c.q_len; i++)
                for (long j = 0; j < c.k_len; j++) {
                    const long x = (i - tile.row) >> tile.zoom, y = (j - tile.col) >> tile.zoom;
                    if (x < 0 || x >= CELLS || y < 0 || y >= CELLS) continue;
                    double& cell = cells[x * CELLS + y];
                    const double w = truth.weight(tile.batch, tile.head, i, j);
                    cell = largest ? std::max(cell, w) : cell + w;
                }
            for (long n = 0; n < CELLS * CELLS; n++) close("a rectangle's cell", mine[n], cells[n], 5e-5);
        }
    }
}
