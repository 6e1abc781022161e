// The functions of simd.h against those of <cmath> in double, over every 61st float there is: within the
// errors that simd.h states. Compiled once a level, with the instructions that it has in the library.
#include "simd.h"

#include <cstdio>

namespace regard::LEVEL {
namespace {

// "" or what is wrong. bound: the largest relative error at x. Floats below the normal ones may be flushed.
template <class Ours, class Truth, class Bound>
bool holds(char* said, const char* name, float low, float high, Ours ours, Truth truth, Bound bound) {
    constexpr int STEP = 61;
    constexpr double NORMAL = 1.17549435e-38;
    for (uint64_t bits = 0; bits < 1ull << 32; bits += (uint64_t)W * STEP) {
        V x;
        for (int i = 0; i < W; i++) {
            const uint32_t mine = (uint32_t)(bits + i * STEP);
            float one;
            memcpy(&one, &mine, sizeof one);
            x[i] = one;
        }
        const V y = ours(x);
        for (int i = 0; i < W; i++) {
            if (!(x[i] >= low && x[i] <= high)) continue;
            const double right = truth((double)x[i]), off = std::fabs((double)y[i] - right);
            if (off <= std::fabs(right) * bound(std::fabs((double)x[i]))) continue;
            if (std::fabs(right) < NORMAL && off <= NORMAL) continue;
            snprintf(said, 200, "%s(%.9g) is %.9g, not %.9g", name, (double)x[i], (double)y[i], right);
            return false;
        }
    }
    return true;
}

bool at(char* said, const char* name, float x, V y, float right) {
    bool fine = true;
    for (int i = 0; i < W; i++) fine &= right != right ? y[i] != y[i] : y[i] == right;
    if (!fine) snprintf(said, 200, "%s(%g) is %g, not %g", name, (double)x, (double)y[0], (double)right);
    return fine;
}

}  // namespace

bool LEVEL_NAME(functions)(char* said) {
    NoDenormals here;
    double (*const to_e)(double) = std::exp;
    double (*const to_2)(double) = std::exp2;
    double (*const of_tanh)(double) = std::tanh;
    const auto grows = [](double size) { return EXP_ERROR + EXP_ERROR_BY_SIZE * size; };
    const auto grows_2 = [](double size) { return EXP2_ERROR + EXP2_ERROR_BY_SIZE * size; };
    const auto table_2 = [&](double size) { return grows_2(size) + EXP2_ERROR_TABLE; };
    const auto short_2 = [&](double size) { return grows_2(size) + EXP2_ERROR_SHORT; };
    const auto flushed = [](double size) { return FLUSHED_ERROR + FLUSHED_ERROR_BY_SIZE * size; };
    const auto steady = [](double) { return TANH_ERROR; };
    const float most = 3.4e38f, none = -INFINITY, nan = NAN;
    return holds(said, "exp", -most, 88, [](V x) { return exp(x); }, to_e, grows) &&
           holds(said, "exp_flushed", -most, 88, [](V x) { return exp_flushed(x); }, to_e, flushed) &&
           holds(said, "exp2<6>", -most, 127, [](V x) { return exp2<6>(x); }, to_2, grows_2) &&
           holds(said, "exp2<5>", -most, 127, [](V x) { return exp2<5>(x); }, to_2, short_2) &&
           holds(said, "Exp2Table", -most, 127, [](V x) { return Exp2Table()(x); }, to_2, table_2) &&
           holds(said, "tanh", -most, most, [](V x) { return tanh(x); }, of_tanh, steady) &&
           at(said, "exp", none, exp(all(none)), 0) && at(said, "exp", nan, exp(all(nan)), nan) &&
           at(said, "exp", -89, exp(all(-89)), 0) && at(said, "exp", 0, exp(all(0)), 1) &&
           at(said, "exp_flushed", none, exp_flushed(all(none)), 0) &&
           at(said, "exp_flushed", nan, exp_flushed(all(nan)), nan) &&
           at(said, "exp2<6>", none, exp2<6>(all(none)), 0) &&
           at(said, "exp2<5>", none, exp2<5>(all(none)), 0) &&
           at(said, "Exp2Table", none, Exp2Table()(all(none)), 0) &&
           at(said, "exp2<6>", most, exp2<6>(all(most)), -none) &&
           at(said, "Exp2Table", most, Exp2Table()(all(most)), -none) &&
           at(said, "exp2<6>", nan, exp2<6>(all(nan)), nan) &&
           at(said, "exp2<5>", nan, exp2<5>(all(nan)), nan) &&
           at(said, "Exp2Table", nan, Exp2Table()(all(nan)), nan) &&
           at(said, "tanh", none, tanh(all(none)), -1) && at(said, "tanh", -none, tanh(all(-none)), 1) &&
           at(said, "tanh", nan, tanh(all(nan)), nan);
}

}  // namespace regard::LEVEL
