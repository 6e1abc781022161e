// The mask's program (call/mask_program.py), read in place: who sees whom in a tile, and whether a tile holds
// anything visible at all. A tile has at most 64 rows, so each key has one word: bit i is row i.
#pragma once
#include "abi.h"
#include "simd.h"

namespace regard::LEVEL {

enum Op {
    FULL, CAUSAL, WINDOW, FIRST, DOCUMENTS, PADDING, EDGES, DENSE, TILES, HEADS,
    STEP, CHUNK, PHASE, BLOCKS, QUERIES, AND = 16, OR, NOT
};
constexpr int CELL = 64, EMPTY_CELL = -2, FULL_CELL = -1;  // of a predicate (TILES)

// Queries q0 … of one head, standing in the lanes lane …
struct Segment {
    long b, h, q0;
    int count, lane;
};

// A rectangle of one head: queries q0 ≤ q < q1 and keys k0 ≤ k < k1 of the call.
struct Span {
    long b, h, q0, q1, k0, k1;
};

struct Answer {
    bool some, every;
};

INLINE int operands(int op) {
    switch (op) {
        case FIRST: case PADDING: case EDGES: case DENSE: case HEADS: case STEP: case CHUNK:
            return 1;
        case WINDOW: case DOCUMENTS: case TILES: case QUERIES:
            return 2;
        case PHASE:
            return 3;
        case BLOCKS:
            return 4;
        default:
            return 0;
    }
}

INLINE long floor_div(long a, long b) { return a / b - (a % b < 0); }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE uint64_t first_bits(long n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }
// Bits lo ≤ i < hi
INLINE uint64_t bits_between(long lo, long hi) { return first_bits(hi) & ~first_bits(lo); }

template <class T>
INLINE const T* at(const RegardView& v, long i, long j = 0, long k = 0, long l = 0) {
    return (const T*)v.data + i * v.stride[0] + j * v.stride[1] + k * v.stride[2] + l * v.stride[3];
}

class Mask {
  public:
    Mask() = default;
    explicit Mask(const RegardCall& call)
        : call(&call), shift(call.query_start - call.key_start),
          full(call.code_count == 1 && call.code[0] == FULL) {}

    bool is_full() const { return full; }
    // Words of scratch that `visible` needs.
    static long scratch(const RegardCall& call) { return call.code_count * KEYS; }

    // Whether something may be visible in a span, and whether everything is; three-valued: (true,
    // false) may also mean that it is not known.
    Answer classify(const Span& s) const {
        Answer stack[MOST_CODE];
        int top = 0;
        for (long i = 0; i < call->code_count; i += 1 + operands((int)call->code[i])) {
            const long* args = (const long*)call->code + i + 1;
            switch (call->code[i]) {
                case NOT: {
                    Answer& a = stack[top - 1];
                    a = {!a.every, !a.some};
                    break;
                }
                case AND:
                    top--;
                    stack[top - 1].some &= stack[top].some;
                    stack[top - 1].every &= stack[top].every;
                    break;
                case OR:
                    top--;
                    stack[top - 1].some |= stack[top].some;
                    stack[top - 1].every |= stack[top].every;
                    break;
                default:
                    stack[top++] = leaf((int)call->code[i], args, s);
            }
        }
        return stack[0];
    }

    // out[j], the visible rows of key k0 + j, in the segment's lanes; the other lanes stay.
    void visible(const Segment& s, long k0, int n, uint64_t* out, uint64_t* stack) const {
        int top = 0;
        for (long i = 0; i < call->code_count; i += 1 + operands((int)call->code[i])) {
            const long* args = (const long*)call->code + i + 1;
            uint64_t *a = stack + (top - 2) * KEYS, *b = stack + (top - 1) * KEYS;
            switch (call->code[i]) {
                case NOT:
                    for (int j = 0; j < n; j++) b[j] = ~b[j];
                    break;
                case AND:
                    for (int j = 0; j < n; j++) a[j] &= b[j];
                    top--;
                    break;
                case OR:
                    for (int j = 0; j < n; j++) a[j] |= b[j];
                    top--;
                    break;
                default:
                    rows((int)call->code[i], args, s, k0, n, stack + top++ * KEYS);
            }
        }
        uint64_t mine = first_bits(s.count);
        for (int j = 0; j < n; j++) out[j] |= (stack[j] & mine) << s.lane;
    }

    static constexpr int MOST_CODE = 1024;  // integers of a program (engines/cpu.py refuses more)

  private:
    const RegardCall* call;
    long shift;
    bool full;

    const RegardView& tensor(long i) const { return call->mask[i]; }

    Answer leaf(int op, const long* args, const Span& s) const {
        // query − key over the span: smallest and largest
        long low = s.q0 + shift - (s.k1 - 1), high = s.q1 - 1 + shift - s.k0;
        long key0 = s.k0 + call->key_start, key1 = s.k1 + call->key_start;
        long query0 = s.q0 + call->query_start, query1 = s.q1 + call->query_start;
        switch (op) {
            case FULL:
                return {true, true};
            case CAUSAL:
                return {high >= 0, low >= 0};
            case WINDOW:
                return {high >= -args[1] && low < args[0], low >= -args[1] && high < args[0]};
            case FIRST:
                return {key0 < args[0], key1 <= args[0]};
            case QUERIES:
                return {query0 < args[1] && query1 > args[0],
                        query0 >= args[0] && query1 <= args[1]};
            case STEP:
                return {floor_div(high, args[0]) * args[0] >= low,
                        args[0] == 1 || (low == high && low % args[0] == 0)};
            case CHUNK: {
                long qa = floor_div(query0, args[0]), qb = floor_div(query1 - 1, args[0]);
                long ka = floor_div(key0, args[0]), kb = floor_div(key1 - 1, args[0]);
                return {qa <= kb && ka <= qb, qa == qb && ka == kb && qa == ka};
            }
            case PHASE: {
                long count = in_phase(key1, args) - in_phase(key0, args);
                return {count > 0, count == key1 - key0};
            }
            case DOCUMENTS: {
                int32_t qa, qb, ka, kb;
                ends(at<int32_t>(tensor(args[0]), s.b), s.q0, s.q1, qa, qb);
                ends(at<int32_t>(tensor(args[1]), s.b), s.k0, s.k1, ka, kb);
                return {qa <= kb && ka <= qb && qb >= 0, qa == qb && ka == kb && qa == ka && qa >= 0};
            }
            case PADDING: {
                const uint8_t* keep = at<uint8_t>(tensor(args[0]), s.b);
                long count = 0;
                for (long k = s.k0; k < s.k1; k++) count += keep[k] != 0;
                return {count > 0, count == s.k1 - s.k0};
            }
            case HEADS: {
                bool mine = *at<uint8_t>(tensor(args[0]), s.h);
                return {mine, mine};
            }
            case EDGES: {
                const int64_t* pair = at<int64_t>(tensor(args[0]), 0);
                for (long i = 0; i < call->mask_sizes[args[0]]; i++)
                    if (pair[2 * i] >= query0 && pair[2 * i] < query1 && pair[2 * i + 1] >= key0 &&
                        pair[2 * i + 1] < key1)
                        return {true, s.q1 - s.q0 == 1 && s.k1 - s.k0 == 1};
                return {false, false};
            }
            case DENSE: {
                const RegardView& v = tensor(args[0]);
                Answer a = {false, true};
                // A broadcast side is looked at once
                long q1 = v.stride[2] ? s.q1 : s.q0 + 1, k1 = v.stride[3] ? s.k1 : s.k0 + 1;
                for (long q = s.q0; q < q1 && (!a.some || a.every); q++) {
                    const uint8_t* row = at<uint8_t>(v, s.b, s.h, q);
                    for (long k = s.k0; k < k1; k++) {
                        bool seen = row[k * v.stride[3]];
                        a.some |= seen;
                        a.every &= seen;
                    }
                }
                return a;
            }
            case BLOCKS: {
                Answer a = {false, true};
                long size = args[1];
                for (long r = floor_div(query0, size); r <= floor_div(query1 - 1, size); r++)
                    for (long c = floor_div(key0, size); c <= floor_div(key1 - 1, size); c++) {
                        bool seen = *at<uint8_t>(tensor(args[0]), s.b, s.h, r - args[2], c - args[3]);
                        a.some |= seen;
                        a.every &= seen;
                    }
                return a;
            }
            default: {  // TILES
                Answer a = {false, true};
                for (long r = s.q0 / CELL; r <= (s.q1 - 1) / CELL; r++)
                    for (long c = s.k0 / CELL; c <= (s.k1 - 1) / CELL; c++) {
                        int32_t cell = *at<int32_t>(tensor(args[0]), s.b, s.h, r, c);
                        a.some |= cell != EMPTY_CELL;
                        a.every &= cell == FULL_CELL;
                    }
                return a;
            }
        }
    }

    // How many keys at positions 0 ≤ k < x have lo ≤ k mod n < hi (negative for x < 0).
    static long in_phase(long x, const long* args) {
        long n = args[0], lo = args[1], hi = args[2], whole = floor_div(x, n);
        return whole * (hi - lo) + least(most(x - whole * n - lo, 0), hi - lo);
    }

    static void ends(const int32_t* ids, long from, long to, int32_t& low, int32_t& high) {
        low = high = ids[from];
        for (long i = from; i < to; i++) {
            low = ids[i] < low ? ids[i] : low;
            high = ids[i] > high ? ids[i] : high;
        }
    }

    // One leaf: bit i of out[j] says whether query q0 + i sees key k0 + j.
    void rows(int op, const long* args, const Segment& s, long k0, int n, uint64_t* out) const {
        long query = s.q0 + call->query_start;          // position of lane 0's query
        long from = k0 - shift - s.q0;                  // the lane that stands at key k0
        switch (op) {
            case FULL:
                for (int j = 0; j < n; j++) out[j] = ~0ull;
                return;
            case CAUSAL:
                for (int j = 0; j < n; j++) out[j] = ~first_bits(from + j);
                return;
            case WINDOW:
                for (int j = 0; j < n; j++)
                    out[j] = bits_between(from + j - args[1], from + j + args[0]);
                return;
            case FIRST:
                for (int j = 0; j < n; j++) out[j] = k0 + j + call->key_start < args[0] ? ~0ull : 0;
                return;
            case QUERIES:
                for (int j = 0; j < n; j++) out[j] = bits_between(args[0] - query, args[1] - query);
                return;
            case STEP:
                for (int j = 0; j < n; j++) {
                    long lane = (from + j) % args[0];
                    out[j] = 0;
                    for (lane += lane < 0 ? args[0] : 0; lane < s.count; lane += args[0])
                        out[j] |= 1ull << lane;
                }
                return;
            case CHUNK:
                for (int j = 0; j < n; j++) {
                    long start = floor_div(k0 + j + call->key_start, args[0]) * args[0];
                    out[j] = bits_between(start - query, start + args[0] - query);
                }
                return;
            case PHASE:
                for (int j = 0; j < n; j++) {
                    long k = k0 + j + call->key_start, phase = k - floor_div(k, args[0]) * args[0];
                    out[j] = phase >= args[1] && phase < args[2] ? ~0ull : 0;
                }
                return;
            case DOCUMENTS: {
                const int32_t* mine = at<int32_t>(tensor(args[0]), s.b) + s.q0;
                const int32_t* theirs = at<int32_t>(tensor(args[1]), s.b) + k0;
                for (int j = 0; j < n; j++) {
                    uint64_t word = 0;
                    for (int i = 0; i < s.count; i++)
                        word |= (uint64_t)(mine[i] == theirs[j]) << i;
                    out[j] = theirs[j] < 0 ? 0 : word;
                }
                return;
            }
            case PADDING: {
                const uint8_t* keep = at<uint8_t>(tensor(args[0]), s.b) + k0;
                for (int j = 0; j < n; j++) out[j] = keep[j] ? ~0ull : 0;
                return;
            }
            case HEADS: {
                uint64_t word = *at<uint8_t>(tensor(args[0]), s.h) ? ~0ull : 0;
                for (int j = 0; j < n; j++) out[j] = word;
                return;
            }
            case EDGES: {
                const int64_t* pair = at<int64_t>(tensor(args[0]), 0);
                for (int j = 0; j < n; j++) out[j] = 0;
                for (long i = 0; i < call->mask_sizes[args[0]]; i++) {
                    long lane = pair[2 * i] - query, j = pair[2 * i + 1] - call->key_start - k0;
                    if (lane >= 0 && lane < s.count && j >= 0 && j < n) out[j] |= 1ull << lane;
                }
                return;
            }
            case DENSE: {
                const RegardView& v = tensor(args[0]);
                for (int j = 0; j < n; j++) out[j] = 0;
                for (int i = 0; i < s.count; i++) {
                    const uint8_t* row = at<uint8_t>(v, s.b, s.h, s.q0 + i, k0);
                    for (int j = 0; j < n; j++) out[j] |= (uint64_t)(row[j * v.stride[3]] != 0) << i;
                }
                return;
            }
            case BLOCKS: {
                long size = args[1];
                for (int j = 0; j < n; j++) {
                    long c = floor_div(k0 + j + call->key_start, size) - args[3];
                    out[j] = 0;
                    for (long r = floor_div(query, size); r * size < query + s.count; r++)
                        if (*at<uint8_t>(tensor(args[0]), s.b, s.h, r - args[2], c))
                            out[j] |= bits_between(r * size - query, (r + 1) * size - query);
                }
                return;
            }
            default: {  // TILES
                for (int j = 0; j < n; j++) out[j] = 0;
                for (int i = 0; i < s.count; i++) {
                    long q = s.q0 + i;
                    for (int j = 0; j < n; j++) {
                        long k = k0 + j;
                        int32_t cell = *at<int32_t>(tensor(args[0]), s.b, s.h, q / CELL, k / CELL);
                        bool seen = cell == FULL_CELL;
                        if (cell >= 0) {
                            const uint8_t* bits =
                                at<uint8_t>(tensor(args[1]), cell, q % CELL, k % CELL / 8);
                            seen = *bits >> (k % 8) & 1;
                        }
                        out[j] |= (uint64_t)seen << i;
                    }
                }
                return;
            }
        }
    }
};

}  // namespace regard::LEVEL
