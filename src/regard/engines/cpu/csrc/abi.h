// The plain C interface: what structs.py packs and the kernels read. Every field is 8 bytes wide, so that
// one struct.pack in Python lays out the whole. A field changes there, too: sizes are compared when the
// library is loaded, names and order in a test.
#pragma once
#include <cstdint>

extern "C" {

enum RegardType : int64_t { F32 = 0, BF16 = 1, F16 = 2, U8 = 3, I32 = 4, I64 = 5 };

// A tensor of up to 4 dimensions; strides count elements, 0 where a dimension is broadcast.
struct RegardView {
    void* data;
    int64_t type;
    int64_t stride[4];
};

// Pages of a paged cache: key j of item b lies in page table[b · row + j / size], row j % size.
// The pool's view is then (pages, kv_heads, size, dim). Keys beyond an item's length are hidden.
struct RegardPages {
    const int32_t* table;
    int64_t row, size;
    const int32_t* lengths;  // (batch,): the keys that each item has
};

// A pooled map: cells over queries and over keys, by position.
struct RegardMap {
    int64_t row_first, row_size, rows, col_first, col_size, cols, is_max;
    float* out;  // (batch, heads, rows, cols)
};

struct RegardReceived {
    int64_t first, last;  // the queries of the call that count: first ≤ i < last
    float* sum;           // (batch, heads, k_len)
    int32_t* count;       // likewise, or null
};

struct RegardDistances {
    int64_t bins;
    const int64_t* edges;  // where each bin begins, ascending from 0
    float *past, *future;  // (batch, heads, bins)
};

// What to keep of the weights; null or 0 where not asked for.
struct RegardObserve {
    int64_t k;       // of the top k
    int32_t* index;  // (batch, heads, q_len, k): positions of keys, −1 where fewer are visible
    float *top, *rest, *sink;
    float *entropy, *max_score;  // (batch, heads, q_len)
    int64_t received_count, map_count, distances_count, row_count;
    const RegardReceived* received;
    const RegardMap* map;
    const RegardDistances* distances;
    const int64_t* row;  // ascending queries of the call, whose rows are kept whole
    float* rows;         // (batch, heads, row_count, k_len)
};

// One call of attention. Positions of queries and keys begin at query_start and key_start.
struct RegardCall {
    int64_t batch, heads, kv_heads, q_len, k_len, dim, v_dim, query_start, key_start;
    double scale, softcap, dropout;  // 0: none
    int64_t seed, threads, level;    // level: an instruction set (dispatch.cpp)
    int64_t parts;                   // level amx: bf16 numbers that stand for one (parts.h); 0: none do
    RegardView query, key, value, out;
    float* lse;              // (batch, heads, q_len)
    float* stats;            // (batch, heads, q_len, 2) or null: each row's top, and the sum of
                             // exp(score − top); no score is above it by more than 8
    const float* sinks;      // (heads) or null
    const float* by_offset;  // (heads, q_len + k_len − 1): the bias at query − key + k_len − 1
    int64_t bias_count, code_count;
    const RegardView* bias;  // dense
    const int64_t* code;     // the mask's program (call/mask_program.py)
    const RegardView* mask;  // its tensors
    const int64_t* mask_sizes;  // the first size of each: of edges, how many
    RegardPages pages;
    const RegardObserve* observe;  // or null
};

// Gradients of one call, from what its forward left. All are contiguous, and float32 but for those of
// query, key and value.
struct RegardBackward {
    RegardView grad_out;
    const float* stats;    // of the forward
    const float* delta;    // (batch, heads, q_len): grad_out · out − grad_lse
    int64_t type;          // of these three, a RegardType
    void *d_query, *d_key, *d_value;
    float* d_by_offset;    // (heads, q_len + k_len − 1) or null; zeroed
    const RegardView* d_bias;  // one a dense bias, zeroed; data null where not wanted
    const int64_t* bias_floats;  // how many numbers each of them holds
};

// The k edges of each row whose removal would change the scalar most whose gradient is grad_out.
struct RegardEffect {
    RegardView grad_out;
    const float* stats;  // of the forward
    const float* delta;  // (batch, heads, q_len): grad_out · out
    int64_t k;
    int32_t* index;          // (batch, heads, q_len, k): positions of keys, −1 where fewer are visible
    float *effect, *weight;  // likewise
};

// A rectangle of one head's map, 128 × 128 cells of 2^zoom queries × 2^zoom keys each. It begins at the
// call's query `row` and key `col`, which may lie before its first.
struct RegardTile {
    int64_t batch, head, zoom, row, col;
};

// Of each rectangle the pooled weights exp(score − lse), 0 where there is none. The call's value, out,
// lse and dropout are not read.
struct RegardPooled {
    int64_t count, is_max;
    const RegardTile* tile;
    const float* lse;  // (batch, heads, q_len)
    float* out;        // (count, 128, 128)
};

// What keys receive where the lse is given, of some keys under that of all. The call's value, out, lse,
// sinks and dropout are not read.
struct RegardColumns {
    const float* lse;  // (batch, heads, q_len)
    RegardReceived received;
};

// Rows of numbers of any type, (batch, kv_heads, slots): strides and the size of a row in bytes.
struct RegardRows {
    char* data;
    int64_t stride[3], bytes;
};

// One decode step of a cache that evicts: of the filled slots the one of least worth goes, and the
// newest, which is the last, takes its place; of equals the one at the earliest position. A slot's
// worth is what it received: `seen`, summed over the query heads of its head, or their mean over all
// of the layer. With `total` it is that sum and the total before, and becomes the total. Without
// `seen` all slots are worth the same.
struct RegardEvict {
    int64_t keep_below, keep_from;  // positions below the one, or from the other on, stay
    int64_t next;                   // the position that the last slot, free now, is given
    int64_t batch, kv_heads, heads, slots;  // heads: kv_heads, or 1 that decides for all of them
    RegardRows key, value;
    int32_t* positions;  // (batch, heads, slots)
    float* total;        // likewise, or null; its last is 0 afterwards
    int64_t query_heads, by_layer;
    const float* seen;   // (batch, query_heads, slots) or null
};

#pragma GCC visibility push(default)
int regard_built(void);                                    // bit i: level i is in the library
int regard_levels(void);                                   // bit i: it can run here, too
int regard_sizes(int64_t* bytes, int room);                // of the structs above, in order; how many
int regard_forward(const RegardCall*);                     // 0, or an error of `regard_error`
int regard_backward(const RegardCall*, const RegardBackward*);
int regard_effect(const RegardCall*, const RegardEffect*);
int regard_pooled(const RegardCall*, const RegardPooled*);
int regard_columns(const RegardCall*, const RegardColumns*);
int regard_evict(const RegardEvict*);
// Since the last call: the tiles that forwards went over, and the cycles of packing, scores, softmax, mix,
// observers, and the rest, of all threads. 0: the library was not built to count them (timed.h).
int regard_parts(int64_t* seven);
void regard_use_openmp(void* gomp_parallel);
const char* regard_error(int);
#pragma GCC visibility pop
}
