// Observers inside the forward: column statistics (Received, Map, Distances) of one block of rows.
//
// What a key receives is known only once a row's sum is. So a block keeps its strip, the weights of
// all its keys as they were when computed, with the largest scores of that moment; when the rows are
// done, the strip is weighed once. The sums of blocks are added in a fixed order: a head's blocks are
// dealt to a number of stripes that depends on its sizes alone, each stripe has buffers of its own,
// and these are added in the end.
#pragma once
#include "state.h"

namespace regard::LEVEL {

// A strip: tile t holds [panel][key][PW] weights, relative to top[t · lanes …].
struct Strip {
    int lanes;
    float *weight, *top;
    uint8_t* held;  // whether tile t was computed

    static long floats(long keys, int lanes) {
        long tiles = (keys + KEYS - 1) / KEYS;
        return tiles * KEYS * lanes + tiles * lanes + (tiles + 3) / 4;
    }
    Strip() = default;
    Strip(float* at, long keys, int lanes) : lanes(lanes), weight(at) {
        long tiles = (keys + KEYS - 1) / KEYS;
        top = weight + tiles * KEYS * lanes;
        held = (uint8_t*)(top + tiles * lanes);
    }
    float* tile(long t) const { return weight + t * KEYS * lanes; }
    const float* from(long key) const { return tile(key / KEYS) + key % KEYS * PW; }
};

// The column statistics that one stripe of one head gathers.
struct Columns {
    float* received;   // [observer][k_len]
    int32_t* count;    // likewise
    float* maps;       // each [rows][cols], one after another
    float* distances;  // each [past, future][bins]

    static long map_floats(const RegardObserve& o) {
        long total = 0;
        for (long i = 0; i < o.map_count; i++) total += o.map[i].rows * o.map[i].cols;
        return total;
    }
    static long distance_floats(const RegardObserve& o) {
        long total = 0;
        for (long i = 0; i < o.distances_count; i++) total += 2 * o.distances[i].bins;
        return total;
    }
    static long floats(const RegardCall& c, const RegardObserve& o) {
        return 2 * o.received_count * c.k_len + map_floats(o) + distance_floats(o);
    }
    Columns() = default;
    Columns(float* at, const RegardCall& c, const RegardObserve& o) {
        received = at;
        count = (int32_t*)(received + o.received_count * c.k_len);
        maps = (float*)count + o.received_count * c.k_len;
        distances = maps + map_floats(o);
    }

    // then(first, last): the cells, counted from `maps`, that the blocks of a stripe touch: those of
    // their own rows, which are few of a large map.
    template <class Then>
    static void touched(const RegardCall& c, const RegardObserve& o, long stripe, long stripes,
                        Then then) {
        long cells = 0;
        for (long m = 0; m < o.map_count; m++) {
            const RegardMap& map = o.map[m];
            auto row_of = [&](long query) {
                return floor_div(query + c.query_start, map.row_size) - map.row_first;
            };
            long done = 0;  // rows in front of it were visited
            long blocks = (c.q_len + LANES - 1) / LANES;  // dealt from the last one on
            for (long q0 = (blocks - 1 - stripe) % stripes * LANES; q0 < c.q_len; q0 += stripes * LANES) {
                long first = most(done, row_of(q0)), last = row_of(least(q0 + LANES, c.q_len) - 1) + 1;
                if (first < last && map.cols) then(cells + first * map.cols, cells + last * map.cols);
                done = most(done, last);
            }
            cells += map.rows * map.cols;
        }
    }
    // Zeroes what the blocks of one stripe are added to.
    void clear(const RegardCall& c, const RegardObserve& o, long stripe, long stripes) {
        memset(received, 0, 2 * o.received_count * c.k_len * sizeof(float));
        touched(c, o, stripe, stripes, [&](long first, long last) {
            memset(maps + first, 0, (last - first) * sizeof(float));
        });
        memset(distances, 0, distance_floats(o) * sizeof(float));
    }

    // Adds another stripe's.
    void add(const Columns& other, const RegardCall& c, const RegardObserve& o, long stripe,
             long stripes) {
        for (long i = 0; i < o.received_count * c.k_len; i++) {
            received[i] += other.received[i];
            count[i] += other.count[i];
        }
        touched(c, o, stripe, stripes, [&](long first, long last) {
            long m = 0, end = o.map[0].rows * o.map[0].cols;
            while (first >= end) m++, end += o.map[m].rows * o.map[m].cols;
            float *to = maps, *from = other.maps;
            for (long i = first; i < last; i++)
                to[i] = !o.map[m].is_max   ? to[i] + from[i]
                        : from[i] <= to[i] ? to[i] : from[i];
        });
        for (long i = 0; i < distance_floats(o); i++) distances[i] += other.distances[i];
    }

    // To the call's own tensors.
    void write(const RegardCall& c, const RegardObserve& o, long b, long h) const {
        long row = b * c.heads + h;
        for (long i = 0; i < o.received_count; i++) {
            memcpy(o.received[i].sum + row * c.k_len, received + i * c.k_len, c.k_len * 4);
            if (o.received[i].count)
                memcpy(o.received[i].count + row * c.k_len, count + i * c.k_len, c.k_len * 4);
        }
        const float* from = maps;
        for (long m = 0; m < o.map_count; m++) {
            long n = o.map[m].rows * o.map[m].cols;
            memcpy(o.map[m].out + row * n, from, n * 4);
            from += n;
        }
        from = distances;
        for (long d = 0; d < o.distances_count; d++) {
            long n = o.distances[d].bins;
            memcpy(o.distances[d].past + row * n, from, n * 4);
            memcpy(o.distances[d].future + row * n, from + n, n * 4);
            from += 2 * n;
        }
    }

    // Counts the queries of a segment that see each key of a tile. words: null, all of them.
    void count_tile(const RegardCall& c, const RegardObserve& o, const Segment& s, long k0, int n,
                    const uint64_t* words) const {
        for (long i = 0; i < o.received_count; i++) {
            long first = o.received[i].first - s.q0, last = o.received[i].last - s.q0;
            uint64_t mine = bits_between(first, last) & first_bits(s.count);
            int32_t* to = count + i * c.k_len + k0;
            for (int j = 0; j < n; j++)
                to[j] += __builtin_popcountll(words ? words[j] >> s.lane & mine : mine);
        }
    }
};

// Weighs the strip of a finished block: one walk over its tiles serves all observers.
class Weighing {
  public:
    // scale: [lane] 1 / total, 0 for lanes that hold no row; scratch: floats() of them.
    Weighing(const RegardCall& call, const RegardObserve& o, const Strip& strip, const State& state,
             const float* scale, float* scratch)
        : call(call), o(o), strip(strip), state(state), scale(scale), lanes(strip.lanes),
          factor(scratch), sum(factor + LANES), cells(sum + KEYS) {}

    static long floats(const RegardObserve& o) {
        long count = 0;
        for (long m = 0; m < o.map_count; m++) count += o.map[m].cols;
        for (long d = 0; d < o.distances_count; d++) count += 2 * o.distances[d].bins;
        return LANES + KEYS + count * LANES;
    }

    // What the rows of one segment give the keys in front of `end`.
    void segment(const Segment& s, long end, const Columns& to) {
        memset(cells, 0, (floats(o) - LANES - KEYS) * sizeof(float));
        summing = o.received_count || o.distances_count;
        for (long m = 0; m < o.map_count; m++) summing |= in_one_row(o.map[m], s);
        for_tiles(s, 0, s.count, end, [&](long k0, int n) {
            // So few keys at a time that their weights stay in the nearest cache for all observers
            for (int j = 0; j < n; j += FEW_KEYS) few_keys(s, k0 + j, (int)least(FEW_KEYS, n - j), to);
        });
        receive_parts(s, end, to);
        const float* cell = cells;
        float *map = to.maps, *bins = to.distances;
        for (long m = 0; m < o.map_count; m++) {
            deal(o.map[m], s, cell, map);
            cell += o.map[m].cols * LANES;
            map += o.map[m].rows * o.map[m].cols;
        }
        for (long d = 0; d < o.distances_count; d++)
            for (long b = 0; b < 2 * o.distances[d].bins; b++, cell += LANES, bins++)
                for (int r = 0; r < s.count; r++) *bins += cell[s.lane + r];
    }

  private:
    static constexpr int FEW_KEYS = 32;
    const RegardCall& call;
    const RegardObserve& o;
    const Strip& strip;
    const State& state;
    const float* scale;
    int lanes;
    float *factor, *sum, *cells;
    bool clean = false;    // every lane of the strip counts
    bool summing = false;  // someone asks for the sums over all lanes

    void few_keys(const Segment& s, long k0, int n, const Columns& to) {
        if (summing) add_up(k0, n);
        receive(s, k0, n, to);
        float *cell = cells, *map = to.maps, *bins = to.distances;
        for (long m = 0; m < o.map_count; m++) {
            pool(o.map[m], s, k0, n, cell, map);
            cell += o.map[m].cols * LANES;
            map += o.map[m].rows * o.map[m].cols;
        }
        for (long d = 0; d < o.distances_count; d++) {
            measure(o.distances[d], s, k0, n, cell, bins);
            cell += 2 * o.distances[d].bins * LANES;
            bins += 2 * o.distances[d].bins;
        }
    }

    // For each tile that was computed: `factor` is what its weights are multiplied by, 0 outside of
    // the rows first … last of the segment.
    template <class Then>
    void for_tiles(const Segment& s, long first, long last, long end, Then then) {
        clean = s.lane == 0 && first == 0 && last == lanes;
        for (long t = 0; t * KEYS < end; t++) {
            if (!strip.held[t]) continue;
            const float* was = strip.top + t * lanes;
            for (int c = 0; c < lanes; c += W) {
                V f = exp(load(was + c) - load(state.top + c)) * load(scale + c);
                I mine = lanes_of(bits_between(s.lane + first, s.lane + last) >> c);
                store(factor + c, mine ? f : V{});
            }
            then(t * KEYS, (int)least(KEYS, end - t * KEYS));
        }
    }

    // The weights at x of W lanes. A lane that does not count may hold anything, so it is left out
    // rather than multiplied by 0.
    template <bool clean>
    static INLINE_MEMBER V weighed(const float* x, V f) {
        return clean ? load(x) * f : f == 0.f ? V{} : load(x) * f;
    }

    // sum[j]: what the lanes give key j of a tile.
    void add_up(long k0, int n) { clean ? add_up_lanes<true>(k0, n) : add_up_lanes<false>(k0, n); }
    template <bool clean>
    void add_up_lanes(long k0, int n) {
        const float* w = strip.from(k0);
        for (int j = 0; j < n; j += W) {
            V part[W] = {};
            for (int p = 0; p < lanes / PW; p++) {
                V f = load(factor + p * PW), g = load(factor + p * PW + W);
                const float* x = w + ((long)p * KEYS + j) * PW;
                // Past the last key lies scratch, whose sums are not kept
                #pragma GCC unroll 16
                for (int i = 0; i < W; i++)
                    part[i] += weighed<clean>(x + i * PW, f) + weighed<clean>(x + i * PW + W, g);
            }
            store(sum + j, sums(part));
        }
    }

    // cell[lane] += the weights of the keys [from, to) of a tile, in the lanes [a, b); or the largest.
    template <bool largest, bool clean>
    void gather(long k0, int from, int to, int a, int b, float* cell) const {
        const float* w = strip.from(k0);
        for (int c = a / W * W; c < b; c += W) {
            const float* x = w + (long)(c / PW) * KEYS * PW + c % PW;
            V f = load(factor + c), total = load(cell + c), was = total;
            for (int j = from; j < to; j++) {
                V y = weighed<clean>(x + j * PW, f);
                total = !largest ? total + y : y <= total ? total : y;
            }
            I mine = lanes_of(bits_between(a, b) >> c);
            store(cell + c, mine ? total : was);
        }
    }

    void receive(const Segment& s, long k0, int n, const Columns& to) {
        for (long i = 0; i < o.received_count; i++) {
            if (o.received[i].first > s.q0 || o.received[i].last < s.q0 + s.count) continue;
            float* x = to.received + i * call.k_len + k0;
            for (int j = 0; j < n; j++) x[j] += sum[j];
        }
    }
    // Of a range of queries that holds only some of the rows.
    void receive_parts(const Segment& s, long end, const Columns& to) {
        for (long i = 0; i < o.received_count; i++) {
            long first = most(o.received[i].first - s.q0, 0);
            long last = least(o.received[i].last - s.q0, s.count);
            if (first >= last || last - first == s.count) continue;
            for_tiles(s, first, last, end, [&](long k0, int n) {
                add_up(k0, n);
                float* x = to.received + i * call.k_len + k0;
                for (int j = 0; j < n; j++) x[j] += sum[j];
            });
        }
    }

    // Whether all rows of a segment stand in one row of a map's cells: then sums over lanes will do.
    bool in_one_row(const RegardMap& map, const Segment& s) const {
        long query = s.q0 + call.query_start;
        return !map.is_max && floor_div(query, map.row_size) ==
                                  floor_div(query + s.count - 1, map.row_size);
    }
    float* row_of(const RegardMap& map, long query, float* to) const {
        return to + (floor_div(query + call.query_start, map.row_size) - map.row_first) * map.cols;
    }

    void pool(const RegardMap& map, const Segment& s, long k0, int n, float* cell, float* to) {
        bool one = in_one_row(map, s);
        float* row = row_of(map, s.q0, to);
        for (int j = 0; j < n;) {
            long key = k0 + j + call.key_start, col = floor_div(key, map.col_size);
            int next = (int)least(n, j + (col + 1) * map.col_size - key);
            col -= map.col_first;
            if (one)
                for (int i = j; i < next; i++) row[col] += sum[i];
            else if (map.is_max)
                gather<true, false>(k0, j, next, 0, lanes, cell + col * LANES);
            else if (clean)
                gather<false, true>(k0, j, next, 0, lanes, cell + col * LANES);
            else
                gather<false, false>(k0, j, next, 0, lanes, cell + col * LANES);
            j = next;
        }
    }
    // Deals the cells of each lane to the rows of the map.
    void deal(const RegardMap& map, const Segment& s, const float* cell, float* to) const {
        if (in_one_row(map, s)) return;
        for (int lane = s.lane / W * W; lane < s.lane + s.count; lane += W) {
            float* row[W];  // null: a lane that holds none
            for (int i = 0; i < W; i++) {
                int r = lane + i - s.lane;
                row[i] = r < 0 || r >= s.count ? nullptr : row_of(map, s.q0 + r, to);
            }
            long k = 0;
            for (; k + W <= map.cols; k += W) {
                V v[W];
                #pragma GCC unroll 16
                for (int i = 0; i < W; i++) v[i] = load(cell + (k + i) * LANES + lane);
                transpose(v);
                #pragma GCC unroll 16
                for (int i = 0; i < W; i++) {
                    if (!row[i]) continue;
                    V x = load(row[i] + k);
                    store(row[i] + k, !map.is_max ? x + v[i] : v[i] <= x ? x : v[i]);
                }
            }
            for (; k < map.cols; k++)
                for (int i = 0; i < W; i++) {
                    if (!row[i]) continue;
                    float &x = row[i][k], y = cell[k * LANES + lane + i];
                    x = !map.is_max ? x + y : y <= x ? x : y;
                }
        }
    }

    // to: [past, future][bin]. Most keys stand in one bin for all rows; near the borders of the bins
    // the rows are dealt to several.
    void measure(const RegardDistances& d, const Segment& s, long k0, int n, float* cell, float* to) {
        long query = s.q0 + call.query_start - call.key_start;
        for (int j = 0; j < n; j++) {
            for (int r = 0; r < s.count;) {
                // The rows r … next − 1 lie equally far from the key, as far as bins go
                long distance = query + r - (k0 + j), size = distance < 0 ? -distance : distance;
                long b = d.bins - 1;
                while (d.edges[b] > size) b--;
                long run = distance < 0 ? size - most(d.edges[b], 1) + 1
                           : b + 1 < d.bins ? d.edges[b + 1] - size : s.count;
                int next = (int)least(r + run, s.count);
                long bin = distance < 0 ? d.bins + b : b;
                if (next - r == s.count)
                    to[bin] += sum[j];
                else
                    gather<false, false>(k0, j, j + 1, s.lane + r, s.lane + next, cell + bin * LANES);
                r = next;
            }
        }
    }
};

}  // namespace regard::LEVEL
