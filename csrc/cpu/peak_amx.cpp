// c += a b on bfloat16 tiles, over and over: the most multiply-adds that AMX does. Six sums hide the latency of one.
#include "amx.h"

namespace ihvp {
namespace IHVP_ISA {

int64_t peak_bf16(int64_t rounds, int threads) {
    parallel(threads, threads, [&](int64_t, int) {
        _tile_loadconfig(&tile_config);  // clears the tiles: zeros, which cost what other numbers do
        for (int64_t round = 0; round < rounds; ++round) {
            _tile_dpbf16ps(0, 6, 7);
            _tile_dpbf16ps(1, 6, 7);
            _tile_dpbf16ps(2, 6, 7);
            _tile_dpbf16ps(3, 6, 7);
            _tile_dpbf16ps(4, 6, 7);
            _tile_dpbf16ps(5, 6, 7);
        }
        _tile_release();
    });
    constexpr int64_t tile_flops = 2 * 16 * 16 * 32;
    return 6 * tile_flops * rounds * threads;
}

}  // namespace IHVP_ISA
}  // namespace ihvp
