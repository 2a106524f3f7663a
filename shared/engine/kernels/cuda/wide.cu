// Products of 9 to 64 tokens with packed weights, by the instructions with which four of Hopper's warps multiply together: weights, made bf16
// in registers, are the first operand; tokens, in shared memory, the second, which all of a block's rows read from there. (In
// `products.cuh` each warp fetches tokens for 16 rows of its own; of 64 tokens those are 14 times the bytes of its weights.)
//
// A block has 128 rows, a tile of 16 for each of eight warps. One more warp brings what they multiply, some steps of 128 columns ahead, by
// copies that go on by themselves: weights from before the kernel before this one has ended, tokens from then on. For that, tokens lie in memory
// as they are multiplied (`place`): whoever computes activations writes them so. Blocks of a cluster share columns out, and then tokens: each
// adds up its share of them.
#include "launch.cuh"
#include "products.cuh"

namespace forebay {

constexpr int WIDE_ROWS = WARPS * ROWS, MAX_CLUSTER = 8;
constexpr int CODES = 1024, SCALES = 128;  // bytes of a step of a tile
constexpr int PART_STRIDE = WIDE_ROWS + 4;  // so that lanes of a warp write to banks of their own

// Where things are in a block's shared memory: stages of a step each, its tokens, then codes and scales of each tile. Sums take their place when
// all is multiplied.
template <int TOKENS>
struct Room {
    static constexpr int STAGES = TOKENS == 64 ? 4 : TOKENS == 32 ? 6 : 8, TOKEN_BYTES = TOKENS * Packed::COLUMNS * 2;
    static constexpr int STAGE = TOKEN_BYTES + WARPS * (CODES + SCALES), NORMS = STAGES * STAGE, SIGNALS = NORMS + MAX_TOKENS * 4;
    static constexpr int BYTES = SIGNALS + 2 * STAGES * 8;
    static_assert(STAGE % 1024 == 0);  // where a swizzle begins
    static_assert(TOKENS * PART_STRIDE * 4 <= NORMS && 2 * (BYTES + 1024) <= 227 << 10);  // two blocks a multiprocessor
};

// The stages, as steps come and go: `full` signals that all of one has come, `free` that all warps are done with it.
template <int TOKENS>
struct Stages {
    using Place = Room<TOKENS>;
    int at = 0, parity = 0;

    __device__ __forceinline__ char* stage() const { return aligned_shared() + at * Place::STAGE; }
    __device__ __forceinline__ uint64_t* full() const { return reinterpret_cast<uint64_t*>(aligned_shared() + Place::SIGNALS) + at; }
    __device__ __forceinline__ uint64_t* free() const { return full() + Place::STAGES; }
    __device__ __forceinline__ void go_on() {
        if (++at == Place::STAGES) at = 0, parity ^= 1;
    }
};

// What one warp does: it brings `num_steps` steps from `first` on.
template <int TOKENS>
__device__ void bring_steps(const Product& p, int group, int first, int num_steps) {
    using Place = Room<TOKENS>;
    const int lane = threadIdx.x % 32, tiles = (p.num_rows + ROWS - 1) / ROWS, all_steps = (p.num_columns + Packed::COLUMNS - 1) / Packed::COLUMNS;
    // Rows beyond the last are somebody's whom nobody reads. Half of the lanes bring a tile's codes or scales each.
    const int64_t tile = min(group * WARPS + lane % WARPS, tiles - 1), at = tile * all_steps + first;
    const bool is_code = lane < WARPS;
    const char* from = is_code ? static_cast<const char*>(p.weights) + at * CODES : reinterpret_cast<const char*>(p.scales) + at * SCALES;
    const int size = is_code ? CODES : SCALES, to = Place::TOKEN_BYTES + (is_code ? 0 : WARPS * CODES) + lane % WARPS * size;
    const char* tokens = reinterpret_cast<const char*>(p.x) + static_cast<int64_t>(first) * Place::TOKEN_BYTES;
    const auto bring_weights = [&](const Stages<TOKENS>& stages, int step) {
        if (lane == 0) signal_expect(stages.full(), Place::STAGE);
        __syncwarp();
        if (lane < 2 * WARPS) copy_ahead(stages.stage() + to, from + static_cast<int64_t>(step) * size, size, stages.full());
    };
    const auto bring_tokens = [&](const Stages<TOKENS>& stages, int step) {
        if (lane == 0) copy_again(stages.stage(), tokens + static_cast<int64_t>(step) * Place::TOKEN_BYTES, Place::TOKEN_BYTES, stages.full());
    };
    const int ahead = min(num_steps, Place::STAGES);
    Stages<TOKENS> weights, stages;
    for (int step = 0; step < ahead; step++, weights.go_on()) bring_weights(weights, step);
    wait_for_inputs(p.x);
    copies_follow_inputs();
    for (int step = 0; step < ahead; step++, stages.go_on()) bring_tokens(stages, step);
    for (int step = ahead; step < num_steps; step++, stages.go_on()) {
        signal_wait(stages.free(), stages.parity ^ 1);
        bring_weights(stages, step), bring_tokens(stages, step);
    }
    let_dependents_start();  // whose loads could have delayed these
}

// As `find_scales`, four threads a token.
__device__ inline void find_norms(const Product& p, float* norms) {
    const int n = threadIdx.x / 4;
    float total = 0;
    if (n < p.num_tokens && p.squares_in != nullptr) {
#pragma unroll 8
        for (int i = threadIdx.x % 4; i < p.num_squares_in; i += 4) total += fresh(p.squares_in + n * p.num_squares_in + i);
    }
    total += __shfl_xor_sync(~0u, total, 1), total += __shfl_xor_sync(~0u, total, 2);
    if (threadIdx.x % 4 == 0) norms[n] = p.squares_in == nullptr ? 1.0f : rsqrtf(total / p.num_columns + p.eps);
}

// Four rows' sums of one token, of all blocks of the cluster, in a fixed order.
__device__ __forceinline__ void add_up(float* mine, int cluster, float (&sums)[4]) {
    float4 theirs[MAX_CLUSTER];
#pragma unroll
    for (int r = 0; r < MAX_CLUSTER; r++) {  // all at once: each takes as long as one
        theirs[r] = make_float4(0, 0, 0, 0);
        if (r < cluster) theirs[r] = *reinterpret_cast<const float4*>(cluster > 1 ? Cluster::of(mine, r) : mine);
    }
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
#pragma unroll
    for (int r = 0; r < MAX_CLUSTER; r++) sums[0] += theirs[r].x, sums[1] += theirs[r].y, sums[2] += theirs[r].z, sums[3] += theirs[r].w;
}

__device__ __forceinline__ void scale(const Product& p, int row, float norm, float (&sums)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[i] *= norm;
        if (p.factors != nullptr) sums[i] *= p.factors[row + i];
        if (p.bias != nullptr) sums[i] += __bfloat162float(p.bias[row + i]);
    }
}

__device__ __forceinline__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ void write(__nv_bfloat16* to, const float (&values)[4]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pair(values[0], values[1]), pair(values[2], values[3]));
}

// Four columns of a token's output, in the order that its reader wants.
__device__ __forceinline__ void write(const Product& p, int64_t row_size, int n, int column, const float (&values)[4]) {
    if (!p.arranged) return write(p.out + n * row_size + column, values);
    char* out = reinterpret_cast<char*>(p.out);
    *reinterpret_cast<uint32_t*>(out + place(p.arranged, n, column)) = pair(values[0], values[1]);
    *reinterpret_cast<uint32_t*>(out + place(p.arranged, n, column + 2)) = pair(values[2], values[3]);
}

// Four rows of gate and of up, which have become `sums` and `others`.
__device__ __forceinline__ void finish_pair(const Product& p, int n, int row, float norm, float (&sums)[4], float (&others)[4]) {
    const int half = p.num_rows / 2;
    scale(p, row, norm, sums), scale(p, row + half, norm, others);
    if (p.epilogue == SPLIT) {
        write(p, p.num_rows, n, row, sums), write(p, p.num_rows, n, row + half, others);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = gated(sums[i], others[i]);
    write(p, half, n, row, sums);
}

// Four rows of any other matrix; returns the squares of what is now in the residual stream.
__device__ __forceinline__ float finish_rows(const Product& p, int n, int row, float norm, float (&sums)[4]) {
    const int64_t to = static_cast<int64_t>(n) * p.num_rows + row;
    float squares = 0;
    scale(p, row, norm, sums);
    if (p.epilogue == RESIDUAL) {
        float weighed[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sums[i] = __bfloat162float(__float2bfloat16(__bfloat162float(p.residual[to + i]) + sums[i]));
            weighed[i] = sums[i] * __bfloat162float(p.next_norm[row + i]);
            squares += sums[i] * sums[i];
        }
        write(p.residual + to, sums), write(p, p.num_rows, n, row, weighed);
    } else {
        write(p, p.num_rows, n, row, sums);
    }
    return squares;
}

// A block's share of the tokens, 32 or 16 threads each: scaled, written, and whatever else the end of a product is to do.
__device__ inline void finish_wide(const Product& p, int group, float* parts, const float* norms) {
    const bool paired = p.epilogue == GATED || p.epilogue == SPLIT;
    const int share = (p.num_tokens + p.cluster - 1) / p.cluster, first = (p.cluster > 1 ? Cluster::rank() : 0) * share;
    const int quads = WIDE_ROWS / (paired ? 8 : 4), count = min(share, p.num_tokens - first) * quads, half = p.num_rows / 2;
    for (int begin = 0; begin < count; begin += THREADS) {
        const int unit = begin + threadIdx.x, n = first + unit / quads, quad = unit % quads;
        const int local = paired ? quad / 2 * ROWS + quad % 2 * 4 : quad * 4, row = group * WIDE_ROWS / (paired ? 2 : 1) + (paired ? quad : local / 4) * 4;
        float sums[4], others[4], squares = 0;
        if (unit < count && row < (paired ? half : p.num_rows)) {
            const float norm = norms[n] * Packed::FACTOR;
            add_up(parts + n * PART_STRIDE + local, p.cluster, sums);
            if (paired) {
                add_up(parts + n * PART_STRIDE + local + 8, p.cluster, others);
                finish_pair(p, n, row, norm, sums, others);
            } else {
                squares = finish_rows(p, n, row, norm, sums);
            }
        }
        if (p.epilogue != RESIDUAL) continue;
        for (int i = 16; i; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
        if (unit < count && quad == 0) p.squares_out[n * p.num_squares_out + group] = squares;
    }
}

// What the other warps do: multiply, and leave sums as `parts`.
template <int TOKENS>
__device__ __forceinline__ void multiply_steps(const Product& p, int num_steps) {
    using Place = Room<TOKENS>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    float sums[TOKENS / 2] = {};
    uint32_t a[2][2][2][4];
    Packed stage;
    Stages<TOKENS> stages, before;
    for (int step = 0; step < num_steps; step++, stages.go_on()) {
        const char* tokens = stages.stage();
        const char* codes = tokens + Place::TOKEN_BYTES + warp * CODES;
        const char* scales = tokens + Place::TOKEN_BYTES + WARPS * CODES + warp * SCALES;
        signal_wait(stages.full(), stages.parity);
        stage.codes[0] = reinterpret_cast<const uint4*>(codes)[lane], stage.codes[1] = reinterpret_cast<const uint4*>(codes)[32 + lane];
        stage.scales = reinterpret_cast<const uint32_t*>(scales)[lane];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            multiplied<1>();  // what the same registers held
            stage.operands(half, 0, a[half][0]), stage.operands(half, 1, a[half][1]);
            multiplying();
#pragma unroll
            for (int i = 0; i < 4; i++) multiply_wide<TOKENS>(sums, a[half][i / 2][i % 2], tokens, half * TOKENS * 128 + i * 32);
            multiply_together();
        }
        // With that, all of the step before is multiplied.
        if (step > 0) {
            if (lane == 0) signal_arrive(before.free());
            before.go_on();
        }
    }
    multiplied<0>();
    meet<THREADS>();
    float* parts = reinterpret_cast<float*>(aligned_shared());
#pragma unroll
    for (int m = 0; m < TOKENS / 8; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = m * 8 + q * 2 + i % 2, row = warp * ROWS + g + i / 2 * 8;
            parts[n * PART_STRIDE + row] = sums[m * 4 + i];
        }
}

template <int TOKENS>
__global__ void __launch_bounds__(THREADS + 32, 2) product_wide(const __grid_constant__ Product p) {
    using Place = Room<TOKENS>;
    const int rank = blockIdx.x % p.cluster, group = blockIdx.x / p.cluster, all_steps = (p.num_columns + Packed::COLUMNS - 1) / Packed::COLUMNS;
    const int first = all_steps * rank / p.cluster, num_steps = all_steps * (rank + 1) / p.cluster - first;
    const bool is_multiplying = threadIdx.x < THREADS;
    float* norms = reinterpret_cast<float*>(aligned_shared() + Place::NORMS);
    if (threadIdx.x == 0) {
        Stages<TOKENS> stages;
        for (int i = 0; i < Place::STAGES; i++, stages.go_on()) signal_init(stages.full(), 1), signal_init(stages.free(), WARPS);
        signals_ready();
    }
    __syncthreads();
    if (is_multiplying) {
        wait_for_inputs(p.x);
        find_norms(p, norms);
        multiply_steps<TOKENS>(p, num_steps);
    } else {
        bring_steps<TOKENS>(p, group, first, num_steps);
    }
    if (p.cluster > 1) Cluster::sync_shared();
    else __syncthreads();
    if (is_multiplying) finish_wide(p, group, reinterpret_cast<float*>(aligned_shared()), norms);
    if (p.cluster > 1) Cluster::sync_shared();  // nobody leaves while others read from it
}

// Activations [tokens, columns] as wide products take them; columns beyond the last are zeros. A thread for eight columns of a token.
__global__ void __launch_bounds__(THREADS) arrange(const __nv_bfloat16* x, int num_tokens, int num_columns, int arranged, char* out) {
    const int piece = blockIdx.x * THREADS + threadIdx.x, pieces = (num_columns + Packed::COLUMNS - 1) / Packed::COLUMNS * (Packed::COLUMNS / 8);
    const int n = piece / pieces, column = piece % pieces * 8;
    let_dependents_start();
    wait_for_inputs(x);
    if (n >= num_tokens) return;
    uint4 values = make_uint4(0, 0, 0, 0);
    if (column < num_columns) values = fresh(x + static_cast<int64_t>(n) * num_columns + column);
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int w = 0; w < 4; w++) *reinterpret_cast<uint32_t*>(out + place(arranged, n, column + 2 * w)) = words[w];
}

template <int TOKENS>
cudaError_t run_wide(const Product& p, cudaStream_t stream) {
    auto* kernel = product_wide<TOKENS>;
    constexpr int BYTES = Room<TOKENS>::BYTES;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES)) return error;
    const int groups = (p.num_rows + WIDE_ROWS - 1) / WIDE_ROWS;
    return launch(kernel, dim3(groups * p.cluster), THREADS + 32, BYTES, p.cluster, stream, p);
}

}  // namespace forebay

// Each returns a cudaError_t. For `eights` eights of tokens; rows are a multiple of 4, of gate and of up each if there are both.
extern "C" {

int forebay_product_wide(const forebay::Product* p, int eights, void* stream) {
    auto* s = static_cast<cudaStream_t>(stream);
    switch (eights) {
        case 2: return forebay::run_wide<16>(*p, s);
        case 4: return forebay::run_wide<32>(*p, s);
        case 8: return forebay::run_wide<64>(*p, s);
        default: return cudaErrorInvalidValue;
    }
}

int forebay_arrange(const __nv_bfloat16* x, int num_tokens, int num_columns, int arranged, char* out, void* stream) {
    const int pieces = (num_columns + forebay::Packed::COLUMNS - 1) / forebay::Packed::COLUMNS * (forebay::Packed::COLUMNS / 8);
    const dim3 grid((num_tokens * pieces + forebay::THREADS - 1) / forebay::THREADS);
    return forebay::launch(forebay::arrange, grid, forebay::THREADS, 0, 1, static_cast<cudaStream_t>(stream), x, num_tokens, num_columns, arranged, out);
}
}
