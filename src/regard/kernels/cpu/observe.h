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

    // Adds another stripe's.
    void add(const Columns& other, const RegardCall& c, const RegardObserve& o) {
        for (long i = 0; i < o.received_count * c.k_len; i++) {
            received[i] += other.received[i];
            count[i] += other.count[i];
        }
        float *to = maps, *from = other.maps;
        for (long m = 0; m < o.map_count; m++) {
            long n = o.map[m].rows * o.map[m].cols;
            for (long i = 0; i < n; i++)
                to[i] = !o.map[m].is_max   ? to[i] + from[i]
                        : from[i] <= to[i] ? to[i] : from[i];
            to += n;
            from += n;
        }
        for (long i = 0; i < distance_floats(o); i++) distances[i] += other.distances[i];
    }

    // To the call's own tensors.
    void write(const RegardCall& c, const RegardObserve& o, long b, long h) const {
        long row = b * c.heads + h;
        for (long i = 0; i < o.received_count; i++) {
            memcpy(o.received[i].sum + row * c.k_len, received + i * c.k_len, c.k_len * 4);
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

// Weighs the strip of a finished block.
class Weighing {
  public:
    // scale: [lane] 1 / total, 0 for lanes that hold no row; scratch: floats() of them.
    Weighing(const RegardCall& call, const RegardObserve& o, const Strip& strip, const State& state,
             const float* scale, float* scratch)
        : call(call), o(o), strip(strip), state(state), scale(scale), lanes(strip.lanes),
          factor(scratch), sum(factor + LANES), by_lane(sum + KEYS) {}

    static long floats(const RegardObserve& o) {
        long most_cells = 0;
        for (long m = 0; m < o.map_count; m++) most_cells = most(most_cells, o.map[m].cols);
        for (long d = 0; d < o.distances_count; d++)
            most_cells = most(most_cells, 2 * o.distances[d].bins);
        return LANES + KEYS + most_cells * LANES;
    }

    // What the rows of one segment give the keys in front of `end`.
    void segment(const Segment& s, long end, const Columns& to) {
        for (long i = 0; i < o.received_count; i++) {
            long first = most(o.received[i].first - s.q0, 0);
            long last = least(o.received[i].last - s.q0, s.count);
            if (first < last)
                for_tiles(s, first, last, end, [&](long k0, int n) {
                    add_up(k0, n);
                    float* x = to.received + i * call.k_len + k0;
                    for (int j = 0; j < n; j++) x[j] += sum[j];
                });
        }
        float* map = to.maps;
        for (long m = 0; m < o.map_count; m++) {
            pool(o.map[m], s, end, map);
            map += o.map[m].rows * o.map[m].cols;
        }
        float* bins = to.distances;
        for (long d = 0; d < o.distances_count; d++) {
            measure(o.distances[d], s, end, bins);
            bins += 2 * o.distances[d].bins;
        }
    }

  private:
    const RegardCall& call;
    const RegardObserve& o;
    const Strip& strip;
    const State& state;
    const float* scale;
    int lanes;
    float *factor, *sum, *by_lane;

    // For each tile that was computed: `factor` is what its weights are multiplied by, 0 outside of
    // the rows first … last of the segment.
    template <class Then>
    void for_tiles(const Segment& s, long first, long last, long end, Then then) {
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

    // A lane without a row may hold anything, so it is left out rather than multiplied by 0.
    INLINE_MEMBER V weighed(const float* x, int c) const {
        V f = load(factor + c);
        return f == 0.f ? V{} : load(x) * f;
    }

    // sum[j]: what the lanes give key j of a tile.
    void add_up(long k0, int n) {
        const float* w = strip.tile(k0 / KEYS);
        for (int j = 0; j < n; j += W) {
            V part[W];
            for (int i = 0; i < W; i++) {
                int at = least(j + i, n - 1);
                part[i] = V{};
                for (int p = 0; p < lanes / PW; p++) {
                    const float* x = w + ((long)p * KEYS + at) * PW;
                    part[i] += weighed(x, p * PW) + weighed(x + W, p * PW + W);
                }
            }
            V all_of = sums(part);
            for (int i = 0; i < W && j + i < n; i++) sum[j + i] = all_of[i];
        }
    }

    // Adds the lanes [from, to) of key j of a tile, one by one, to a cell; or takes the larger.
    template <bool largest>
    void gather(long k0, int j, float* cell, int from, int to) {
        const float* w = strip.tile(k0 / KEYS);
        for (int c = from / W * W; c < to; c += W) {
            V x = weighed(w + ((long)(c / PW) * KEYS + j) * PW + c % PW, c), y = load(cell + c);
            I mine = lanes_of(bits_between(from, to) >> c);
            V joined = !largest ? x + y : x <= y ? y : x;
            store(cell + c, mine ? joined : y);
        }
    }

    void pool(const RegardMap& map, const Segment& s, long end, float* to) {
        long query = s.q0 + call.query_start;
        long first = floor_div(query, map.row_size), last = floor_div(query + s.count - 1, map.row_size);
        auto col = [&](long k) {
            return floor_div(k + call.key_start, map.col_size) - map.col_first;
        };
        if (first == last && !map.is_max) {  // one row of cells: sums over all lanes will do
            float* row = to + (first - map.row_first) * map.cols;
            for_tiles(s, 0, s.count, end, [&](long k0, int n) {
                add_up(k0, n);
                for (int j = 0; j < n; j++) row[col(k0 + j)] += sum[j];
            });
            return;
        }
        memset(by_lane, 0, (size_t)map.cols * LANES * sizeof(float));
        for_tiles(s, 0, s.count, end, [&](long k0, int n) {
            for (int j = 0; j < n; j++) {
                float* cell = by_lane + col(k0 + j) * LANES;
                map.is_max ? gather<true>(k0, j, cell, 0, lanes)
                           : gather<false>(k0, j, cell, 0, lanes);
            }
        });
        for (int r = 0; r < s.count; r++) {
            float* row = to + (floor_div(query + r, map.row_size) - map.row_first) * map.cols;
            for (long k = 0; k < map.cols; k++) {
                float x = by_lane[k * LANES + s.lane + r];
                row[k] = !map.is_max ? row[k] + x : x <= row[k] ? row[k] : x;
            }
        }
    }

    // to: [past, future][bin]. Most keys stand in one bin for all rows; near the borders of the bins
    // the rows are dealt to several.
    void measure(const RegardDistances& d, const Segment& s, long end, float* to) {
        long query = s.q0 + call.query_start - call.key_start;
        memset(by_lane, 0, (size_t)2 * d.bins * LANES * sizeof(float));
        for_tiles(s, 0, s.count, end, [&](long k0, int n) {
            add_up(k0, n);
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
                        gather<false>(k0, j, by_lane + bin * LANES, s.lane + r, s.lane + next);
                    r = next;
                }
            }
        });
        for (long b = 0; b < 2 * d.bins; b++)
            for (int r = 0; r < s.count; r++) to[b] += by_lane[b * LANES + s.lane + r];
    }
};

}  // namespace regard::LEVEL
