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

// Calls task(index, thread) for every index. Which thread gets which index is not fixed, so a task writes only
// to what its index or its thread owns. One thread enters no parallel region: a fork after one would hang.
template <class F>
void parallel(int threads, int64_t count, const F& task) {
#ifdef _OPENMP
    if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count; ++i) task(i, omp_get_thread_num());
        }
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) task(i, 0);
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
