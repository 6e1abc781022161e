// A block of rows on its way over the keys: tiles of 64 rows × 128 keys, an online softmax over them
// (Dao et al. 2022), observers beside it. Lanes are queries: scores stand as [key][lane], so that
// maxima, sums, top-k and entropy are vertical, and keys and values are read by broadcast where they lie.
#pragma once
#include "few.h"
#include "matmul.h"
#include "observe.h"
#include "parts.h"
#include "plan.h"
#include "softmax.h"
#include "timed.h"
#include "weights.h"

namespace regard::LEVEL {

// What the items of one call share.
struct Shared {
    RegardCall call;
    RegardObserve observe;
    bool observing;
    Plan plan;
    Shaping shaping;
    KeyTiles tiles;
    uint16_t* packed;           // keys and values as tiles, once for all; or null: each block's own
    long v_dim;                 // of mixed values: filled up to whole tiles
    float* columns;             // [item of the batch][head][stripe]
    long column_floats;
    float *partial, *strips;    // of blocks whose keys are cut into chunks
    long partial_floats, strip_floats;
    std::atomic<int>* left;     // chunks of a block that are not done
    Queue* queue;

    Columns column(long b, long h, long stripe) const {
        long stripes = plan.flat ? 1 : plan.stripes;
        long at = ((b * call.heads + h) * stripes + (plan.flat ? 0 : stripe)) * column_floats;
        return Columns(columns + at, call, observe);
    }
    // How many rows a block has, if they are few and not on tiles; else 0.
    int few(const Block& block) const {
        bool whole = call.dim % W == 0 && call.v_dim % W == 0 && call.key.stride[3] == 1 &&
                     call.value.stride[3] == 1;
        return whole && block.count <= FEW && !tiles.serve(plan, block) ? block.count : 0;
    }
    uint16_t* packed_tile(long b, long kv, long tile) const {
        return packed + ((b * call.kv_heads + kv) * ((call.k_len + KEYS - 1) / KEYS) + tile) * tiles.size();
    }
};

class Forward {
  public:
    explicit Forward(Shared& shared)
        : sh(shared), c(shared.call), o(shared.observe), plan(shared.plan), shaping(shared.shaping) {
        ready = laid_out(arena(), [&](Cutter& cut) { lay_out(cut); });
    }
    ~Forward() { arena().trim(); }

    void run() {
        TileSession session(sh.tiles.parts);
        for (long item; ready && sh.queue->take(item);) {
            long chunk = item % plan.chunks, stripe = item / plan.chunks % plan.stripes;
            long owner = item / plan.chunks / plan.stripes;
            if (plan.chunks > 1) {
                part(owner, stripe, chunk);
                continue;
            }
            // Later queries see more keys under a causal mask: longest first
            for (long index = plan.blocks - 1 - stripe; index >= 0; index -= plan.stripes) {
                Block block = plan.block(c, owner, index);
                State state(own_state, block.lanes(), sh.v_dim, (int)o.k, sh.few(block));
                Strip strip(own_strip, c.k_len, block.lanes());
                mix_finitely(block, state, strip, 0, 0, c.k_len, stripe);
                finish(block, state, strip, stripe);
            }
        }
    }

  private:
    static Arena& arena() {
        static thread_local Arena own;
        return own;
    }

    Shared& sh;
    bool ready = false;
    const RegardCall& c;
    const RegardObserve& o;
    const Plan& plan;
    const Shaping& shaping;
    float *query, *query_rows, *few_scores, *line, *scores, *dropped, *biases, *factors, *keys, *values;
    float *own_state, *own_strip;
    float *scale, *weighing, *turned;
    uint64_t *visible, *stack;
    const uint64_t* seen;  // of the keys at hand, which rows see them; null: all
    uint16_t *query_parts, *weight_parts, *own_keys;
    FewKeys few_keys;
    long last;  // of the walk: the key after its last one
    bool few, on_tiles, query_fits;  // of the block at hand
    uint64_t odd_queries[PANELS] = {};  // its lanes that are not finite, where 0 stands for that on tiles
    bool careful = false;            // its values are looked at, as what is mixed is not finite
    float* clean;                    // a tile's keys or values, 0 for what is not finite
    Odd odd_keys, odd_values;        // of the tile at hand, where 0 stands for what is not finite
    uint64_t odd_seen[KEYS];         // which lanes of the panel at hand see these values
    float after;                // by which its scores are multiplied yet
    Beside beside;              // products on tiles that are under way
    const uint16_t* ahead = nullptr;  // the keys whose scores it makes, and for which panel
    int ahead_panel = 0;
    int turn = 0, weights_turn = 0;  // of two buffers, which one scores and weights go to
    PartClock clock;

    void lay_out(Cutter& cut) {
        long dim = most(c.dim, c.v_dim);
        query = cut.cut(LANES * c.dim);
        query_rows = cut.cut(FEW * c.dim);
        few_scores = cut.cut(FEW * KEYS);
        line = cut.cut(W * (dim + W));
        turned = cut.cut(W * (dim + W));
        scores = cut.cut(KEYS * PW);
        dropped = cut.cut(KEYS * PW);
        biases = cut.cut(KEYS * LANES);
        factors = cut.cut(c.dropout ? KEYS * LANES : 0);
        keys = cut.cut(KEYS * c.dim);
        values = cut.cut(KEYS * c.v_dim);
        clean = cut.cut(KEYS * dim);
        own_state = cut.cut(State::floats(LANES, sh.v_dim, (int)o.k));
        own_strip = cut.cut(plan.columns && plan.chunks == 1 ? Strip::floats(c.k_len, LANES) : 0);
        scale = cut.cut(LANES);
        weighing = cut.cut(plan.columns ? Weighing::floats(o) : 0);
        visible = (uint64_t*)cut.cut(2 * KEYS);
        stack = (uint64_t*)cut.cut(2 * Shaping::words(c));
        auto halves = [&](long count) { return (uint16_t*)cut.cut((count + 1) / 2); };
        query_parts = halves(sh.tiles.parts * sh.tiles.dim * DEPTH * LANES);
        weight_parts = halves(2 * sh.tiles.parts * KEYS * PW);
        own_keys = halves(sh.packed ? 0 : sh.tiles.size());
    }

    // One chunk of a block's keys; whoever does the last of them joins them all, in order.
    void part(long owner, long index, long chunk) {
        Block block = plan.block(c, owner, index);
        long id = owner * plan.blocks + index;
        float* mine = sh.partial + id * plan.chunks * sh.partial_floats;
        auto state = [&](long i) {
            return State(mine + i * sh.partial_floats, block.lanes(), sh.v_dim, (int)o.k, sh.few(block));
        };
        Strip strip(sh.strips + id * sh.strip_floats, c.k_len, block.lanes());
        State own = state(chunk);
        long k0 = chunk * plan.chunk;
        mix_finitely(block, own, strip, chunk, k0, least(k0 + plan.chunk, c.k_len), 0);
        // Releases what this chunk wrote, and acquires what the others did before they counted down
        if (sh.left[id].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        State whole = state(0);
        for (long i = 1; i < plan.chunks; i++) whole.join(state(i));
        finish(block, whole, strip, 0);
    }

    // All tiles between two keys. No value that is not finite is found in passing; but none, hidden or
    // not, leaves the mix finite, and then they are gone over again.
    void mix_finitely(const Block& block, State& state, Strip& strip, long chunk, long from, long to,
                      long stripe) {
        start(block, state, chunk);
        walk(block, state, strip, from, to, stripe);
        if (all_finite(state.mixed, (state.few ? state.few : state.lanes) * state.v_dim)) return;
        careful = true;
        start(block, state, chunk);
        walk(block, state, strip, from, to, stripe);
        careful = false;
    }

    void start(const Block& block, State& state, long chunk) {
        Timed packing(clock, PACKING);
        state.clear();
        if (c.sinks && chunk == 0)
            for (int i = 0; i < block.segments; i++)
                for (int r = 0; r < block.segment[i].count; r++)
                    state.sink(block.segment[i].lane + r, c.sinks[block.segment[i].h]);
        on_tiles = sh.tiles.serve(plan, block);
        after = scale_after(c, on_tiles ? sh.tiles.parts : 0, shaping.query_scale());
        few = state.few > 0;
        memset(odd_queries, 0, sizeof odd_queries);
        if (few) return few_queries(block);
        turn_rows(c.query, block, c.dim, after != 1.f ? 1.f : shaping.query_scale(), line, query);
        if (on_tiles)
            query_fits = with_parts<bool>(sh.tiles.parts, [&](auto of) {
                bool all_fit = true;
                for (int p = 0; p < block.panels; p++) {
                    const float* panel = query + p * c.dim * PW;
                    auto fits = [&](const float* x) {
                        return pack_columns<of.count, false>(x, PW, c.dim, PW, query_tiles(p));
                    };
                    bool fit = fits(panel);
                    odd_queries[p] = fit ? 0 : odd_lanes(panel, c.dim);
                    if (odd_queries[p]) {  // again, with 0 for these: `odd_scores` gives their scores
                        memcpy(clean, panel, c.dim * PW * sizeof(float));
                        fill_odd(clean, c.dim * PW);
                        fit = fits(clean);
                    }
                    all_fit &= fit;
                }
                return all_fit;
            });
    }
    void few_queries(const Block& block) {
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            for (int r = 0; r < s.count; r++) {
                float* row = query_rows + (s.lane + r) * c.dim;
                widen(c.query.type, address(c.query, s.b, s.h, s.q0 + r), c.query.stride[3], c.dim, row);
                for (long d = 0; d < c.dim; d++) row[d] *= shaping.query_scale();
                apart(c.key.type, c.dim, row);
            }
        }
    }

    Tiles query_tiles(int p) const {
        long step = sh.tiles.dim * DEPTH * PW;
        return {query_parts + p * sh.tiles.parts * step, PW / SIDE, step};
    }
    Tiles weight_tiles() const { return {weight_parts, PW / SIDE, KEYS * PW}; }

    // The keys that an item of the batch has.
    long keys_of(long b) const { return c.pages.table ? c.pages.lengths[b] : c.k_len; }

    // All tiles between two keys. Sixteen at a time are asked first whether any shows something.
    void walk(const Block& block, State& state, Strip& strip, long from, long to, long stripe) {
        if (plan.columns)
            for (long t = from / KEYS; t * KEYS < to; t++) strip.held[t] = 0;
        last = to = least(to, keys_of(block.segment[0].b));
        for (long far = from; far < to; far += 16 * KEYS) {
            long end = least(far + 16 * KEYS, to);
            Answer several = {true, true};
            if (!shaping.sees_all()) several = shaping.classify(block, far, end);
            if (!several.some) continue;
            for (long k0 = far; k0 < end; k0 += KEYS) {
                int n = (int)least(KEYS, end - k0);
                Answer a = several;
                if (!a.every) a = shaping.classify(block, k0, k0 + n);
                if (a.some) tile(block, state, strip, k0, n, a.every, stripe);
            }
        }
        drain_tiles();
        ahead = nullptr;
    }

    void tile(const Block& block, State& state, Strip& strip, long k0, int n, bool every, long stripe) {
        Timed::tile(clock);
        const Segment& first = block.segment[0];
        long kv = first.h / plan.group;
        long t = k0 / KEYS;
        int from = 0, whole = n;
        if (!every) {
            shaping.look(block, k0, n, visible, stack);
            if (!on_tiles) n = trim(visible, from, n);
            if (!n) return;
            k0 += from;
        }
        seen = every ? nullptr : visible + from;
        if (o.received_count && !careful) count_rows(block, k0, n, stripe);
        if (shaping.biased) shaping.bias(block, k0, n, biases);
        if (c.dropout) shaping.dropout(block, k0, n, factors);
        Sides of = sides(first.b, kv, k0, n);
        float* held = plan.columns ? strip.tile(t) : nullptr;
        for (int p = 0; p < block.panels; p++) {
            float* keep = held ? held + (long)p * KEYS * PW : nullptr;
            float* s = held ? keep + from * PW : scores;
            if (of.keys.data && of.values.data) {
                with_parts(sh.tiles.parts, [&](auto split) {
                    if (block.panel_rows(p) > W)
                        tile_panel<split.count, 2>(block, state, p, of, keep, k0, n);
                    else
                        tile_panel<split.count, 1>(block, state, p, of, keep, k0, n);
                });
                continue;
            }
            drain_tiles(), ahead = nullptr;
            int mine = every || few || on_tiles ? n : seen_keys(seen, p, n);
            if (block.panel_rows(p) > W)
                panel<2>(block, state, p, of, s, k0, mine, every);
            else
                panel<1>(block, state, p, of, s, k0, mine, every);
            if (held) {
                memset(keep, 0, from * PW * sizeof(float));
                memset(s + mine * PW, 0, (whole - from - mine) * PW * sizeof(float));
            }
        }
        if (held) {
            // Weights of this tile stand by this top; later tiles may raise it
            memcpy(strip.top + t * block.lanes(), state.top, block.lanes() * sizeof(float));
            strip.held[t] = 1;
        }
        if (!sh.packed) drain_tiles(), ahead = nullptr;  // the next tile's keys come to stand where these do
    }

    void count_rows(const Block& block, long k0, int n, long stripe) {
        Timed observing(clock, OBSERVERS);
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            sh.column(s.b, s.h, stripe).count_tile(c, o, s, k0, n, seen);
        }
    }

    // Leaves out the keys at both ends of a tile that no row sees, by vectors. from: the first that is
    // left; how many are.
    static int trim(const uint64_t* words, int& from, int n) {
        int to = n;
        while (from < to && !words[from]) from++;
        while (to > from && !words[to - 1]) to--;
        from = from / W * W;
        return to - from;
    }

    // Keys and values as the products read them: as tiles where there are some, else as rows.
    struct Sides {
        Rows k, v;
        Tiles keys, values;
    };
    Sides sides(long b, long kv, long k0, int n) {
        Timed packing(clock, PACKING);
        Sides of{};
        auto k = [&] { return rows_of(c.key, c.pages, b, kv, k0, n, c.dim, keys); };
        auto v = [&] { return rows_of(c.value, c.pages, b, kv, k0, n, c.v_dim, values); };
        odd_keys.count = odd_values.count = 0;
        if (on_tiles) {
            uint16_t* at = sh.packed ? sh.packed_tile(b, kv, k0 / KEYS) : own_keys;
            if (!sh.packed && !sh.tiles.pack_brains(c, b, kv, k0, n, at))
                sh.tiles.pack(c, k(), v(), n, at, clean);
            const uint16_t* fits = sh.tiles.fits(at);
            if (query_fits && fits[0]) {
                of.keys = sh.tiles.keys(at);
                if (fits[2]) odd_keys.find(k(), n, c.dim);
            }
            if (fits[1]) {
                of.values = sh.tiles.values(at);
                if (fits[3]) odd_values.find(v(), n, c.v_dim);
            }
        }
        if (few) {
            few_keys.find(c, b, kv, k0, n, last);
            if (careful) odd_values.find(v(), n, c.v_dim), few_keys.fill(c, odd_values, clean);
            return of;
        }
        if (!of.keys.data || any_odd_query()) of.k = k();
        if (!of.values.data) {
            of.v = v();
            if (careful) odd_values.find(of.v, n, c.v_dim), of.v = odd_values.filled(n, c.v_dim, clean);
        }
        return of;
    }
    bool any_odd_query() const {
        uint64_t some = 0;
        for (int p = 0; p < PANELS; p++) some |= odd_queries[p];
        return some != 0;
    }

    // Of the scores on tiles, those that are not of finite numbers alone: the n from `from` on.
    template <int NV>
    void odd_scores(int p, const Rows& rows, int from, int n, float* s) const {
        if (!odd_keys.count && !odd_queries[p]) return;
        odd_products(odd_keys, rows, odd_queries[p], query + p * c.dim * PW, c.dim, from, n, NV * W, s,
                     PW);
    }
    // Before scores become weights: who sees the odd values among the n from `from` on.
    template <int NV>
    void see_odd(int from, int n, const float* s) {
        for (int i = 0; i < odd_values.count; i++) {
            int j = odd_values.key[i] - from;
            if (j >= 0 && j < n) odd_seen[i] = shown_lanes(s + j * PW, NV * W);
        }
    }
    // Adds what they see. weight(j, lane): of the tile's key j; to(lane, d): where that is mixed.
    template <class Weight, class To>
    void mix_odd(int from, int n, Weight weight, To to) const {
        for (int i = 0; i < odd_values.count; i++) {
            int j = odd_values.key[i];
            if (j < from || j >= from + n) continue;
            for (int lane = 0; lane < PW; lane++) {
                if (!(odd_seen[i] >> lane & 1)) continue;
                for (long d = 0; d < c.v_dim; d++) {
                    float x = odd_values.row(i)[d];
                    if (x - x != 0) *to(lane, d) += weight(j, lane) * x;
                }
            }
        }
    }

    // Panels that are wholly on tiles (forward_tiles.h)
    template <int parts, int NV>
    void tile_panel(const Block& block, State& state, int p, const Sides& of, float* keep, long k0,
                    int n);
    template <int parts>
    void drain();
    void drain_tiles();
    template <int parts>
    void begin_scores(const Tiles& keys, int p, int vectors, long count);
    template <int parts>
    void score_ahead(const Block& block, int p, const Sides& of, long k0, int n);
    Tiles next_weights();
    template <int NV>
    void shape_bites(int p, const Sides& of, int n, int bite, const Weigh& weigh);
    template <int parts, int NV>
    bool weigh_bites(State& state, int p, const Weigh& weigh, bool settled, I* beyond);
    template <int NV>
    void lower_kept(const State& state, int p, const V* top, float* from, float* to) const;
    void mix_odd_bite(int from, const uint16_t* tile, float* mixed) const;
    Weigh weigh_of(int p, float* keep, long k0, int bite, int bites) const;
    void shown(int p, int n, int& first, int& last) const;
    float* scores_turn() const { return scores + turn * BITES * BITE * PW; }
    bool folded() const { return after > 0 && !shaping.shaped(); }  // `after` is multiplied in later

    // Other panels, and few rows (forward_panel.h)
    template <int NV>
    void panel(const Block& block, State& state, int p, const Sides& of, float* s, long k0, int n,
               bool every);
    template <int NV>
    void scores_of_panel(int p, const Sides& of, float* s, int n, bool every);
    template <int NV>
    void mix_panel(const Sides& of, const float* weights, int n, float* mixed);
    const float* drop(int p, int n, const float* s);
    void few_rows(const Block& block, State& state, float* s, long k0, int n, bool every);

    // The scores of the rows that are kept whole, s · by; `finish` makes weights of them.
    void keep_rows(const Block& block, int p, const float* s, long k0, int n, float by = 1) {
        Timed observing(clock, OBSERVERS);
        each_kept(block, [&](const Segment&, int lane, float* to) {
            if (lane / PW != p) return;
            for (int j = 0; j < n; j++) to[k0 + j] = s[j * PW + lane % PW] * by;
        });
    }

    template <class Then>
    void each_kept(const Block& block, Then then) {
        for (int i = 0; i < block.segments; i++) {
            const Segment& s = block.segment[i];
            for (long r = 0; r < o.row_count; r++)
                if (o.row[r] >= s.q0 && o.row[r] < s.q0 + s.count)
                    then(s, s.lane + (int)(o.row[r] - s.q0),
                         o.rows + ((s.b * c.heads + s.h) * o.row_count + r) * c.k_len);
        }
    }

    // What is left of a block whose keys are done (forward_rows.h)
    void finish(const Block& block, State& state, Strip& strip, long stripe);
    void write(const Segment& s, const State& state);
    void weigh_top(State& state) const;
    void keep_top(const State& state, int lane, long row, float mass, float taken);
    void write_mixed(const Segment& s, const State& state);
};

}  // namespace regard::LEVEL
