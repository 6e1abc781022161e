// The calls that are tested.
#pragma once
#include "masks.h"

inline std::string joined(std::string name, std::vector<int64_t> numbers) {
    for (int64_t n : numbers) {
        name += ' ';
        name += std::to_string(n);
    }
    return name;
}

inline std::vector<Case> cases() {
    std::vector<Case> all;
    auto sinks = causal() & (window(20) | first(4));

    // Every leaf, alone and joined
    std::vector<std::pair<std::string, Drawn>> masks = {
        {"full", full()},
        {"causal", causal()},
        {"window", window(20)},
        {"window ahead", window(3, 5)},
        {"first", first(40)},
        {"sinks and window", sinks},
        {"future", ~causal()},
        {"nothing", ~full()},
        {"step", step(3)},
        {"step of one", step(1) & causal()},
        {"chunk", chunk(37)},
        {"phase", phase(7, 2, 5)},
        {"queries", queries(90, 130) | first(3)},
        {"padding", padding()},
        {"padding shared", padding(true) & ~window(9)},
        {"left padding", left_padding({150, 60}) & causal()},
        {"an item of padding", left_padding({150, 0})},
        {"documents", documents()},
        {"documents shared", documents(true) & causal()},
        {"edges", edges({{100, 3}, {149, 149}, {80, 0}, {100, 140}})},
        {"no edges", edges({})},
        {"cut edges", causal() & ~(edges({{100, 3}, {120, 5}, {80, 80}}) & heads({1, 3}))},
        {"heads", (heads({0, 2}) & causal()) | heads({3})},
        {"dense", dense({false, false, false, false})},
        {"dense rows", dense({true, false, false, true})},
        {"dense keys", dense({false, true, true, false}) | window(2)},
        {"dense by position", ~dense({false, false, false, false}, BY_POSITION)},
        {"dense, every other", dense({true, true, false, false}, EVERY_OTHER)},
        {"tiles", tiles(false)},
        {"tiles by head", tiles(true) & causal()},
        {"blocks", blocks(16)},
        {"blocks of 100", ~blocks(100) | window(2)},
        {"nested", ~(causal() & ~window(9)) & (padding() | ~first(30))},
    };
    for (auto& [name, mask] : masks) {
        all.push_back({.name = name, .mask = mask});
        all.push_back({.name = name + ", few queries", .q_len = 9, .k_len = 150, .mask = mask});
        all.push_back({.name = name + ", one query", .q_len = 1, .k_len = 150, .dim = 32, .v_dim = 48,
                       .scale = 0.1, .mask = mask});
    }

    // What is added to the scores, or taken from them
    all.push_back({.name = "softcap", .softcap = 0.7});
    all.push_back({.name = "dropout", .dropout = 0.3});
    all.push_back({.name = "sinks", .sinks = true, .mask = left_padding({3, 0})});
    all.push_back({.name = "by offset", .by_offset = true, .mask = causal()});
    for (std::vector<long> sizes : std::vector<std::vector<long>>{
             {2, 4, 70, 150}, {1, 1, 70, 150}, {1, 4, 1, 150}, {2, 1, 70, 1}, {1, 1, 1, 1}})
        all.push_back({.name = joined("bias", {sizes[0], sizes[1], sizes[2], sizes[3]}), .bias = {sizes}});
    Case everything = {.query_start = 90, .key_start = 13, .scale = 0.5,
                       .softcap = 3, .dropout = 0.2, .sinks = true, .by_offset = true,
                       .bias = {{2, 1, 70, 150}, {1, 4, 1, 150}}, .mask = sinks & padding()};
    for (int64_t type : {F32, BF16, F16})
        for (Layout layout : {CONTIGUOUS, BY_POSITION, EVERY_OTHER, SHARED}) {
            Case c = everything;
            c.name = joined("everything, type and layout", {type, layout});
            c.type = type;
            c.layout = layout;
            all.push_back(c);
            c.name += ", few queries";
            c.q_len = 5;
            c.bias = {{2, 1, 5, 150}, {1, 4, 1, 150}};
            all.push_back(c);
        }
    all.push_back({.name = "placed before its keys", .query_start = -40, .key_start = 3, .mask = causal()});

    // Sizes around those of vectors, panels, blocks and tiles
    for (long n : {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257})
        all.push_back({.name = joined("square", {n}), .batch = 1, .heads = 2, .kv_heads = 1,
                       .q_len = n, .k_len = n, .dim = 8, .v_dim = 8, .mask = causal()});
    for (auto [q, k] : std::vector<std::pair<long, long>>{
             {1, 257}, {3, 129}, {16, 128}, {64, 65}, {129, 64}, {257, 1}, {40, 3}, {5, 0}, {80, 0}})
        all.push_back({.name = joined("lengths", {q, k}), .batch = 1, .q_len = q,
                       .k_len = k, .mask = sinks});
    for (auto [dim, v_dim] : std::vector<std::pair<long, long>>{
             {1, 1}, {24, 1}, {32, 40}, {80, 80}, {100, 66}, {128, 128}, {250, 255}, {256, 256}, {0, 3}})
        for (auto [type, q] : std::vector<std::pair<int64_t, long>>{
                 {F32, 21}, {BF16, 21}, {F16, 21}, {F32, 1}, {BF16, 2}, {F16, 1}})
            all.push_back({.name = joined("dims, type, queries", {dim, v_dim, type, q}),
                           .batch = 1, .q_len = q, .k_len = 140, .dim = dim, .v_dim = v_dim,
                           .type = type, .scale = 0.1, .mask = causal()});
    for (auto [heads, kv] : std::vector<std::pair<long, long>>{{1, 1}, {3, 3}, {6, 1}, {6, 2}, {70, 1}})
        for (long q : {1, 9, 66})
            all.push_back({.name = joined("heads, kv heads, queries", {heads, kv, q}),
                           .heads = heads, .kv_heads = kv, .q_len = q, .k_len = 90, .dim = 8,
                           .v_dim = 8, .mask = causal()});
    all.push_back({.name = "many blocks", .batch = 1, .heads = 1, .kv_heads = 1, .q_len = 700,
                   .k_len = 300, .dim = 8, .v_dim = 8, .bias = {{1, 1, 700, 1}}});

    // Few rows: what shapes their scores, and what does not
    for (int64_t type : {F32, BF16, F16}) {
        Case few = {.name = joined("few rows, type", {type}), .q_len = 2, .k_len = 300, .dim = 64,
                    .v_dim = 64, .type = type};
        all.push_back(few);
        few.name += ", softcap", few.softcap = 0.7;
        all.push_back(few);
        few.name += ", dropout", few.dropout = 0.3;
        all.push_back(few);
    }

    // Decoding: keys in chunks, on pages
    for (int64_t type : {F32, BF16})
        for (long q : {1, 7, 16})
            for (long page : {0, 16, 100}) {
                all.push_back({.name = joined("decode: queries, page, type", {q, page, type}),
                               .q_len = q, .k_len = 1400, .type = type, .sinks = true,
                               .mask = causal() & (window(500) | first(300)), .page = page, .top = 40});
            }
    all.push_back({.name = "pages, many queries", .q_len = 100, .k_len = 140, .type = F16,
                   .mask = causal(), .page = 48});
    all.push_back({.name = "pages by position", .q_len = 100, .k_len = 140, .layout = BY_POSITION,
                   .mask = causal(), .page = 48});

    // Ties; the largest of few
    for (long top : {1, 8, 200})
        for (long q : {3, 70})
            all.push_back({.name = joined("equal scores, top k of queries", {top, q}), .batch = 1, .q_len = q, .k_len = 1100,
                           .mask = ~window(9), .top = top, .equal = true});
    return all;
}
