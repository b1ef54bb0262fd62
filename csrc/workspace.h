// Memory for a kernel's workspace: one block is kept between calls, because a fresh one costs a page fault for
// every page that the kernel touches. Any number of threads may borrow at once; the block goes to one of them.
#pragma once
#include <cstddef>

namespace ihvp {

// At least `size` bytes, aligned to a cache line; nullptr when there is no memory. Not cleared.
void* borrow_memory(size_t size);
void return_memory(void* memory);

}  // namespace ihvp
