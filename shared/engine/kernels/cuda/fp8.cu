// Products of few tokens with a matrix in e4m3, and what lies around them in a layer of GLM: the C side of `kernels.cuda_fp8`.
//
// A block's warps have 16 rows each, the blocks of a cluster share out the columns. A warp takes weights straight into the registers
// in which tensor cores want them, several steps ahead, the first ones before it waits for the kernel in front. Then the block brings
// its columns of the tokens into shared memory as fp16: codes are exact in it, and so are products in the sums of tensor cores. What
// an RMSNorm divides by is found along the way, and divided by in the end, where the blocks add up their parts in a fixed order.
// Which columns share an instruction does not matter as long as both sides agree, so a lane takes sixteen that lie side by side.
#include "launch.cuh"

namespace forebay {

constexpr int WARPS = 4, THREADS = WARPS * 32, ROWS = 16, BLOCK_ROWS = WARPS * ROWS;
constexpr int STEP = 128;                // columns with one scale
constexpr int MAX_CLUSTER = 8;           // blocks
constexpr float SMALLER = 1.0f / 64;     // tokens are kept as fp16 times this: up to four million, and to 2^-19 apart

struct Product {
    const uint8_t* codes;      // [num_rows / ROWS, K / STEP, ROWS STEP] as `w8a16.laid_out`
    const float* scales;       // [num_rows / ROWS, K / STEP]
    const __half* others;      // [num_others, K]: rows behind these that are not in e4m3
    const void* x;             // [tokens, K], bf16 or float
    const __nv_bfloat16* delta;  // to be added to x, [tokens, K], or none
    const __nv_bfloat16* gain;   // of an RMSNorm, [K], or none
    void* out;                 // [tokens, num_rows + num_others], bf16 or float
    __nv_bfloat16* total;      // [tokens, K]: x and delta, or none
    int num_tokens, num_rows, num_others, num_columns, x_stride, delta_stride, wide_x, wide_out, cluster;
    float eps;
};

// What a row leaves in its pages: `gluon_state`.
struct Kept {
    const float *cos, *sin;    // [tokens, half]
    const int* slots;          // [tokens], below 0 for nowhere
    const __nv_bfloat16* latent_gain;
    const float *key_gain, *key_bias;
    __nv_bfloat16 *latents, *keys;  // pages of latent + 2 half, and of key values
    int64_t latent_page, key_page;  // strides
    int latent, half, key, page_size;  // values, without an index key 0
    float latent_eps, key_eps;
};

// Weights of a tile as a warp's lanes take them in a step: sixteen bytes four times, two of row g and two of row g + 8. `x` is where
// the lane's columns of the step are, of the first eight tokens, and of others each `next` bytes further.
struct Codes {
    static constexpr int COLUMNS = STEP, BYTES = 1;

    template <int EIGHTS>
    __device__ __forceinline__ static void add(float (&sums)[EIGHTS][4], const uint4 (&w)[4], float scale, const char* x, int next) {
        constexpr int CHAINS = EIGHTS < 4 ? 4 / EIGHTS : 1;  // products that do not wait for one another
        float parts[CHAINS][EIGHTS][4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t low[4] = {w[h].x, w[h].y, w[h].z, w[h].w}, high[4] = {w[2 + h].x, w[2 + h].y, w[2 + h].z, w[2 + h].w};
#pragma unroll
            for (int s = 0; s < 4; s += 2) {
                const uint2 near = from_fp8(low[s]), far = from_fp8(high[s]), near_next = from_fp8(low[s + 1]), far_next = from_fp8(high[s + 1]);
#pragma unroll
                for (int m = 0; m < EIGHTS; m++) {
                    const uint4 b = *reinterpret_cast<const uint4*>(x + m * next + h * 128 + s * 8);
                    multiply_half(parts[(h * 2 + s) % CHAINS][m], {near.x, far.x, near.y, far.y}, b.x, b.y);
                    multiply_half(parts[(h * 2 + s + 1) % CHAINS][m], {near_next.x, far_next.x, near_next.y, far_next.y}, b.z, b.w);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < EIGHTS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float sum = parts[0][m][i];
#pragma unroll
                for (int c = 1; c < CHAINS; c++) sum += parts[c][m][i];
                sums[m][i] += sum * scale;
            }
    }
};
struct Halves {
    static constexpr int COLUMNS = 64, BYTES = 2;

    template <int EIGHTS>
    __device__ __forceinline__ static void add(float (&sums)[EIGHTS][4], const uint4 (&w)[4], float, const char* x, int next) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int m = 0; m < EIGHTS; m++) {
                const uint4 b = *reinterpret_cast<const uint4*>(x + m * next + h * 16);
                multiply_half(sums[m], {w[h].x, w[2 + h].x, w[h].y, w[2 + h].y}, b.x, b.y);
                multiply_half(sums[m], {w[h].z, w[2 + h].z, w[h].w, w[2 + h].w}, b.z, b.w);
            }
    }
};

__device__ __forceinline__ float first_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_of(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ __forceinline__ uint32_t as_pair(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t added(uint32_t a, uint32_t b) {
    return as_pair(first_of(a) + first_of(b), second_of(a) + second_of(b));
}
__device__ __forceinline__ uint4 added(uint4 a, uint4 b) { return make_uint4(added(a.x, b.x), added(a.y, b.y), added(a.z, b.z), added(a.w, b.w)); }

// Eight values of a token as bf16, from the eighth `place` on.
__device__ __forceinline__ uint4 eight(const Product& p, int token, int place) {
    const int64_t at = static_cast<int64_t>(token) * p.x_stride + place * 8;
    if (!p.wide_x) return fresh(static_cast<const __nv_bfloat16*>(p.x) + at);
    const float* from = static_cast<const float*>(p.x) + at;
    const uint4 a = fresh(static_cast<const void*>(from)), b = fresh(static_cast<const void*>(from + 4));
    const auto pair = [](uint32_t u, uint32_t v) { return as_pair(__uint_as_float(u), __uint_as_float(v)); };
    return make_uint4(pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w));
}

// The columns of a block: so many from `first` on.
struct Share {
    int first, size;

    // A token's row in shared memory, in bytes: sixteen more than its values, so that rows begin in other banks.
    __device__ int row_bytes() const { return size * 2 + 16; }
};

// This block's columns of the tokens into shared memory, and in `squares` the sums of theirs. Blocks of other rows write each a part
// of `total`.
template <int TOKENS>
__device__ __forceinline__ void stage(const Product& p, const Share& share, int first_token, int group, int num_groups, char* tokens, float* squares) {
    constexpr int WARPS_OF_TOKEN = TOKENS < WARPS ? WARPS / TOKENS : 1, BESIDE = WARPS / WARPS_OF_TOKEN;
    constexpr int EACH = TOKENS / BESIDE, SOME = EACH < 2 ? EACH : 2, PIECES = WARPS_OF_TOKEN == 1 ? 3 : WARPS_OF_TOKEN == 2 ? 2 : 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pieces = share.size / 8;
    const int begin = warp % WARPS_OF_TOKEN * 32 + lane, stride = WARPS_OF_TOKEN * 32, row = share.row_bytes();
#pragma unroll 1
    for (int each = 0; each < EACH; each += SOME) {
        float sums[SOME] = {};
        for (int base = begin; base < pieces; base += stride * PIECES) {
            uint4 value[PIECES][SOME], other[PIECES][SOME], gain[PIECES];
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                const int place = min(base + i * stride, pieces - 1), at = share.first / 8 + place;
                if (p.gain != nullptr) gain[i] = *reinterpret_cast<const uint4*>(p.gain + at * 8);
#pragma unroll
                for (int n = 0; n < SOME; n++) {
                    const int token = min(first_token + warp / WARPS_OF_TOKEN + (each + n) * BESIDE, p.num_tokens - 1);
                    value[i][n] = eight(p, token, at);
                    if (p.delta != nullptr) other[i][n] = fresh(static_cast<const void*>(p.delta + static_cast<int64_t>(token) * p.delta_stride + at * 8));
                }
            }
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                const int place = base + i * stride;
                if (place >= pieces) continue;
                float gains[8];
                const uint32_t both[4] = {gain[i].x, gain[i].y, gain[i].z, gain[i].w};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    gains[2 * k] = p.gain != nullptr ? first_of(both[k]) * SMALLER : SMALLER;
                    gains[2 * k + 1] = p.gain != nullptr ? second_of(both[k]) * SMALLER : SMALLER;
                }
#pragma unroll
                for (int n = 0; n < SOME; n++) {
                    const int own = warp / WARPS_OF_TOKEN + (each + n) * BESIDE, token = first_token + own;
                    const uint4 v = p.delta != nullptr ? added(value[i][n], other[i][n]) : value[i][n];
                    if (p.total != nullptr && place % num_groups == group && token < p.num_tokens)
                        *reinterpret_cast<uint4*>(p.total + static_cast<int64_t>(token) * p.num_columns + share.first + place * 8) = v;
                    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
                    uint32_t halves[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const float a = first_of(pairs[k]), b = second_of(pairs[k]);
                        sums[n] += a * a + b * b;
                        halves[k] = as_halves(a * gains[2 * k], b * gains[2 * k + 1]);
                    }
                    *reinterpret_cast<uint4*>(tokens + own * row + place * 16) = make_uint4(halves[0], halves[1], halves[2], halves[3]);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < SOME; n++) {
            for (int i = 16; i; i /= 2) sums[n] += __shfl_xor_sync(~0u, sums[n], i);
            if (lane == 0) squares[warp % WARPS_OF_TOKEN * TOKENS + warp / WARPS_OF_TOKEN + (each + n) * BESIDE] = sums[n];
        }
    }
    __syncthreads();
    if (WARPS_OF_TOKEN > 1) {  // the first of them has the sum of all once the block has met again
        if (threadIdx.x < TOKENS)
            for (int w = 1; w < WARPS_OF_TOKEN; w++) squares[threadIdx.x] += squares[w * TOKENS + threadIdx.x];
    }
}

// What a warp has of a product: a tile of rows, of which it reads so many steps of the block's columns.
template <class Weights, int DEPTH>
struct Tile {
    const uint4* first;  // what the lane takes first
    const float* scales;
    int num_steps, far;  // where row g + 8 is, in sixteens

    __device__ Tile(const Product& p, const Share& share, int tile) {
        const int lane = threadIdx.x % 32;
        const int64_t step = static_cast<int64_t>(tile) * (p.num_columns / STEP) + share.first / STEP;
        if (Weights::BYTES == 1) {
            first = reinterpret_cast<const uint4*>(p.codes) + step * (ROWS * STEP / 16) + lane, far = 64;
        } else {
            const int row = p.num_columns / 8;  // in sixteens
            first = reinterpret_cast<const uint4*>(p.others) + static_cast<int64_t>(tile * ROWS + lane / 4) * row + share.first / 8 + lane % 4 * 2;
            far = 8 * row;
        }
        scales = p.scales + step;
        num_steps = share.size / Weights::COLUMNS;
    }
    __device__ __forceinline__ void load(uint4 (&into)[4], float& scale, int step) const {
        constexpr int NEXT = Weights::BYTES == 1 ? ROWS * STEP / 16 : 8, SECOND = Weights::BYTES == 1 ? 32 : 1;
        const uint4* const at = first + step * NEXT;
        into[0] = stream(at), into[1] = stream(at + SECOND), into[2] = stream(at + far), into[3] = stream(at + far + SECOND);
        if (Weights::BYTES == 1) scale = __uint_as_float(stream(reinterpret_cast<const uint32_t*>(scales + step)));
    }
    __device__ __forceinline__ void begin(uint4 (&ahead)[DEPTH][4], float (&scale)[DEPTH]) const {
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            if (d < num_steps) load(ahead[d], scale[d], d);
    }
    template <int EIGHTS>
    __device__ __forceinline__ void finish(float (&sums)[EIGHTS][4], uint4 (&ahead)[DEPTH][4], float (&scale)[DEPTH], const char* x, int next) const {
        for (int base = 0; base < num_steps; base += DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                if (base + d >= num_steps) break;
                Weights::add(sums, ahead[d], scale[d], x + (base + d) * Weights::COLUMNS * 2, next);
                if (base + d + DEPTH < num_steps) load(ahead[d], scale[d], base + d + DEPTH);
            }
        }
    }
};

__device__ __forceinline__ float sum_of_block(float value, float* found) {
    for (int i = 16; i; i /= 2) value += __shfl_xor_sync(~0u, value, i);
    __syncthreads();
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = value;
    __syncthreads();
    float all = 0;
    for (int w = 0; w < WARPS; w++) all += found[w];
    return all;
}

__device__ __forceinline__ void turn(const Kept& k, int token, int pair, float even, float odd, __nv_bfloat16* to) {
    const float c = pair < k.half ? k.cos[token * k.half + pair] : 1, s = pair < k.half ? k.sin[token * k.half + pair] : 0;
    to[2 * pair] = __float2bfloat16(even * c - odd * s), to[2 * pair + 1] = __float2bfloat16(odd * c + even * s);
}
__device__ __forceinline__ float rounded(float value) { return __bfloat162float(__float2bfloat16(value)); }

// What lies behind the columns of x that are multiplied, behind its norms and rotation, into the token's slot.
__device__ __forceinline__ void append(const Product& p, const Kept& k, int token, float* found) {
    const int slot = k.slots[token], thread = threadIdx.x;
    if (slot < 0) return;
    const float* const from = static_cast<const float*>(p.x) + static_cast<int64_t>(token) * p.x_stride + p.num_columns;
    const int64_t page = slot / k.page_size, place = slot % k.page_size;
    __nv_bfloat16* const latent = k.latents + page * k.latent_page + place * (k.latent + 2 * k.half);
    float squares = 0;
    for (int i = thread; i < k.latent; i += THREADS) squares += fresh(from + i) * fresh(from + i);
    const float scale = rsqrtf(sum_of_block(squares, found) / k.latent + k.latent_eps);
    for (int i = thread; i < k.latent; i += THREADS)
        latent[i] = __float2bfloat16(rounded(fresh(from + i) * scale) * __bfloat162float(k.latent_gain[i]));
    const float* const turned = from + k.latent;
    for (int i = thread; i < k.half; i += THREADS) turn(k, token, i, fresh(turned + 2 * i), fresh(turned + 2 * i + 1), latent + k.latent);
    if (k.key == 0) return;
    const float* const key = turned + 2 * k.half;
    float sum = 0, spread = 0;
    for (int i = thread; i < k.key; i += THREADS) sum += fresh(key + i);
    const float mean = sum_of_block(sum, found) / k.key;
    for (int i = thread; i < k.key; i += THREADS) spread += (fresh(key + i) - mean) * (fresh(key + i) - mean);
    const float by = rsqrtf(sum_of_block(spread, found) / k.key + k.key_eps);
    const auto normed = [&](int i) { return rounded((fresh(key + i) - mean) * by * k.key_gain[i] + k.key_bias[i]); };
    for (int i = thread; i < k.key / 2; i += THREADS)
        turn(k, token, i, normed(2 * i), normed(2 * i + 1), k.keys + page * k.key_page + place * k.key);
}

// Tiles that are not in e4m3 first, since there is more of them to read; behind all rows what tokens leave in their pages.
template <int TOKENS, int DEPTH>
__global__ void __launch_bounds__(THREADS) product(const __grid_constant__ Product p, const __grid_constant__ Kept kept) {
    constexpr int EIGHTS = TOKENS < 8 ? 1 : TOKENS / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int others = p.num_others / ROWS, tiles = others + p.num_rows / ROWS, num_groups = (tiles + WARPS - 1) / WARPS;
    const int group = blockIdx.x / p.cluster, rank = blockIdx.x % p.cluster, first_token = blockIdx.y * TOKENS;
    if (group >= num_groups) {
        let_dependents_start();
        wait_for_inputs(p.x);
        const int token = (group - num_groups) * p.cluster + rank;
        if (blockIdx.y == 0 && token < p.num_tokens) append(p, kept, token, dynamic_shared());
        return;
    }
    const int tile = group * WARPS + warp;
    const Share share{rank * (p.num_columns / p.cluster), p.num_columns / p.cluster};
    const bool coded = tile >= others;
    const Tile<Codes, DEPTH> codes(p, share, min(tile, tiles - 1) - others);
    const Tile<Halves, DEPTH> halves(p, share, tile);
    uint4 ahead[DEPTH][4];
    float scale[DEPTH];
    if (tile < tiles) coded ? codes.begin(ahead, scale) : halves.begin(ahead, scale);

    char* const tokens = reinterpret_cast<char*>(dynamic_shared());
    float* const parts = reinterpret_cast<float*>(tokens + TOKENS * share.row_bytes());  // [TOKENS][BLOCK_ROWS]
    float* const squares = parts + TOKENS * BLOCK_ROWS;                                  // of all warps of a token
    wait_for_inputs(p.x);
    stage<TOKENS>(p, share, first_token, group, num_groups, tokens, squares);

    float sums[EIGHTS][4] = {};
    const char* const x = tokens + g % TOKENS * share.row_bytes() + q * 32;
    if (tile < tiles) coded ? codes.finish(sums, ahead, scale, x, 8 * share.row_bytes()) : halves.finish(sums, ahead, scale, x, 8 * share.row_bytes());
    let_dependents_start();  // not before: their loads would delay these
#pragma unroll
    for (int m = 0; m < EIGHTS; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = m * 8 + q * 2 + i % 2;
            if (n < TOKENS) parts[n * BLOCK_ROWS + warp * ROWS + g + i / 2 * 8] = sums[m][i];
        }
    p.cluster > 1 ? Cluster::sync_shared() : __syncthreads();
    for (int i = rank * THREADS + threadIdx.x; i < TOKENS * BLOCK_ROWS; i += p.cluster * THREADS) {
        const int n = i / BLOCK_ROWS, token = first_token + n, own = group * WARPS + i % BLOCK_ROWS / ROWS;
        if (token >= p.num_tokens || own >= tiles) continue;
        float sum = 0, all = 0, of_block[MAX_CLUSTER], squares_of_block[MAX_CLUSTER];
#pragma unroll
        for (int r = 0; r < MAX_CLUSTER; r++) {  // all asked for before any has come
            const float* const theirs = p.cluster > 1 ? Cluster::of(parts, min(r, p.cluster - 1)) : parts;
            if (r < p.cluster) of_block[r] = theirs[i], squares_of_block[r] = theirs[TOKENS * BLOCK_ROWS + n];
        }
#pragma unroll
        for (int r = 0; r < MAX_CLUSTER; r++)
            if (r < p.cluster) sum += of_block[r], all += squares_of_block[r];
        sum *= p.gain != nullptr ? rsqrtf(all / p.num_columns + p.eps) / SMALLER : 1 / SMALLER;
        const int row = (own < others ? p.num_rows / ROWS + own : own - others) * ROWS + i % ROWS;
        const int64_t at = static_cast<int64_t>(token) * (p.num_rows + p.num_others) + row;
        if (p.wide_out) static_cast<float*>(p.out)[at] = sum;
        else static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16(sum);
    }
    if (p.cluster > 1) Cluster::sync_shared();  // nobody leaves while others read from it
}

// The matrix in bf16, without the others; a thread has sixteen codes.
__global__ void __launch_bounds__(256) dequantize(const __grid_constant__ Product p) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    const int steps = p.num_columns / STEP, unit = static_cast<int>(place % (ROWS * STEP / 16)), step = static_cast<int>(place / (ROWS * STEP / 16) % steps);
    const int tile = static_cast<int>(place / (ROWS * STEP / 16) / steps);
    const int row = tile * ROWS + unit / 64 * 8 + unit % 32 / 4, column = step * STEP + unit / 32 % 2 * 64 + unit % 4 * 16;
    let_dependents_start();
    wait_for_inputs(p.codes);
    if (row >= p.num_rows) return;
    const uint4 codes = stream(reinterpret_cast<const uint4*>(p.codes) + place);
    const float scale = p.scales[tile * steps + step];
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint2 halves = from_fp8(words[i]);
        const float2 a = from_halves(halves.x), b = from_halves(halves.y);
        pairs[2 * i] = as_pair(a.x * scale, a.y * scale), pairs[2 * i + 1] = as_pair(b.x * scale, b.y * scale);
    }
    auto* to = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + static_cast<int64_t>(row) * p.num_columns + column);
    to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]), to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

template <int TOKENS, int DEPTH>
cudaError_t run(const Product& p, const Kept* kept, bool early, cudaStream_t stream) {
    const size_t shared = TOKENS * (p.num_columns / p.cluster * 2 + 16) + sizeof(float) * TOKENS * (BLOCK_ROWS + WARPS);
    const int groups = ((p.num_rows + p.num_others) / ROWS + WARPS - 1) / WARPS, keepers = kept ? (p.num_tokens + p.cluster - 1) / p.cluster : 0;
    const dim3 grid((groups + keepers) * p.cluster, (p.num_tokens + TOKENS - 1) / TOKENS);
    return launch_beside(product<TOKENS, DEPTH>, grid, THREADS, shared, p.cluster, early, stream, p, kept ? *kept : Kept{});
}

template <int TOKENS>
cudaError_t run(const Product& p, const Kept* kept, int depth, bool early, cudaStream_t stream) {
    switch (depth) {
        case 3: return run<TOKENS, 3>(p, kept, early, stream);
        case 4: return run<TOKENS, 4>(p, kept, early, stream);
        case 6: return run<TOKENS, 6>(p, kept, early, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace forebay

extern "C" {

// Each returns a cudaError_t. Without `kept` nothing is written into pages.
int forebay_fp8_product(const forebay::Product* p, const forebay::Kept* kept, int depth, int early, void* stream) {
    auto* s = static_cast<cudaStream_t>(stream);
    if (p->cluster < 1 || p->cluster > forebay::MAX_CLUSTER || p->num_columns % (forebay::STEP * p->cluster)) return cudaErrorInvalidValue;
    if (p->num_tokens == 1) return forebay::run<1>(*p, kept, depth, early, s);
    if (p->num_tokens == 2) return forebay::run<2>(*p, kept, depth, early, s);
    if (p->num_tokens <= 4) return forebay::run<4>(*p, kept, depth, early, s);
    if (p->num_tokens <= 8) return forebay::run<8>(*p, kept, depth, early, s);
    if (p->num_tokens <= 16) return forebay::run<16>(*p, kept, depth, early, s);
    return forebay::run<32>(*p, kept, depth, early, s);
}

int forebay_fp8_dequantize(const forebay::Product* p, int early, void* stream) {
    const int64_t threads = static_cast<int64_t>(p->num_rows) * (p->num_columns / 16);
    return forebay::launch_beside(forebay::dequantize, dim3(static_cast<unsigned>((threads + 255) / 256)), 256, 0, 1, early, stream, *p);
}
}
