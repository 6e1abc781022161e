// The kernels of every instruction set against the naive loops: what they compute, and that the bits
// depend neither on threads, nor on observers, nor on the other items of the batch.
#include <pthread.h>

#include <algorithm>
#include <numeric>

#include "cases.h"
#include "columns.h"
#include "evict.h"
#include "fail.h"
#include "naive.h"
#include "pooled.h"
#include "prepared.h"

static void close(const char* name, double ours, double truth, double tolerance) {
    bool fine = std::isfinite(truth) ? std::fabs(ours - truth) <= tolerance * (1 + std::fabs(truth))
                                     : ours == truth;
    if (fine) return;
    char said[200];
    snprintf(said, sizeof said, "%s is %.9g, not %.9g", name, ours, truth);
    fail(said);
}

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

// rounder: the bf16 numbers that stand for one in a run for the sanitizers alone; 0: one with 1, one with 2.
static void test(const Case& c, const std::vector<int>& levels, int rounder = 0) {
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
        Results again(c, c.batch);
        Prepared(problem, again, truth, level, 5, true).run(backward);
        same("the number of threads", one.of_rows(), again.of_rows());
        same("the number of threads", one.observed(), again.observed());
        if (backward) same("the number of threads", one.gradients(), again.gradients());
        // By two threads, so that their number is tested here, too
        Results odd(c, c.batch);
        Prepared(spoiled, odd, truth, level, 2, true).run(backward);
        same("what is hidden, or a second thread,", one.of_rows(), odd.of_rows());
        same("what is hidden, or a second thread,", one.observed(), odd.observed());
        if (backward) same("what is hidden, or a second thread,", one.gradients(), odd.gradients());
        Results unread(c, c.batch);
        const Prepared given(problem, unread, truth, level, 1, false);
        const Prepared hidden(spoiled, unread, truth, level, 1, false);
        test_pooled(given.call, hidden.call, truth, close, fail);
        test_columns(given.call, hidden.call, truth, close, fail);
        for (int parts : {1, 2}) {
            if (level < 3 || parts == 3 - rounder) continue;
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
#elif defined(REGARD_NEON_BF16)
namespace regard::neonbf16 {
bool functions_neonbf16(char* said);
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
#elif defined(REGARD_NEON_BF16)
    if (regard_levels() & 32) tested("neonbf16", regard::neonbf16::functions_neonbf16(said));
#endif
}

// Of the cases, those whose name contains the argument; or "1/2", "2/2": every second, for two processes at once.
int main(int count, char** arguments) {
    std::vector<int> levels;
#if defined(REGARD_X86)
    int runs = regard_levels() & 2 ? regard_built() : 1;  // all but the first are built with AVX2 here
#else
    int runs = regard_levels();
#endif
    for (int level = 0; level < 6; level++)
        if (runs >> level & 1) levels.push_back(level);
    const std::string given = count > 1 ? arguments[1] : "1/1";
    long part = 0, parts = 0, number = 0, tested = 0;
    const bool named = sscanf(given.c_str(), "%ld/%ld", &part, &parts) != 2;
    if (!named && (part < 1 || part > parts)) {  // it would test nothing, and pass
        fprintf(stderr, "there is no part %s\n", given.c_str());
        return 2;
    }
    for (const Case& c : cases()) {
        const long own = number++;
        if (named ? c.name.find(given) == std::string::npos : own % parts != part - 1) continue;
        test(c, levels, named ? 0 : 1 + own % 2);  // each second case by one of them
        tested++;
    }
    const bool first = !named && part == 1;  // of what is no case
    if (first || given == "functions") test_functions();
    if (first) {
        test_without_threads(levels);
        where = "a cache's step";
        test_evict([](const char* what) { fail(what); });
    }
    printf("%ld cases at %zu levels: %d failures\n", tested, levels.size(), failures);
    return failures != 0;
}
