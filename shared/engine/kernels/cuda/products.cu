// The C side of `kernels.cuda_products`: launches, and what goes around products of packed weights.
#include "launch.cuh"
#include "products.cuh"

#include <algorithm>

namespace forebay {

// Packed codes back to bf16 [N, K], for products with many tokens. A warp for each pair of tiles.
__global__ void __launch_bounds__(THREADS) dequantize(Product p) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, half = p.num_rows / 2;
    let_dependents_start();
    wait_for_inputs(p.weights);
    const int chunks = (p.num_columns + Packed::COLUMNS - 1) / Packed::COLUMNS;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int tile = static_cast<int>(unit / chunks), step = static_cast<int>(unit % chunks);
    if (tile >= (p.num_rows + ROWS - 1) / ROWS) return;
    Packed stage;
    stage.load(Packed::Source(p, lane), tile, step);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t a[2][2][4];
        stage.operands(h, 0, a[0]), stage.operands(h, 1, a[1]);
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const int row = p.epilogue == GATED ? side * half + tile * 8 + g : tile * ROWS + side * 8 + g;
            const float factor = row < p.num_rows ? p.factors[row] * Packed::FACTOR : 0;
            uint32_t words[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t both = a[i / 4][i / 2 % 2][i % 2 * 2 + side];
                const __nv_bfloat162 pair = __floats2bfloat162_rn(
                    __uint_as_float(both << 16) * factor, __uint_as_float(both & 0xFFFF0000u) * factor);
                words[i] = *reinterpret_cast<const uint32_t*>(&pair);
            }
            // Two lanes write 32 bytes side by side, a sector of the cache at once: first the even lane's, then the odd one's.
            const bool odd = q % 2;
            uint32_t theirs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) theirs[i] = __shfl_xor_sync(~0u, odd ? words[i] : words[4 + i], 1);
            const int column = step * Packed::COLUMNS + h * 64 + q / 2 * 32 + odd * 8;
            auto* to = reinterpret_cast<uint4*>(p.out + static_cast<int64_t>(row) * p.num_columns + column);
            if (row >= p.num_rows) continue;
            if (column < p.num_columns) to[0] = odd ? make_uint4(theirs[0], theirs[1], theirs[2], theirs[3]) : make_uint4(words[0], words[1], words[2], words[3]);
            if (column + 16 < p.num_columns) to[2] = odd ? make_uint4(words[4], words[5], words[6], words[7]) : make_uint4(theirs[0], theirs[1], theirs[2], theirs[3]);
        }
    }
}

// A residual stream as a first product takes it, arranged or not: times the norm's weight, and its sum of squares. A block a token.
__global__ void __launch_bounds__(THREADS) begin(const __nv_bfloat16* x, const __nv_bfloat16* norm, int size, int arranged, __nv_bfloat16* out,
                                                float* squares) {
    __shared__ float sums[WARPS];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * size;
    let_dependents_start();
    wait_for_inputs(x);
    float total = 0;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        const float value = __bfloat162float(x[row + i]);
        total += value * value;
        out[arranged ? place(arranged, blockIdx.x, i) / 2 : row + i] = __float2bfloat16(value * __bfloat162float(norm[i]));
    }
    for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < WARPS; w++) total += sums[w];
        squares[blockIdx.x] = total;
    }
}

template <class Weights, int MT, int R, int DEPTH, int AHEAD, int BLOCKS>
cudaError_t run(const Product& p, cudaStream_t stream) {
    const int rows = p.warps_rows * R * ROWS, num_groups = (p.num_rows + rows - 1) / rows;
    int device = 0, processors = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
    // As many blocks as run at once; each goes on with further rows.
    const int bands = std::max(1, std::min(num_groups, processors * BLOCKS / p.cluster));
    const size_t shared = 2 * sizeof(float) * (WARPS / p.warps_rows) * MT * 8 * (rows + 4);
    auto* kernel = product<Weights, MT, R, DEPTH, AHEAD, BLOCKS>;
    if (shared > 40 << 10) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    return launch(kernel, dim3(bands * p.cluster), THREADS, shared, p.cluster, stream, p);
}

template <class Weights>
cudaError_t run(const Product& p, int eights, int row_tiles, cudaStream_t stream) {
    constexpr bool PACKED = Weights::TILES == 2;
    switch (eights * 10 + row_tiles) {
        case 11: return run<Weights, 1, 1, PACKED ? 7 : 4, PACKED ? 4 : 2, 2>(p, stream);
        case 12: return run<Weights, 1, 2, PACKED ? 4 : 3, PACKED ? 4 : 2, 2>(p, stream);
        case 21: return run<Weights, 2, 1, 4, 2, 2>(p, stream);
        case 22: return run<Weights, 2, 2, PACKED ? 3 : 2, 2, 2>(p, stream);
        case 41: return run<Weights, 4, 1, PACKED ? 4 : 3, 1, 2>(p, stream);
        case 42: return run<Weights, 4, 2, 2, 1, 2>(p, stream);
        case 82: return run<Weights, 8, 2, 3, 1, 1>(p, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace forebay

using forebay::Product;

extern "C" {

// Each returns a cudaError_t.
int forebay_product(const Product* p, int packed, int eights, int row_tiles, void* stream) {
    auto* s = static_cast<cudaStream_t>(stream);
    return packed ? forebay::run<forebay::Packed>(*p, eights, row_tiles, s)
                  : forebay::run<forebay::Dense>(*p, eights, row_tiles, s);
}

int forebay_dequantize(const Product* p, void* stream) {
    const int64_t tiles = (p->num_rows + 15) / 16, chunks = (p->num_columns + 127) / 128;
    const dim3 grid(static_cast<unsigned>((tiles * chunks + forebay::WARPS - 1) / forebay::WARPS));
    return forebay::launch(forebay::dequantize, grid, forebay::THREADS, 0, 1, static_cast<cudaStream_t>(stream), *p);
}

int forebay_begin(const __nv_bfloat16* x, const __nv_bfloat16* norm, int num_tokens, int size, int arranged, __nv_bfloat16* out,
                  float* squares, void* stream) {
    return forebay::launch(forebay::begin, dim3(num_tokens), forebay::THREADS, 0, 1, static_cast<cudaStream_t>(stream), x, norm,
                           size, arranged, out, squares);
}

const char* forebay_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
