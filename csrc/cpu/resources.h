// What a kernel runs on: one block of memory, and threads.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../workspace.h"
#include "vec.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

// One block of memory for a kernel's whole workspace; nothing is allocated inside a parallel region.
struct Workspace {
    char* base = nullptr;
    size_t size = 0, used = 0;

    template <class T>
    void plan(int64_t count) {
        size += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    }
    bool allocate() {
        base = static_cast<char*>(borrow_memory(size));
        return base != nullptr;
    }
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base + used);
        used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
    ~Workspace() { return_memory(base); }
};

// Calls task(index, thread) for every index. A thread takes its own share of them first, in order, then what is left of
// the others': the same thread mostly gets the same index again, and so the memory that it wrote before, which is far
// from a core in another part of the chip. But which thread gets which index is not fixed, so a task writes only to
// what its index or its thread owns. One thread enters no parallel region: a fork after one would hang.
template <class F>
void parallel(int threads, int64_t count, const F& task) {
#ifdef _OPENMP
    if (threads > 1 && count > 1) {
        struct alignas(64) Share {
            int64_t next, end;
        };
        constexpr int64_t most_shares = 64;
        Share share[most_shares];
        int64_t shares = least(least(threads, count), most_shares);
        for (int64_t s = 0; s < shares; ++s) share[s] = {s * count / shares, (s + 1) * count / shares};
#pragma omp parallel num_threads(threads)
        {
            int thread = omp_get_thread_num();
            for (int64_t s = 0; s < shares; ++s) {
                Share& from = share[(thread + s) % shares];
                for (;;) {
                    int64_t i = __atomic_fetch_add(&from.next, 1, __ATOMIC_RELAXED);
                    if (i >= from.end) break;
                    task(i, thread);
                }
            }
        }
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) task(i, 0);
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
