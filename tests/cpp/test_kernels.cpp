// The kernels of every instruction set against the naive loops: what they compute, and that the bits
// depend neither on threads, nor on observers, nor on the other items of the batch.
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "cases.h"
#include "evict.h"
#include "naive.h"
#include "pooled.h"

static int failures = 0;
static std::string where;

static void fail(const std::string& what) {
    if (failures++ < 30) fprintf(stderr, "FAILED %s: %s\n", where.c_str(), what.c_str());
}

static void close(const char* name, double ours, double truth, double tolerance) {
    bool fine = std::isfinite(truth) ? std::fabs(ours - truth) <= tolerance * (1 + std::fabs(truth))
                                     : ours == truth;
    if (fine) return;
    char said[200];
    snprintf(said, sizeof said, "%s is %.9g, not %.9g", name, ours, truth);
    fail(said);
}

// All the numbers of one call's results, NaN where the kernels have not written.
struct Results {
    const Case& c;
    long rows, count;
    Buffer out, lse, stats, index, top, rest, sink, entropy, largest, kept, delta, here;
    Buffer received[2], seen[2], maps[3], past, future;
    Buffer d_query, d_key, d_value, d_by_offset, cut, effect, cut_weight;
    std::vector<Buffer> d_bias;
    std::vector<int64_t> wanted = {0}, edges = {0, 1, 2, 5, 60};
    RegardReceived received_asked[2];
    RegardMap map_asked[3];
    RegardDistances distances_asked;

    Results(const Case& c, long batch) : c(c), rows(batch * c.heads * c.q_len) {
        if (c.q_len > 3) wanted = {1, c.q_len - 1};
        count = (long)wanted.size();
        auto row = [&](long last = 1) { return std::vector<long>{batch, c.heads, c.q_len, last}; };
        out = Buffer(c.type, row(c.v_dim));
        for (Buffer* each : {&lse, &rest, &sink, &entropy, &largest, &delta, &here}) *each = Buffer(F32, row());
        stats = Buffer(F32, row(2));
        top = Buffer(F32, row(c.top));
        index = Buffer(I32, row(c.top));
        kept = Buffer(F32, {batch, c.heads, count, c.k_len});
        kept.fill(-INFINITY);  // keys that no row of a tile sees are not written
        for (int i = 0; i < 2; i++) {
            received[i] = Buffer(F32, {batch, c.heads, c.k_len});
            seen[i] = Buffer(I32, {batch, c.heads, c.k_len});
            received_asked[i] = {i ? std::min(3l, c.q_len) : 0, i ? std::min(20l, c.q_len) : c.q_len,
                                 received[i].data<float>(), seen[i].data<int32_t>()};
        }
        for (int i = 0; i < 3; i++) {
            long row_size = i == 1 ? 4 : 128, col_size = i == 0 ? 16 : 8;
            auto cells = [](long start, long length, long size) {
                return divide(start + length - 1, size) - divide(start, size) + 1;
            };
            long rows = cells(c.start(), c.q_len, row_size), cols = cells(c.key_start, c.k_len, col_size);
            maps[i] = Buffer(F32, {batch, c.heads, rows, cols});
            map_asked[i] = {divide(c.start(), row_size), row_size, rows,
                            divide(c.key_start, col_size), col_size, cols, i == 2,
                            maps[i].data<float>()};
        }
        long bins = (long)edges.size();
        past = Buffer(F32, {batch, c.heads, bins});
        future = Buffer(F32, {batch, c.heads, bins});
        distances_asked = {bins, edges.data(), past.data<float>(), future.data<float>()};
        d_query = Buffer(F32, row(c.dim));
        d_key = Buffer(F32, {batch, c.kv_heads, c.k_len, c.dim});
        d_value = Buffer(F32, {batch, c.kv_heads, c.k_len, c.v_dim});
        d_by_offset = Buffer(F32, {c.heads, std::max(c.q_len + c.k_len - 1, 0l)});
        d_by_offset.fill(0);
        cut = Buffer(I32, row(c.top));
        effect = Buffer(F32, row(c.top));
        cut_weight = Buffer(F32, row(c.top));
        for (const std::vector<long>& sizes : c.bias) d_bias.emplace_back(F32, sizes).fill(0);
    }

    RegardObserve observe() const {
        return {c.top, index.data<int32_t>(), top.data<float>(), rest.data<float>(),
                sink.data<float>(), entropy.data<float>(), largest.data<float>(),
                2, 3, 1, count, received_asked, map_asked, &distances_asked,
                wanted.data(), kept.data<float>()};
    }

    std::vector<const Buffer*> of_rows() const { return {&out, &lse, &stats}; }
    std::vector<const Buffer*> observed() const {
        return {&index, &top, &rest, &sink, &entropy, &largest, &kept, &received[0], &received[1],
                &seen[0], &seen[1], &maps[0], &maps[1], &maps[2], &past, &future};
    }
    std::vector<const Buffer*> gradients() const {
        std::vector<const Buffer*> all = {&d_query, &d_key, &d_value, &d_by_offset,
                                          &cut, &effect, &cut_weight};
        for (const Buffer& b : d_bias) all.push_back(&b);
        return all;
    }
};

// The call of a problem as the library reads it; of one item, if given, moved there.
struct Prepared {
    RegardCall call{};
    std::vector<RegardView> bias, mask;
    std::vector<int64_t> mask_sizes, bias_floats;
    std::vector<RegardView> d_bias;
    RegardObserve observe;
    RegardBackward back{};
    RegardEffect effect{};

    Prepared(const Problem& p, Results& r, const Truth& truth, int level, long threads,
             bool observing, long item = -1) {
        const Case& c = p.c;
        long first = std::max(item, 0l);
        auto moved = [&](const Buffer& b) {
            RegardView view = b.view();
            if (b.by_item) view.data = (char*)view.data + first * b.stride[0] * Buffer::width(b.type);
            return view;
        };
        call.batch = item < 0 ? c.batch : 1;
        call.heads = c.heads;
        call.kv_heads = c.kv_heads;
        call.q_len = c.q_len;
        call.k_len = c.k_len;
        call.dim = c.dim;
        call.v_dim = c.v_dim;
        call.query_start = c.start();
        call.key_start = c.key_start;
        call.scale = c.scale;
        call.softcap = c.softcap;
        call.dropout = c.dropout;
        call.seed = 7;
        call.threads = threads;
        call.level = level;
        call.parts = 3;  // whatever the type: then level amx is as exact as the others
        call.query = moved(p.query);
        call.key = moved(p.key);
        call.value = moved(p.value);
        if (c.page) {
            call.key = p.key_pages.view();
            call.value = p.value_pages.view();
            call.pages = {p.table.data<int32_t>() + first * p.table.size[1], p.table.size[1], c.page,
                          p.lengths.data<int32_t>() + first};
        }
        call.out = r.out.view();
        call.lse = r.lse.data<float>();
        call.stats = r.stats.data<float>();
        call.sinks = c.sinks ? p.sinks.data<float>() : nullptr;
        call.by_offset = c.by_offset ? p.by_offset.data<float>() : nullptr;
        for (const Buffer& b : p.bias) bias.push_back(moved(b));
        call.bias_count = (int64_t)bias.size();
        call.bias = bias.data();
        call.code = p.mask.code.data();
        call.code_count = (int64_t)p.mask.code.size();
        for (const Buffer& b : p.pool) {
            mask.push_back(moved(b));
            mask_sizes.push_back(b.size[0]);
        }
        call.mask = mask.data();
        call.mask_sizes = mask_sizes.data();
        observe = r.observe();
        call.observe = observing ? &observe : nullptr;
        if (item >= 0) return;
        for (const Buffer& b : r.d_bias) {
            d_bias.push_back(b.view());
            bias_floats.push_back(b.count);
        }
        for (long i = 0; i < r.rows; i++) {
            long b = i / (c.heads * c.q_len), h = i / c.q_len % c.heads;
            r.delta.set(i, truth.delta_of(b, h, i % c.q_len));
            r.here.set(i, truth.mixed_of(b, h, i % c.q_len));
        }
        back.grad_out = p.grad_out.view();
        back.stats = r.stats.data<float>();
        back.delta = r.delta.data<float>();
        back.d_query = r.d_query.data<float>();
        back.d_key = r.d_key.data<float>();
        back.d_value = r.d_value.data<float>();
        back.d_by_offset = c.by_offset ? r.d_by_offset.data<float>() : nullptr;
        back.d_bias = d_bias.data();
        back.bias_floats = bias_floats.data();
        effect = {p.grad_out.view(), r.stats.data<float>(), r.here.data<float>(), c.top,
                  r.cut.data<int32_t>(), r.effect.data<float>(), r.cut_weight.data<float>()};
    }

    void run(bool backward) {
        if (int code = regard_forward(&call)) fail(regard_error(code));
        if (!backward) return;
        if (int code = regard_backward(&call, &back)) fail(regard_error(code));
        if (int code = regard_effect(&call, &effect)) fail(regard_error(code));
    }
};

// Bit for bit, from `first` of the second on.
static void same(const char* what, const std::vector<const Buffer*>& a,
                 const std::vector<const Buffer*>& b, long item = 0) {
    for (size_t i = 0; i < a.size(); i++) {
        size_t bytes = a[i]->count * Buffer::width(a[i]->type);
        if (memcmp(a[i]->bytes.get(), b[i]->bytes.get() + item * bytes, bytes))
            fail(std::string(what) + " changes the bits of result " + std::to_string(i));
    }
}

static void check_rows(const Results& r, const Truth& t) {
    const Case& c = r.c;
    double rounding = c.type == F32 ? 2e-5 : c.type == BF16 ? 5e-3 : 7e-4;
    for (long b = 0; b < c.batch; b++)
        for (long h = 0; h < c.heads; h++)
            for (long i = 0; i < c.q_len; i++) {
                close("lse", r.lse(b, h, i, 0), t.lse(b, h, i), 2e-5);
                for (long d = 0; d < c.v_dim; d++)
                    close("out", r.out(b, h, i, d), t.out(b, h, i, d), rounding);
            }
}

static void check_top(const Results& r, const Truth& t, long b, long h, long i) {
    const Case& c = r.c;
    std::vector<long> ranked(c.k_len);
    std::iota(ranked.begin(), ranked.end(), 0);
    auto better = [&](long x, long y) { return t.score(b, h, i, x) > t.score(b, h, i, y); };
    std::stable_sort(ranked.begin(), ranked.end(), better);
    double listed = 0, mass = 0;
    for (long j = 0; j < c.k_len; j++) mass += t.weight(b, h, i, j);
    std::vector<bool> named(c.k_len);
    for (long n = 0; n < c.top; n++) {
        bool there = n < c.k_len && t.score(b, h, i, ranked[n]) > -INFINITY;
        double truth = there ? t.weight(b, h, i, ranked[n]) : 0;
        close("a top weight", r.top(b, h, i, n), truth, 2e-5);
        listed += truth;
        long key = (long)r.index(b, h, i, n);
        if ((key >= 0) != there) {
            fail("a top index is there, or not, by mistake");
        } else if (there) {
            long j = key - c.key_start;
            if (j < 0 || j >= c.k_len || named[j]) return fail("a top index is no key, or twice there");
            named[j] = true;
            // Of nearly equal scores rounding may name the other; of equal ones the lower key
            if (j != ranked[n]) close("a key named instead", t.score(b, h, i, j), t.score(b, h, i, ranked[n]), 2e-5);
            if (c.equal && j != ranked[n]) fail("a tie goes to the higher key");
        }
    }
    close("rest", r.rest(b, h, i, 0), mass - listed, 4e-5);
    close("sink", r.sink(b, h, i, 0), t.sink(b, h, i), 2e-5);
}

static void check_observed(const Results& r, const Truth& t) {
    const Case& c = r.c;
    for (long b = 0; b < c.batch; b++)
        for (long h = 0; h < c.heads; h++) {
            for (long i = 0; i < c.q_len; i++) {
                double entropy = 0;
                for (long j = 0; j < c.k_len; j++) {
                    double w = t.weight(b, h, i, j);
                    entropy -= w > 0 ? w * std::log(w) : 0;
                }
                close("entropy", r.entropy(b, h, i, 0), entropy, 5e-5);
                close("max score", r.largest(b, h, i, 0), t.largest(b, h, i), 2e-5);
                check_top(r, t, b, h, i);
            }
            for (long n = 0; n < r.count; n++)
                for (long j = 0; j < c.k_len; j++)
                    close("a kept row", r.kept(b, h, n, j), t.weight(b, h, r.wanted[n], j), 2e-5);
            for (int n = 0; n < 2; n++)
                for (long j = 0; j < c.k_len; j++) {
                    double sum = 0, count = 0;
                    for (long i = r.received_asked[n].first; i < r.received_asked[n].last; i++) {
                        sum += t.weight(b, h, i, j);
                        count += t.p.shows(b, h, i, j);
                    }
                    close("received", r.received[n](b, h, j, 0), sum, 5e-5);
                    close("its count", r.seen[n](b, h, j, 0), count, 0);
                }
            for (int n = 0; n < 3; n++) {
                const RegardMap& m = r.map_asked[n];
                Numbers cells(1, 1, m.rows, m.cols);
                for (long i = 0; i < c.q_len; i++)
                    for (long j = 0; j < c.k_len; j++) {
                        double& cell = cells(0, 0, divide(c.start() + i, m.row_size) - m.row_first,
                                             divide(c.key_start + j, m.col_size) - m.col_first);
                        double w = t.weight(b, h, i, j);
                        cell = m.is_max ? std::max(cell, w) : cell + w;
                    }
                for (long x = 0; x < m.rows; x++)
                    for (long y = 0; y < m.cols; y++)
                        close("a map's cell", r.maps[n](b, h, x, y), cells(0, 0, x, y), 5e-5);
            }
            Numbers bins(1, 1, 2, (long)r.edges.size());
            for (long i = 0; i < c.q_len; i++)
                for (long j = 0; j < c.k_len; j++) {
                    long distance = c.start() + i - c.key_start - j, bin = (long)r.edges.size() - 1;
                    while (r.edges[bin] > std::labs(distance)) bin--;
                    bins(0, 0, distance < 0, bin) += t.weight(b, h, i, j);
                }
            for (long n = 0; n < (long)r.edges.size(); n++) {
                close("past", r.past(b, h, n, 0), bins(0, 0, 0, n), 5e-5);
                close("future", r.future(b, h, n, 0), bins(0, 0, 1, n), 5e-5);
            }
        }
}

static void check_gradient(const char* name, const Buffer& ours, const Numbers& truth) {
    if (ours.count != (long)truth.held.size()) return fail("a gradient has another size");
    double most = 1;
    for (double x : truth.held) most = std::max(most, std::fabs(x));
    for (long i = 0; i < ours.count; i++) close(name, ours.get(i) / most, truth.held[i] / most, 5e-5);
}

static void check_gradients(const Results& r, const Truth& t) {
    check_gradient("d_query", r.d_query, t.d_query);
    check_gradient("d_key", r.d_key, t.d_key);
    check_gradient("d_value", r.d_value, t.d_value);
    check_gradient("d_by_offset", r.d_by_offset, t.d_by_offset);
    for (size_t i = 0; i < r.d_bias.size(); i++) check_gradient("d_bias", r.d_bias[i], t.d_bias[i]);
}

static void check_effect(const Results& r, const Truth& t) {
    const Case& c = r.c;
    for (long b = 0; b < c.batch; b++)
        for (long h = 0; h < c.heads; h++)
            for (long i = 0; i < c.q_len; i++) {
                std::vector<double> sizes;
                for (long j = 0; j < c.k_len; j++)
                    if (t.score(b, h, i, j) > -INFINITY) sizes.push_back(std::fabs(t.effect(b, h, i, j)));
                std::sort(sizes.rbegin(), sizes.rend());
                double most = sizes.empty() ? 1 : 1 + sizes[0];  // 1 / (1 − p) magnifies rounding
                for (long n = 0; n < c.top; n++) {
                    bool there = n < (long)sizes.size();
                    long j = (long)r.cut(b, h, i, n) - c.key_start;
                    close("an effect's size", std::fabs(r.effect(b, h, i, n)) / most,
                          there ? sizes[n] / most : 0, 1e-4);
                    if ((r.cut(b, h, i, n) >= 0) != there || (there && (j < 0 || j >= c.k_len))) {
                        fail("an edge of an effect is there, or not, by mistake");
                    } else if (there) {
                        close("an effect", r.effect(b, h, i, n) / most, t.effect(b, h, i, j) / most, 1e-4);
                        close("its weight", r.cut_weight(b, h, i, n), t.weight(b, h, i, j), 2e-5);
                    }
                }
            }
}

// NaN in the keys and values that no row of their item and head sees, and ∞ in some of their dims.
static void spoil(Problem& p) {
    const Case& c = p.c;
    long group = c.heads / c.kv_heads;
    auto odd = [](Buffer& rows, long b, long kv, long j, long dim) {
        for (long d = 0; d < dim; d++) rows.set(rows.at(b, kv, j, d), d % 3 ? NAN : INFINITY);
    };
    for (long b = 0; b < c.batch; b++)
        for (long kv = 0; kv < c.kv_heads; kv++)
            for (long j = 0; j < c.k_len; j++) {
                bool seen = false;
                for (long h = kv * group; h < (kv + 1) * group; h++)
                    for (long i = 0; i < c.q_len; i++) seen |= p.shows(b, h, i, j);
                if (seen) continue;
                odd(p.key, b, kv, j, c.dim);
                odd(p.value, b, kv, j, c.v_dim);
            }
}

static void test(const Case& c, const std::vector<int>& levels) {
    Problem problem(c), spoiled(c);
    if (c.layout != SHARED && !c.page && c.type != F16) spoil(spoiled);
    Truth truth(problem);
    for (int level : levels) {
        where = c.name + ", level " + std::to_string(level);
        bool backward = !c.page && c.k_len > 0;
        Results one(c, c.batch);
        Prepared(problem, one, truth, level, 1, true).run(backward);
        check_rows(one, truth);
        check_observed(one, truth);
        if (backward) check_gradients(one, truth), check_effect(one, truth);
        for (long threads : {2, 5}) {
            Results again(c, c.batch);
            Prepared(problem, again, truth, level, threads, true).run(backward);
            same("the number of threads", one.of_rows(), again.of_rows());
            same("the number of threads", one.observed(), again.observed());
            if (backward) same("the number of threads", one.gradients(), again.gradients());
        }
        Results odd(c, c.batch);
        Prepared(spoiled, odd, truth, level, 2, true).run(backward);
        same("what is hidden", one.of_rows(), odd.of_rows());
        same("what is hidden", one.observed(), odd.observed());
        if (backward) same("what is hidden", one.gradients(), odd.gradients());
        Results unread(c, c.batch);
        test_pooled(Prepared(problem, unread, truth, level, 1, false).call,
                    Prepared(spoiled, unread, truth, level, 1, false).call, truth, close, fail);
        for (int parts : {1, 2}) {  // rounded more: for the sanitizers alone
            if (level < 3) break;
            Results rough(c, c.batch);
            Prepared prepared(problem, rough, truth, level, 2, true);
            prepared.call.parts = parts;
            prepared.run(backward);
        }
        Results plain(c, c.batch);
        Prepared(problem, plain, truth, level, 2, false).run(false);
        same("observing", one.of_rows(), plain.of_rows());
        for (long item = 0; item < c.batch && !c.dropout; item++) {
            Results alone(c, 1);
            Prepared(problem, alone, truth, level, 1, true, item).run(false);
            same("a batch", alone.of_rows(), one.of_rows(), item);
            same("a batch", alone.observed(), one.observed(), item);
        }
    }
}

// A system that starts no more threads: the work is done by those there are.
static void test_without_threads(const std::vector<int>& levels) {
    pthread_attr_t before, huge;
    pthread_getattr_default_np(&before);
    pthread_attr_init(&huge);
    pthread_attr_setstacksize(&huge, (size_t)1 << 50);
    pthread_setattr_default_np(&huge);
    test({.name = "no thread starts"}, levels);
    pthread_setattr_default_np(&before);
}

// exp, exp2 and tanh within the errors that simd.h states (functions.cpp), at each level that runs here.
namespace regard::portable {
bool functions_portable(char* said);
}
#if defined(REGARD_X86)
namespace regard::avx2 {
bool functions_avx2(char* said);
}
namespace regard::avx512 {
bool functions_avx512(char* said);
}
#endif

static void test_functions() {
    char said[200] = "";
    const auto tested = [&](const char* level, bool fine) {
        where = std::string("functions, level ") + level;
        if (!fine) fail(said);
    };
    tested("portable", regard::portable::functions_portable(said));
#if defined(REGARD_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        tested("avx2", regard::avx2::functions_avx2(said));
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        tested("avx512", regard::avx512::functions_avx512(said));
#endif
}

// Of the cases, those whose name contains the argument, if there is one.
int main(int count, char** arguments) {
    std::vector<int> levels;
    int runs = regard_levels() & 2 ? regard_built() : 1;  // all but the first are built with AVX2 here
    for (int level = 0; level < 5; level++)
        if (runs >> level & 1) levels.push_back(level);
    long tested = 0;
    for (const Case& c : cases()) {
        if (count > 1 && c.name.find(arguments[1]) == std::string::npos) continue;
        test(c, levels);
        tested++;
    }
    if (count == 1 || !strcmp(arguments[1], "functions")) test_functions();
    if (count == 1) {
        test_without_threads(levels);
        where = "a cache's step";
        test_evict([](const char* what) { fail(what); });
    }
    printf("%ld cases at %zu levels: %d failures\n", tested, levels.size(), failures);
    return failures != 0;
}
