// A tile of keys and values for the backward, as what its products read, and the blocks that see it.
#pragma once
#include "backward_block.h"

namespace regard::LEVEL {

// The tile of keys and values at hand, as tiles and as floats, of what is asked for.
inline void Backward::make_keys() {
    odd_keys.count = odd_values.count = 0;
    raw_key.data = nullptr;
    key_fits = value_fits = false;
    if (sh.parts == 1 && brain_keys()) return;
    read_keys();
    if (!sh.parts) {
        odd_values.find(raw_value, key_count, c.v_dim);
        odd_keys.find(raw_key, key_count, c.dim);
    }
    auto finitely = [&](const Rows& rows, long dim, Odd& odd, bool& fits, auto as_tiles) {
        fits = as_tiles(rows);
        if (fits) return;
        odd.find(rows, key_count, dim);
        fits = odd.count && as_tiles(odd.filled(key_count, dim, clean));
    };
    with_parts(sh.parts, [&](auto of) {
        constexpr int parts = of.count;
        finitely(raw_value, c.v_dim, odd_values, value_fits, [&](const Rows& x) {
            return pack_rows<parts>(x.data, x.ld, key_count, c.v_dim, value_tiles);
        });
        finitely(raw_key, c.dim, odd_keys, key_fits, [&](const Rows& x) {
            pack_columns<parts, true, Unseen>(x.data, x.ld, key_count, c.dim, key_turned);
            return pack_rows<parts>(x.data, x.ld, key_count, c.dim, key_tiles);
        });
    });
    if (odd_keys.count) finite_key = odd_keys.filled(key_count, c.dim, clean);
}
// From bf16 where they lie; false if they are another way, or do not fit.
inline bool Backward::brain_keys() {
    if (c.key.type != BF16 || c.value.type != BF16 || !packed_direct(c.key, c.dim) ||
        !packed_direct(c.value, c.v_dim))
        return false;
    const char* row[KEYS];
    rows_direct(c.value, c, key_b, key_kv, key_first, key_count, row);
    value_fits = pack_brain_rows(row, c.v_dim, value_tiles);
    rows_direct(c.key, c, key_b, key_kv, key_first, key_count, row);
    key_fits = pack_brain_rows(row, c.dim, key_tiles);
    pack_brain_columns(row, c.dim, key_turned);
    return key_fits && value_fits;
}
inline void Backward::read_keys() {
    raw_key = rows_of(c.key, c.pages, key_b, key_kv, key_first, key_count, c.dim, key);
    raw_value = rows_of(c.value, c.pages, key_b, key_kv, key_first, key_count, c.v_dim, value);
    finite_key = raw_key;
}

// The first pair from block `id` on, of which something is seen; `id` is the block after it.
inline bool Backward::find(Pair& pair, long& id, long end, long k0, int n) const {
    for (; id < end; id++) {
        pair.block = sh.plan.block(c, id / sh.plan.blocks, id % sh.plan.blocks);
        pair.id = id;
        Answer a = shaping.classify(pair.block, k0, k0 + n);
        pair.every = a.every;
        if (a.some) return id++, true;
    }
    return false;
}

// The pair at hand in float32, too.
inline void Backward::need_floats(const Block& block, long id) {
    if (!sh.parts) {
        own = sh.floats(id);
        return;
    }
    uint64_t odd[2];  // known
    make_floats(sh, block, own, odd, row_line);
    if (!raw_key.data) read_keys();
}

}  // namespace regard::LEVEL
