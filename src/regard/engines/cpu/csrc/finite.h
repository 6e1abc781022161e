// Numbers that are not finite. A weight of 0 does not hide them, 0 · NaN is NaN; so products are those of
// the finite ones, and beside them stands what each row sees of the others.
#pragma once
#include "rows.h"

namespace regard::LEVEL {

static bool all_finite(const float* x, long n) {
    V sum = {};
    for (long i = 0; i < n; i += W) sum += load_some(x + i, n - i) * 0.f;
    return !any(sum != sum);
}

// 0 for those that are not.
static void fill_odd(float* x, long n) {
    for (long i = 0; i < n; i++)
        if (x[i] - x[i] != 0) x[i] = 0;
}

// Those rows of a tile that hold such numbers, as they are.
struct Odd {
    Rows rows;
    int count = 0;
    uint8_t key[KEYS];

    void find(Rows given, int n, long dim) {
        rows = given;
        count = 0;
        for (int j = 0; j < n; j++)
            if (!all_finite(rows.data + j * rows.ld, dim)) key[count++] = (uint8_t)j;
    }
    const float* row(int i) const { return rows.data + key[i] * rows.ld; }

    // All rows, with 0 for what is not finite; the same where there is no such number.
    Rows filled(int n, long dim, float* scratch) const {
        if (!count) return rows;
        for (int j = 0; j < n; j++) memcpy(scratch + j * dim, rows.data + j * rows.ld, dim * sizeof(float));
        for (int i = 0; i < count; i++) fill_odd(scratch + key[i] * dim, dim);
        return {scratch, dim};
    }
};

// The same of one row in its own type.
static void fill_odd_row(int64_t type, const char* from, long dim, char* to) {
    memcpy(to, from, dim * size_of(type));
    if (type == F32) return fill_odd((float*)to, dim);
    uint16_t *x = (uint16_t*)to, exponent = type == F16 ? 0x7c00 : 0x7f80;
    for (long d = 0; d < dim; d++)
        if ((x[d] & exponent) == exponent) x[d] = 0;
}

// Which of a panel's lanes [dim][PW] hold such numbers.
static uint64_t odd_lanes(const float* panel, long dim) {
    uint64_t bits = 0;
    for (int l = 0; l < PW; l += W) {
        V sum = {};
        for (long d = 0; d < dim; d++) sum += load(panel + d * PW + l) * 0.f;
        if (!any(sum != sum)) continue;
        for (int i = 0; i < W; i++) bits |= (uint64_t)(sum[i] != sum[i]) << (l + i);
    }
    return bits;
}

// Those lanes of one key's scores that are not −∞: no key is hidden from them.
INLINE uint64_t shown_lanes(const float* s, int lanes) {
    uint64_t bits = 0;
    for (int i = 0; i < lanes; i++) bits |= (uint64_t)(s[i] != -INFINITY) << i;
    return bits;
}

// The products that a panel with 0 for these numbers has missed: of the odd rows with all lanes, and of all
// rows with the odd lanes. s: [row][ld], from row `from` of the tile on; lane: [dim][PW], as it is; rows:
// read only if there are odd lanes.
static void odd_products(const Odd& odd, Rows rows, uint64_t lanes, const float* lane, long dim, int from,
                         int n, int width, float* s, long ld) {
    auto dot = [&](const float* row, int l) {
        float total = 0;
        for (long d = 0; d < dim; d++) total += row[d] * lane[d * PW + l];
        return total;
    };
    for (int i = 0; i < odd.count; i++) {
        int j = odd.key[i] - from;
        if (j < 0 || j >= n) continue;
        for (int l = 0; l < width; l++) s[j * ld + l] = dot(odd.row(i), l);
    }
    for (int l = 0; l < width && lanes >> l; l++)
        for (int j = 0; j < n && lanes >> l & 1; j++)
            s[j * ld + l] = dot(rows.data + (from + j) * rows.ld, l);
}

}  // namespace regard::LEVEL
