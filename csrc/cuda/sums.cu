// out[o,i] += sum over items of (sum_t d[n,t,o] x[n,t,i])^2, or of a triangle sum_t x[t,o] x[t,i]: 128x128 tiles, one warp
// fetches and two warpgroups multiply. Items are examples of T rows where squared, else chunks of T rows of one slice,
// so short that the tensor cores' truncation does not add up.
#include "hopper.cuh"

namespace ihvp {
namespace cuda {

namespace {

using namespace hopper;

constexpr int tile = 128, boxes = tile / box, workers = 256, block_threads = workers + 32;

struct Stage {
    unsigned char d[boxes][box_bytes], x[boxes][box_bytes];
};

constexpr int stages = 6;  // of 32 KB, in 227

struct Shared {
    Stage stage[stages];
    uint64_t full[stages], empty[stages];
};

struct Maps {
    CUtensorMap d, x;
};

struct Sums {
    float* out;
    int64_t items, T, O, I, per_part;
};

// Tile k of the upper triangle, by columns: k = column (column + 1) / 2 + row.
__device__ void place(int k, bool triangle, int across, int& row, int& column) {
    if (!triangle) {
        row = k / across;
        column = k % across;
        return;
    }
    column = int((sqrtf(8.f * float(k) + 1.f) - 1.f) * 0.5f);
    while (column * (column + 1) / 2 > k) --column;
    while ((column + 1) * (column + 2) / 2 <= k) ++column;
    row = k - column * (column + 1) / 2;
}

template <bool bf16, bool square, bool triangle>
__global__ void __launch_bounds__(block_threads, 1) sums(const __grid_constant__ Maps maps, Sums s) {
    IHVP_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
    int row, column;
    place(blockIdx.x, triangle, int((s.I + tile - 1) / tile), row, column);
    int o = row * tile, i = column * tile;
    int first = int(blockIdx.y * s.per_part), last = int(min(first + s.per_part, s.items));
    int steps = int((s.T + box_rows - 1) / box_rows);
    if (threadIdx.x == 0) {
        for (int k = 0; k < stages; ++k) {
            init_barrier(&shared.full[k], 1);
            init_barrier(&shared.empty[k], 2);  // a thread of each warpgroup
        }
        fence_barriers();
    }
    __syncthreads();
    int at = 0;
    uint32_t phase = 0;
    auto advance = [&] {
        if (++at == stages) {
            at = 0;
            phase ^= 1;
        }
    };
    if (threadIdx.x >= workers) {
        if (threadIdx.x == workers)
        for (int item = first; item < last; ++item)
            for (int step = 0; step < steps; ++step) {
                wait(&shared.empty[at], phase ^ 1);
                expect_bytes(&shared.full[at], sizeof(Stage));
                int slice = square ? item : 0, t = step * box_rows + (square ? 0 : item * int(s.T));
                auto& stage = shared.stage[at];
                for (int b = 0; b < boxes; ++b) {
                    fetch(stage.d[b], &maps.d, &shared.full[at], o + b * box, t, slice);
                    fetch(stage.x[b], &maps.x, &shared.full[at], i + b * box, t, slice);
                }
                advance();
            }
        return;
    }
    int group = threadIdx.x / 128;
    float acc[64], total[64];
#pragma unroll
    for (int k = 0; k < 64; ++k) total[k] = 0;
    for (int item = first; item < last; ++item) {
        int before = -1;
        for (int step = 0; step < steps; ++step) {
            wait(&shared.full[at], phase);
            auto& stage = shared.stage[at];
            begin_products();
#pragma unroll
            for (int k = 0; k < box_rows / 16; ++k) {
                uint64_t down = uint64_t(k) * (16 * box * 2 >> 4);  // 16 rows further
                product<bf16>(acc, describe(stage.d[group]) + down, describe(stage.x[0]) + down, step > 0 || k > 0);
            }
            commit_products();
            if (before >= 0) {
                wait_for_products<1>();
                if (threadIdx.x % 128 == 0) arrive(&shared.empty[before]);
            }
            before = at;
            advance();
        }
        wait_for_products<0>();
        if (threadIdx.x % 128 == 0) arrive(&shared.empty[before]);
#pragma unroll
        for (int k = 0; k < 64; ++k) total[k] = square ? total[k] + acc[k] * acc[k] : total[k] + acc[k];
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int r = o + warp * 16 + lane / 4, c = i + lane % 4 * 2;
    float* out = s.out + blockIdx.y * s.O * s.I;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (r + 8 * h < s.O && c + 8 * j + e < s.I)
                    out[(r + 8 * h) * s.I + c + 8 * j + e] = total[4 * j + 2 * h + e];
}

// out += the parts, in their order and in out's type; of a triangle the mirror image too.
template <class T, bool triangle>
__global__ void add_parts(T* out, const float* parts, int64_t count, int64_t O, int64_t I) {
    constexpr int edge = 32;
    __shared__ T mirrored[edge][edge + 1];
    int row, column;
    place(blockIdx.x, triangle, int((I + edge - 1) / edge), row, column);
    for (int y = threadIdx.y; y < edge; y += blockDim.y) {
        int64_t o = row * edge + y, i = column * edge + threadIdx.x;
        T total = 0;
        if (o < O && i < I)
            for (int64_t part = 0; part < count; ++part) total += T(parts[(part * O + o) * I + i]);
        bool here = !triangle || row != column || o <= i;  // tensor cores do not promise a symmetric tile
        if (here && o < O && i < I) out[o * I + i] += total;
        if (triangle) mirrored[y][threadIdx.x] = total;
    }
    if (!triangle) return;
    __syncthreads();
    for (int y = threadIdx.y; y < edge; y += blockDim.y) {
        int64_t o = column * edge + y, i = row * edge + threadIdx.x;
        bool here = row != column || o > i;
        if (here && o < O && i < I) out[o * I + i] += mirrored[threadIdx.x][y];
    }
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which no library has to be linked for.
Encode encoder() {
    static Encode found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                             &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
    }();
    return found;
}

bool map_of(CUtensorMap& map, const Rows& x, bool bf16) {
    cuuint64_t sizes[3] = {cuuint64_t(x.features), cuuint64_t(x.rows), cuuint64_t(x.slices)};
    cuuint64_t strides[2] = {cuuint64_t(x.stride_row) * 2, cuuint64_t(x.stride_slice) * 2};
    cuuint32_t extent[3] = {box, box_rows, 1}, steps[3] = {1, 1, 1};
    return encoder()(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                     const_cast<void*>(x.data), sizes, strides, extent, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <bool bf16, bool square, bool triangle>
cudaError_t launch_kernel(const Maps& maps, const Sums& s, dim3 grid, cudaStream_t stream) {
    auto kernel = sums<bf16, square, triangle>;
    int bytes = int(sizeof(Shared)) + 1024;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    kernel<<<grid, block_threads, bytes, stream>>>(maps, s);
    return cudaGetLastError();
}

}  // namespace

const char* launch_sums(void* out, bool wide, float* parts, int64_t part_count, const Rows& d, const Rows& x,
                        Operands type, int64_t items, int64_t T, int64_t O, int64_t I, bool square, bool triangle,
                        void* stream_) {
    auto stream = static_cast<cudaStream_t>(stream_);
    if (encoder() == nullptr) return "the CUDA driver is older than 12.0 and has no tensor maps";
    bool bf16 = type == Operands::bf16;
    Maps maps{};
    if (!map_of(maps.d, d, bf16) || !map_of(maps.x, x, bf16))
        return "a tensor map could not be made: the extents or strides are beyond what one holds";
    int64_t across = (I + tile - 1) / tile, down = (O + tile - 1) / tile;
    Sums s{parts, items, T, O, I, (items + part_count - 1) / part_count};
    dim3 grid(unsigned(triangle ? across * (across + 1) / 2 : across * down), unsigned(part_count));
    auto run = triangle ? (bf16 ? launch_kernel<true, false, true> : launch_kernel<false, false, true>)
                        : (bf16 ? launch_kernel<true, true, false> : launch_kernel<false, true, false>);
    if (square == triangle) return "sums are of squares, or of a triangle";
    cudaError_t error = run(maps, s, grid, stream);
    if (error == cudaSuccess) {
        int64_t side = (I + 31) / 32;
        dim3 blocks(unsigned(triangle ? side * (side + 1) / 2 : side * ((O + 31) / 32))), block(32, 8);
        auto add = [&](auto* kernel, auto* to) { kernel<<<blocks, block, 0, stream>>>(to, parts, part_count, O, I); };
        if (wide)
            add(triangle ? add_parts<double, true> : add_parts<double, false>, static_cast<double*>(out));
        else
            add(triangle ? add_parts<float, true> : add_parts<float, false>, static_cast<float*>(out));
        error = cudaGetLastError();
    }
    if (error == cudaErrorNoKernelImageForDevice) {
        cudaGetLastError();
        return "the CUDA kernels of sums over positions are for compute capability 9.0; this device is another";
    }
    return described(error);
}

}  // namespace cuda
}  // namespace ihvp
