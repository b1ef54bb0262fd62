#include "isa.h"

#include <cstring>
#include <stdexcept>
#include <string>
#ifdef IHVP_HAVE_AVX512BF16
#include <cpuid.h>
#endif
#ifdef IHVP_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define IHVP_DECLARE(isa)         \
    namespace isa {               \
    extern const Kernels kernels; \
    }

namespace ihvp {

#ifdef IHVP_HAVE_AMX
namespace amx {
Status covariance_update(View, View, View, bool, Precision, int);
Status gradient_dot(View, View, View, View, View, bool, bool, Order, Precision, int);
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, Precision, int);
int64_t peak_bf16(int64_t, int);
}  // namespace amx
#endif
#ifdef IHVP_HAVE_AVX512VNNI
namespace avx512vnni {
Status covariance_update(View, View, View, bool, Precision, int);
Status ekfac_diagonal_update(View, View, View, View, View, View, bool, Order, Precision, int);
Status gradient_dot(View, View, View, View, View, bool, bool, Order, Precision, int);
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, Precision, int);
}  // namespace avx512vnni
#endif
#ifdef IHVP_HAVE_AVX512BF16
namespace avx512bf16 {
Status covariance_update(View, View, View, bool, Precision, int);
Status gradient_dot(View, View, View, View, View, bool, bool, Order, Precision, int);
}  // namespace avx512bf16
#endif
#ifdef IHVP_HAVE_AVX512
IHVP_DECLARE(avx512)
#endif
#ifdef IHVP_HAVE_AVX2
IHVP_DECLARE(avx2)
#endif
#ifdef IHVP_HAVE_NEON
IHVP_DECLARE(neon)
#endif
#ifdef IHVP_HAVE_GENERIC
IHVP_DECLARE(generic)
#endif

namespace {

#ifdef IHVP_HAVE_AVX512
bool avx512_runs() {
    return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
           __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
#endif

#ifdef IHVP_HAVE_AVX512VNNI
// AVX-512's kernels, and what dot products of 16-bit integers add.
const Kernels* avx512vnni_kernels() {
    static const Kernels table = [] {
        Kernels own = avx512::kernels;
        own.isa = "avx512vnni";
        own.covariance_update = avx512vnni::covariance_update;
        own.ekfac_diagonal_update = avx512vnni::ekfac_diagonal_update;
        own.gradient_dot = avx512vnni::gradient_dot;
        own.weighted_ghost_dot = avx512vnni::weighted_ghost_dot;
        return own;
    }();
    return &table;
}

bool avx512vnni_runs() { return avx512_runs() && __builtin_cpu_supports("avx512vnni") != 0; }
#endif

#ifdef IHVP_HAVE_AVX512BF16
// Those kernels, and what bfloat16 dot products add.
const Kernels* avx512bf16_kernels() {
    static const Kernels table = [] {
        Kernels own = *avx512vnni_kernels();
        own.isa = "avx512bf16";
        own.covariance_update = avx512bf16::covariance_update;
        own.gradient_dot = avx512bf16::gradient_dot;
        return own;
    }();
    return &table;
}

bool avx512bf16_runs() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx512vnni_runs() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 5)) != 0;
}
#endif

#ifdef IHVP_HAVE_AMX
// Those with dot products of 16-bit integers, and what tiles add.
const Kernels* amx_kernels() {
    static const Kernels table = [] {
        Kernels own = *avx512vnni_kernels();
        own.isa = "amx";
        own.covariance_update = amx::covariance_update;
        own.gradient_dot = amx::gradient_dot;
        own.weighted_ghost_dot = amx::weighted_ghost_dot;
        own.peak_bf16 = amx::peak_bf16;
        return own;
    }();
    return &table;
}

// The processor has tiles of bfloat16 and of bytes, and the kernel lets this process use the tile registers.
bool amx_runs() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!avx512bf16_runs() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned features = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    constexpr int request_permission = 0x1023, tile_data = 18;
    return (d & features) == features && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

}  // namespace

std::vector<Choice> compiled() {
    std::vector<Choice> choices;
#ifdef IHVP_HAVE_AMX
    choices.push_back({amx_kernels(), amx_runs()});
#endif
#ifdef IHVP_HAVE_AVX512BF16
    // Zen 4 does them at twice the rate of float32 multiply-adds, an Intel Xeon with AMX at half of it (measured).
    choices.push_back({avx512bf16_kernels(), avx512bf16_runs(), __builtin_cpu_is("amd") != 0});
#endif
#ifdef IHVP_HAVE_AVX512VNNI
    choices.push_back({avx512vnni_kernels(), avx512vnni_runs()});
#endif
#ifdef IHVP_HAVE_AVX512
    choices.push_back({&avx512::kernels, avx512_runs()});
#endif
#ifdef IHVP_HAVE_AVX2
    choices.push_back({&avx2::kernels, __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0});
#endif
#ifdef IHVP_HAVE_NEON
    choices.push_back({&neon::kernels, true});
#endif
#ifdef IHVP_HAVE_GENERIC
    choices.push_back({&generic::kernels, true});
#endif
    return choices;
}

const Kernels* select_isa(const char* wanted) {
    std::string names;
    for (const Choice& choice : compiled()) {
        if (!choice.runs_here) continue;
        if (wanted == nullptr ? choice.pays_here : std::strcmp(wanted, choice.kernels->isa) == 0) return choice.kernels;
        names += std::string(names.empty() ? "" : ", ") + choice.kernels->isa;
    }
    throw std::invalid_argument(std::string("instruction set must be one of ") + names + ", got " + wanted);
}

}  // namespace ihvp
