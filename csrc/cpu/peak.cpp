// x = x scale + shift, over and over, in as many registers as the engine's tile has: the most multiply-adds that the
// processor does when nothing else is in the way. The chains are enough to hide the latency of one.
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

constexpr int chains = tile_rows * tile_vectors;

template <class T>
int64_t run(double* sums, double scale, double shift, int64_t rounds, int threads) {
    parallel(threads, threads, [&](int64_t task, int) {
        Vec<T> x[chains], factor = Vec<T>{} + T(scale), term = Vec<T>{} + T(shift);
        for (int c = 0; c < chains; ++c) x[c] = Vec<T>{} + T(c);  // equal chains would be computed once
        for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
            for (int c = 0; c < chains; ++c) x[c] = x[c] * factor + term;
        }
        double sum = 0;
        for (int c = 0; c < chains; ++c) sum += double(sum_lanes<T>(x[c]));
        sums[task] = sum;  // what is written down cannot be left out
    });
    return 2 * chains * Lanes<T>::width * rounds * threads;
}

}  // namespace

int64_t peak(double* sums, bool wide, double scale, double shift, int64_t rounds, int threads) {
    return wide ? run<double>(sums, scale, shift, rounds, threads) : run<float>(sums, scale, shift, rounds, threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
