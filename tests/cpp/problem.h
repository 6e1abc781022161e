// A call of attention as the tests draw it: its numbers as doubles, and the same in memory, in
// buffers of exactly their size, so that the sanitizer sees every step outside.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"

// Of regard/ops.py
enum Op {
    FULL, CAUSAL, WINDOW, FIRST, DOCUMENTS, PADDING, EDGES, DENSE, TILES, HEADS,
    STEP, CHUNK, PHASE, BLOCKS, QUERIES, AND = 16, OR, NOT
};
enum Layout { CONTIGUOUS, BY_POSITION, EVERY_OTHER, SHARED };

inline long divide(long a, long b) { return a / b - (a % b < 0); }  // rounds down

struct Random {
    uint64_t state = 88172645463325252ull;
    uint64_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        return state ^= state << 17;
    }
    long below(long n) { return (long)(next() % (uint64_t)n); }
    // Every type represents it: 7 bits, between −2 and 2
    double number() { return (double)(below(129) - 64) / 32; }
};

// Four dimensions in memory. Where there is nothing to hold, the pointer is still one of its own.
struct Buffer {
    int64_t type = F32;
    long size[4] = {1, 1, 1, 1}, stride[4] = {};
    std::unique_ptr<char[]> bytes;
    long count = 0;         // of the elements in memory
    bool by_item = true;    // whether the first dimension is the batch

    static long width(int64_t type) {
        return type == U8 ? 1 : type == BF16 || type == F16 ? 2 : type == I64 ? 8 : 4;
    }

    Buffer() = default;
    Buffer(int64_t type, std::vector<long> sizes, Layout layout = CONTIGUOUS) : type(type) {
        for (size_t d = 0; d < sizes.size(); d++) size[d] = sizes[d];
        int order[] = {0, 1, 2, 3};
        if (layout == BY_POSITION) std::swap(order[1], order[2]);
        long step = layout == EVERY_OTHER ? 2 : 1, last = 0;
        for (int i = 3; i >= 0; i--) {
            int d = order[i];
            bool held = size[d] > 1 && !(layout == SHARED && d == 0);
            stride[d] = held ? step : 0;
            if (held) step *= size[d];
        }
        bool empty = false;
        for (int d = 0; d < 4; d++) {
            last += (size[d] - 1) * stride[d];
            empty |= size[d] == 0;
        }
        count = empty ? 0 : last + 1;
        bytes.reset(new char[count * width(type)]);
        memset(bytes.get(), 0xff, count * width(type));  // NaN, if nobody writes there
    }

    long at(long a, long b, long c, long d) const {
        return a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3];
    }

    // Of floats only what the type represents: numbers that are drawn are.
    void set(long i, double x) {
        char* to = bytes.get() + i * width(type);
        auto put = [&](auto number) { memcpy(to, &number, sizeof number); };
        float single = (float)x;
        uint32_t bits;
        memcpy(&bits, &single, 4);
        if (type == F32) put(single);
        if (type == BF16) put((uint16_t)(bits >> 16));
        if (type == F16)  // the exponent's bias is 15 there, and 127 here
            put((uint16_t)(x == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13));
        if (type == U8) put((uint8_t)(x != 0));
        if (type == I32) put((int32_t)x);
        if (type == I64) put((int64_t)x);
    }
    double get(long i) const {
        const char* from = bytes.get() + i * width(type);
        auto take = [&](auto number) {
            memcpy(&number, from, sizeof number);
            return number;
        };
        if (type == F32) return take(0.f);
        if (type == U8) return take(uint8_t());
        if (type == I32) return take(int32_t());
        if (type == I64) return (double)take(int64_t());
        uint16_t bits = take(uint16_t());
        int places = type == BF16 ? 7 : 10, most = type == BF16 ? 255 : 31;
        int exponent = bits >> places & most, part = bits & ((1 << places) - 1);
        double size = exponent == most ? (part ? NAN : INFINITY)
                      : exponent ? std::ldexp((1 << places) + part, exponent - most / 2 - places)
                                 : std::ldexp(part, 1 - most / 2 - places);
        return bits >> 15 ? -size : size;
    }
    double operator()(long a, long b, long c, long d) const { return get(at(a, b, c, d)); }

    Buffer& fill(double x) {
        for (long i = 0; i < count; i++) set(i, x);
        return *this;
    }
    Buffer& draw(Random& random) {
        for (long i = 0; i < count; i++) set(i, random.number());
        return *this;
    }
    template <class Number>
    Buffer& each(Number number) {
        for (long a = 0; a < size[0]; a++)
            for (long b = 0; b < size[1]; b++)
                for (long c = 0; c < size[2]; c++)
                    for (long d = 0; d < size[3]; d++) set(at(a, b, c, d), number(a, b, c, d));
        return *this;
    }

    template <class T>
    T* data() const { return (T*)bytes.get(); }
    RegardView view() const {
        return {bytes.get(), type, {stride[0], stride[1], stride[2], stride[3]}};
    }
};

// Whether query i of the call sees key j.
using Shows = std::function<bool(long b, long h, long i, long j)>;

struct Case;

// A mask: its program, with the tensors it refers to in the drawer's pool, and what it means.
struct Mask {
    std::vector<int64_t> code;
    Shows shows;
};

struct Case {
    std::string name = "";
    long batch = 2, heads = 4, kv_heads = 2, q_len = 70, k_len = 150, dim = 16, v_dim = 16;
    int64_t type = F32;
    Layout layout = CONTIGUOUS;
    // The first query's position; by default the last query stands at the last key
    long query_start = -1000, key_start = 0;
    double scale = 0.3, softcap = 0, dropout = 0;
    bool sinks = false, by_offset = false;
    std::vector<std::vector<long>> bias = {};  // sizes of dense ones: 1 is broadcast
    std::function<Mask(const Case&, Random&, std::vector<Buffer>&)> mask = nullptr;
    long page = 0;  // keys on a page of a paged cache; 0: none
    long top = 5;
    bool equal = false;  // queries are 0, so that all scores are equal

    long start() const { return query_start == -1000 ? key_start + k_len - q_len : query_start; }
};
