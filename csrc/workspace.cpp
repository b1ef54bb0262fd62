#include "workspace.h"

#include <cstdlib>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ihvp {

namespace {

constexpr size_t line = 64;                    // holds the block's capacity, then the memory follows
constexpr size_t huge_page = size_t(1) << 21;  // asked for where a block spans several
#ifdef __SANITIZE_ADDRESS__  // a block of its very size for every call, so that a kernel that leaves it is seen
constexpr size_t page = line, kept_limit = 0;
#else
constexpr size_t page = 4096, kept_limit = size_t(64) << 20;  // a larger block goes back to the system
#endif

char* kept = nullptr;

size_t& capacity(char* block) { return *reinterpret_cast<size_t*>(block); }

}  // namespace

void* borrow_memory(size_t size) noexcept {
    char* block = __atomic_exchange_n(&kept, nullptr, __ATOMIC_ACQ_REL);
    if (block != nullptr && capacity(block) >= size) return block + line;
    std::free(block);
    bool large = size >= 2 * huge_page;
    size_t total = (size + line + page - 1) / page * page;
    void* memory = nullptr;
    if (total < size || posix_memalign(&memory, large ? huge_page : page, total) != 0) return nullptr;
#ifdef MADV_HUGEPAGE
    if (large) madvise(memory, total / huge_page * huge_page, MADV_HUGEPAGE);  // whole ones; it may be refused
#endif
    block = static_cast<char*>(memory);
    capacity(block) = total - line;
    return block + line;
}

void return_memory(void* memory) noexcept {
    if (memory == nullptr) return;
    char* block = static_cast<char*>(memory) - line;
    if (capacity(block) <= kept_limit) block = __atomic_exchange_n(&kept, block, __ATOMIC_ACQ_REL);
    std::free(block);
}

}  // namespace ihvp
