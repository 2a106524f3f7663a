// Products of 9 to 64 tokens with packed weights, by the instructions with which four of Hopper's warps multiply together: weights, made bf16
// in registers, are the first operand; tokens, in shared memory, the second, which all of a block's rows read from there. (In
// `products.cuh` each warp fetches tokens for 16 rows of its own; of 64 tokens those are 14 times the bytes of its weights.)
//
// A block has 128 rows, a tile of 16 each warp. A warp brings its own tile's codes and scales, SPAN steps of 128 columns at a time, into
// a ring of its own by copies that go on by themselves; the first of them before the kernel before this one has ended. Nobody else reads them,
// so no warp waits for another's. Tokens come by such copies too, some steps ahead, which is why they have to lie in memory as they are multiplied
// (`place`): whoever computes activations writes them so. Blocks of a cluster share columns out, and then tokens: each adds up its share of them.
#include "launch.cuh"
#include "products.cuh"

namespace forebay {

constexpr int WIDE_ROWS = WARPS * ROWS, MAX_CLUSTER = 8;
constexpr int CODES = 1024, SCALES = 128;  // bytes of a step of a tile
constexpr int PART_STRIDE = WIDE_ROWS + 4;  // so that lanes of a warp write to banks of their own

// Where things are in a block's shared memory: so many stages of tokens, a step each, and DEPTH times SPAN steps of each warp's weights. Sums
// take the place of tokens when all is multiplied.
template <int TOKENS>
struct Room {
    static constexpr int STAGES = TOKENS == 64 ? 4 : TOKENS == 32 ? 6 : 8, STAGE = TOKENS * Packed::COLUMNS * 2;
    static constexpr int SPAN = TOKENS == 64 ? 1 : 2, DEPTH = TOKENS == 32 ? 3 : 4, RING = DEPTH * SPAN * (CODES + SCALES);
    static constexpr int RINGS = STAGES * STAGE, NORMS = RINGS + WARPS * RING, SIGNALS = NORMS + MAX_TOKENS * 4;
    static constexpr int BYTES = SIGNALS + (WARPS * DEPTH + 2 * STAGES) * 8;
    static_assert(TOKENS * PART_STRIDE * 4 <= RINGS && 2 * (BYTES + 1024) <= 227 << 10);  // two blocks a multiprocessor
};

// A warp's tile, `num_steps` steps of it from `first` on.
template <int TOKENS>
struct Tile {
    using Place = Room<TOKENS>;
    static constexpr int SPAN = Place::SPAN;
    const char *codes, *scales;
    char* ring;
    uint64_t* signals;
    int num_steps, lane;

    __device__ Tile(const Product& p, int tile, int first, int num_steps) : num_steps(num_steps), lane(threadIdx.x % 32) {
        const int warp = threadIdx.x / 32, all_steps = (p.num_columns + Packed::COLUMNS - 1) / Packed::COLUMNS;
        const int64_t at = static_cast<int64_t>(tile) * all_steps + first;
        codes = static_cast<const char*>(p.weights) + at * CODES, scales = reinterpret_cast<const char*>(p.scales) + at * SCALES;
        ring = aligned_shared() + Place::RINGS + warp * Place::RING;
        signals = reinterpret_cast<uint64_t*>(aligned_shared() + Place::SIGNALS) + warp * Place::DEPTH;
        if (lane == 0) {
            for (int i = 0; i < Place::DEPTH; i++) signal_init(signals + i, 1);
            signals_ready();
            for (int i = 0; i < Place::DEPTH; i++) bring(i);
        }
        __syncwarp();
    }
    __device__ __forceinline__ char* place(int span) const { return ring + span % Place::DEPTH * (SPAN * (CODES + SCALES)); }
    __device__ __forceinline__ void bring(int span) const {
        const int step = span * SPAN, count = min(SPAN, num_steps - step);
        if (count <= 0) return;
        uint64_t* signal = signals + span % Place::DEPTH;
        signal_expect(signal, count * (CODES + SCALES));
        copy_ahead(place(span), codes + static_cast<int64_t>(step) * CODES, count * CODES, signal);
        copy_ahead(place(span) + SPAN * CODES, scales + static_cast<int64_t>(step) * SCALES, count * SCALES, signal);
    }
    __device__ __forceinline__ bool is_brought(int step) const { return (step / SPAN + Place::DEPTH) * SPAN >= num_steps; }
    __device__ __forceinline__ void wait(int step) const {
        if (step % SPAN == 0) signal_wait(signals + step / SPAN % Place::DEPTH, step / SPAN / Place::DEPTH & 1);
    }
    __device__ __forceinline__ void load(Packed& stage, int step) const {
        const char* at = place(step / SPAN);
        stage.codes[0] = reinterpret_cast<const uint4*>(at + step % SPAN * CODES)[lane];
        stage.codes[1] = reinterpret_cast<const uint4*>(at + step % SPAN * CODES)[32 + lane];
        stage.scales = reinterpret_cast<const uint32_t*>(at + SPAN * CODES + step % SPAN * SCALES)[lane];
    }
    // What is next where `step` was, once all lanes have loaded that.
    __device__ __forceinline__ void go_on(int step) const {
        if (step % SPAN != SPAN - 1) return;
        __syncwarp();
        if (lane == 0) bring(step / SPAN + Place::DEPTH);
    }
};

// The tokens of all steps, arranged, as they come and go: one thread brings them, all warps multiply with them.
template <int TOKENS>
struct Tokens {
    using Place = Room<TOKENS>;
    const char* values;
    uint64_t *full, *free;
    int num_steps;

    __device__ Tokens(const Product& p, int first, int num_steps) : num_steps(num_steps) {
        values = reinterpret_cast<const char*>(p.x) + static_cast<int64_t>(first) * Place::STAGE;
        full = reinterpret_cast<uint64_t*>(aligned_shared() + Place::SIGNALS) + WARPS * Place::DEPTH, free = full + Place::STAGES;
        if (threadIdx.x != 0) return;
        for (int i = 0; i < Place::STAGES; i++) signal_init(full + i, 1), signal_init(free + i, WARPS);
        signals_ready();
    }
    __device__ __forceinline__ const char* place(int step) const { return aligned_shared() + step % Place::STAGES * Place::STAGE; }
    __device__ __forceinline__ void bring(int step) const {
        if (step >= num_steps) return;
        signal_expect(full + step % Place::STAGES, Place::STAGE);
        copy_again(const_cast<char*>(place(step)), values + static_cast<int64_t>(step) * Place::STAGE, Place::STAGE, full + step % Place::STAGES);
    }
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x != 0) return;
        copies_follow_inputs();
        for (int i = 0; i < Place::STAGES; i++) bring(i);
    }
    __device__ __forceinline__ void wait(int step) const { signal_wait(full + step % Place::STAGES, step / Place::STAGES & 1); }
    // A warp has multiplied with all of the step before `step`. One thread then brings what is next in the place of the step
    // before that: with that, other warps are likely to be done too.
    __device__ __forceinline__ void go_on(int step) const {
        if (step > 0 && threadIdx.x % 32 == 0) signal_arrive(free + (step - 1) % Place::STAGES);
        if (step < 2 || threadIdx.x != 0 || step - 2 + Place::STAGES >= num_steps) return;
        signal_wait(free + (step - 2) % Place::STAGES, (step - 2) / Place::STAGES & 1);
        bring(step - 2 + Place::STAGES);
    }
};

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

template <int TOKENS>
__global__ void __launch_bounds__(THREADS, 2) product_wide(const __grid_constant__ Product p) {
    using Place = Room<TOKENS>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int rank = blockIdx.x % p.cluster, group = blockIdx.x / p.cluster, tiles = (p.num_rows + ROWS - 1) / ROWS;
    const int all_steps = (p.num_columns + Packed::COLUMNS - 1) / Packed::COLUMNS;
    const int first = all_steps * rank / p.cluster, num_steps = all_steps * (rank + 1) / p.cluster - first;
    char* shared = aligned_shared();
    float* norms = reinterpret_cast<float*>(shared + Place::NORMS);
    // Rows beyond the last are somebody's whom nobody reads.
    const Tile<TOKENS> tile(p, min(group * WARPS + warp, tiles - 1), first, num_steps);
    const Tokens<TOKENS> tokens(p, first, num_steps);
    wait_for_inputs(p.x);
    tokens.begin();
    find_norms(p, norms);
    __syncthreads();  // signals are ready

    float sums[TOKENS / 2] = {};
    uint32_t a[2][2][2][4];
    Packed stage;
    for (int step = 0; step < num_steps; step++) {
        if (tile.is_brought(step)) let_dependents_start();  // whose loads could have delayed these
        tile.wait(step);
        tile.load(stage, step);
        tokens.wait(step);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            multiplied<1>();  // what the same registers held
            stage.operands(half, 0, a[half][0]), stage.operands(half, 1, a[half][1]);
            multiplying();
#pragma unroll
            for (int i = 0; i < 4; i++)
                multiply_wide<TOKENS>(sums, a[half][i / 2][i % 2], tokens.place(step) + half * TOKENS * 128 + i * 32);
            multiply_together();
        }
        tile.go_on(step), tokens.go_on(step);
    }
    multiplied<0>();
    __syncthreads();
    let_dependents_start();
    float* parts = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int m = 0; m < TOKENS / 8; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = m * 8 + q * 2 + i % 2, row = warp * ROWS + g + i / 2 * 8;
            parts[n * PART_STRIDE + row] = sums[m * 4 + i];
        }
    if (p.cluster > 1) Cluster::sync();
    else __syncthreads();
    finish_wide(p, group, parts, norms);
    if (p.cluster > 1) Cluster::sync();  // nobody leaves while others read from it
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
    return launch(kernel, dim3(groups * p.cluster), THREADS, BYTES, p.cluster, stream, p);
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
