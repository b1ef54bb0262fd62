// Memory for a kernel's workspace: one block is kept between calls, because a fresh one costs a page fault for
// every page that the kernel touches. Any number of threads may borrow at once; the block goes to one of them.
#pragma once
#include <cstddef>

namespace ihvp {

// At least `size` bytes, aligned to a cache line; nullptr when there is no memory. Not cleared. Neither throws: a
// kernel that had to unwind would carry a weak symbol.
void* borrow_memory(size_t size) noexcept;
void return_memory(void* memory) noexcept;

}  // namespace ihvp
