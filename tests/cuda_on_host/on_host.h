// The names of CUDA and of instructions.cuh for the host: a block's threads are fibers that take turns, and what a warp
// does together waits for all of its threads. Fragments lie as the PTX manual draws them.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "launch.h"

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define IHVP_SHARED_MEMORY(name) unsigned char* name = ihvp::cuda::host.shared

using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx;

namespace ihvp {
namespace cuda {

struct Barrier {
    int size, arrived = 0, generation = 0;
};

struct Host {
    alignas(16) unsigned char shared[1 << 18];
    ucontext_t scheduler, fibers[threads];
    std::vector<char> stacks[threads];
    bool done[threads];
    int current;
    std::function<void()> body;
    Barrier block, warp[threads / 32];
    uint32_t registers[threads / 32][32][8];  // what the threads of a warp show each other
};
inline Host host;

inline void turn() { swapcontext(&host.fibers[host.current], &host.scheduler); }

inline void wait(Barrier& barrier) {
    int own = barrier.generation;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == own) turn();
}

inline void fiber() {
    host.body();
    host.done[host.current] = true;
    turn();
}

inline void run_block() {
    host.block = {threads};
    for (Barrier& warp : host.warp) warp = {32};
    std::memset(host.shared, 0x7f, sizeof host.shared);  // nothing may count on zeros there
    for (int t = 0; t < threads; ++t) {
        host.done[t] = false;
        host.stacks[t].resize(1 << 16);
        getcontext(&host.fibers[t]);
        host.fibers[t].uc_stack.ss_sp = host.stacks[t].data();
        host.fibers[t].uc_stack.ss_size = host.stacks[t].size();
        makecontext(&host.fibers[t], fiber, 0);
    }
    for (int left = threads; left > 0;)
        for (int t = 0; t < threads; ++t) {
            if (host.done[t]) continue;
            host.current = t;
            threadIdx = dim3(unsigned(t), 0, 0);
            swapcontext(&host.scheduler, &host.fibers[t]);
            left -= host.done[t];
        }
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes, void*, Arguments... arguments) {
    if (shared_bytes > sizeof host.shared) return "too much shared memory";
    host.body = [=] { kernel(arguments...); };
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                run_block();
            }
    return nullptr;
}

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// Ten bits of mantissa, ties away from zero.
inline uint32_t tf32(float x) { return (as_bits(x) + 0x1000u) & ~0x1fffu; }

inline uint32_t (&shown())[32][8] { return host.registers[host.current / 32]; }

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    int lane = host.current % 32;
    Barrier& warp = host.warp[host.current / 32];
    auto& all = shown();
    std::copy(a, a + 4, all[lane]);
    std::copy(b, b + 2, all[lane] + 4);
    wait(warp);
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 8; ++k)  // k's halves lie in different registers
            sum += as_float(all[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)]) *
                   as_float(all[column * 4 + k % 4][4 + k / 4]);
        c[i] += sum;
    }
    wait(warp);
}

}  // namespace cuda
}  // namespace ihvp

inline void __syncthreads() { ihvp::cuda::wait(ihvp::cuda::host.block); }
inline void __syncwarp() { ihvp::cuda::wait(ihvp::cuda::host.warp[ihvp::cuda::host.current / 32]); }
inline float __uint_as_float(uint32_t bits) { return ihvp::cuda::as_float(bits); }
