// Products of few tokens with a matrix in e4m3, and what lies around them in a layer of GLM: the C side of `kernels.cuda_fp8`.
//
// A block computes 16 rows; its warps share out the columns, 128 at a time, and take weights straight into the registers in which
// tensor cores want them, several steps ahead, the first ones before it waits for the kernel in front. Then it brings the tokens into
// shared memory as fp16, behind their norm: codes are exact in fp16, and so are their products in the sums of tensor cores.
// Which columns share an instruction does not matter as long as both sides agree, so a lane takes sixteen that lie side by side.
#include <device.cuh>

namespace forebay {

constexpr int ROWS = 16, EIGHT = 8, STEP = 128;  // rows of a block, tokens of it, columns with one scale
constexpr int AT_ONCE = 4;                       // pieces of tokens that a thread asks for at once
constexpr float SMALLER = 1.0f / 16;             // what is behind a norm: gains of up to 13,000 then fit into fp16

struct Product {
    const uint8_t* codes;      // [num_rows, K]
    const float* scales;       // [num_rows / ROWS, K / STEP]
    const __half* others;      // [num_others, K]: rows behind these that are not in e4m3, or none
    const void* x;             // [tokens, K], bf16 or float
    const __nv_bfloat16* delta;  // to be added to x, [tokens, K], or none
    const __nv_bfloat16* gain;   // of an RMSNorm, [K], or none
    void* out;                 // [tokens, num_rows + num_others], bf16 or float
    __nv_bfloat16* total;      // [tokens, K]: x and delta, or none
    int num_tokens, num_rows, num_others, num_columns, x_stride, delta_stride, wide_x, wide_out;
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

// Weights of a row as lanes take them: four times sixteen bytes, of row g and of row g + 8.
struct Codes {
    static constexpr int COLUMNS = 128;
    __device__ static int64_t first(const Product& p, int row) { return static_cast<int64_t>(row) * p.num_columns / 16; }
    __device__ static const uint4* from(const Product& p) { return reinterpret_cast<const uint4*>(p.codes); }
    static constexpr int SECOND = 4;  // where a lane's second sixteen bytes are, from the first, in sixteens

    __device__ __forceinline__ static void add(float (&sum)[4], const uint4 (&w)[4], const char* x) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint4 b[2] = {*reinterpret_cast<const uint4*>(x + h * 128), *reinterpret_cast<const uint4*>(x + h * 128 + 16)};
            const uint32_t low[4] = {w[h].x, w[h].y, w[h].z, w[h].w}, high[4] = {w[2 + h].x, w[2 + h].y, w[2 + h].z, w[2 + h].w};
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const uint2 near = from_fp8(low[s]), far = from_fp8(high[s]);
                const uint4 pairs = b[s / 2];
                multiply_half(sum, {near.x, far.x, near.y, far.y}, s % 2 ? pairs.z : pairs.x, s % 2 ? pairs.w : pairs.y);
            }
        }
    }
};
struct Halves {
    static constexpr int COLUMNS = 64;
    __device__ static int64_t first(const Product& p, int row) { return static_cast<int64_t>(row) * p.num_columns / 8; }
    __device__ static const uint4* from(const Product& p) { return reinterpret_cast<const uint4*>(p.others); }
    static constexpr int SECOND = 1;

    __device__ __forceinline__ static void add(float (&sum)[4], const uint4 (&w)[4], const char* x) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint4 b = *reinterpret_cast<const uint4*>(x + h * 16);
            multiply_half(sum, {w[h].x, w[2 + h].x, w[h].y, w[2 + h].y}, b.x, b.y);
            multiply_half(sum, {w[h].z, w[2 + h].z, w[h].w, w[2 + h].w}, b.z, b.w);
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

// A token's row in shared memory, in bytes: sixteen more than its values, so that rows begin in other banks.
__device__ __forceinline__ int row_bytes(int num_columns) { return num_columns * 2 + 16; }

// Tokens into shared memory as fp16, behind their norm or, where there is none, scaled by a power of two that keeps them in range; what
// undoes that is left in `factors`. `found` has room for a number of each warp and token. Some blocks write each a part of `total`.
template <int TOKENS, int WARPS>
__device__ __forceinline__ void stage(const Product& p, int first_token, char* tokens, float* found, float* factors) {
    constexpr int THREADS = WARPS * 32, SOME = TOKENS < AT_ONCE ? TOKENS : AT_ONCE, PIECES = AT_ONCE / SOME;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = row_bytes(p.num_columns), pieces = p.num_columns / 8;
    const bool normed = p.gain != nullptr;
#pragma unroll
    for (int begin = 0; begin < TOKENS; begin += SOME) {
        float reduced[SOME] = {};
        for (int base = threadIdx.x; base < pieces; base += THREADS * PIECES) {
            uint4 value[PIECES][SOME], other[PIECES][SOME];
#pragma unroll
            for (int i = 0; i < PIECES; i++)
#pragma unroll
                for (int n = 0; n < SOME; n++) {
                    const int place = base + i * THREADS, token = first_token + begin + n;
                    value[i][n] = other[i][n] = make_uint4(0, 0, 0, 0);
                    if (place >= pieces || token >= p.num_tokens) continue;
                    value[i][n] = eight(p, token, place);
                    if (p.delta != nullptr) other[i][n] = fresh(static_cast<const void*>(p.delta + static_cast<int64_t>(token) * p.delta_stride + place * 8));
                }
#pragma unroll
            for (int i = 0; i < PIECES; i++)
#pragma unroll
                for (int n = 0; n < SOME; n++) {
                    const int place = base + i * THREADS, token = first_token + begin + n;
                    if (place >= pieces) continue;
                    if (p.delta != nullptr) value[i][n] = added(value[i][n], other[i][n]);
                    *reinterpret_cast<uint4*>(tokens + (begin + n) * row + place * 16) = value[i][n];
                    if (p.total != nullptr && place % gridDim.x == blockIdx.x && token < p.num_tokens)
                        *reinterpret_cast<uint4*>(p.total + static_cast<int64_t>(token) * p.num_columns + place * 8) = value[i][n];
                    const uint32_t pairs[4] = {value[i][n].x, value[i][n].y, value[i][n].z, value[i][n].w};
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const float a = first_of(pairs[k]), b = second_of(pairs[k]);
                        reduced[n] = normed ? reduced[n] + a * a + b * b : fmaxf(reduced[n], fmaxf(fabsf(a), fabsf(b)));
                    }
                }
        }
#pragma unroll
        for (int n = 0; n < SOME; n++) {
            for (int i = 16; i; i /= 2) {
                const float theirs = __shfl_xor_sync(~0u, reduced[n], i);
                reduced[n] = normed ? reduced[n] + theirs : fmaxf(reduced[n], theirs);
            }
            if (lane == 0) found[warp * TOKENS + begin + n] = reduced[n];
        }
    }
    __syncthreads();
    if (threadIdx.x < TOKENS) {
        float all = 0;
        for (int w = 0; w < WARPS; w++) all = normed ? all + found[w * TOKENS + threadIdx.x] : fmaxf(all, found[w * TOKENS + threadIdx.x]);
        const uint32_t exponent = min(254u, max(15u, __float_as_uint(all) >> 23));
        factors[threadIdx.x] = normed ? 1 / SMALLER : __uint_as_float((exponent - 14) << 23);
        factors[TOKENS + threadIdx.x] = normed ? rsqrtf(all / p.num_columns + p.eps) * SMALLER : __uint_as_float((268 - exponent) << 23);
    }
    __syncthreads();
    for (int place = threadIdx.x; place < pieces; place += THREADS) {
        float gains[8] = {1, 1, 1, 1, 1, 1, 1, 1};
        if (normed) {
            const uint4 gain = *reinterpret_cast<const uint4*>(p.gain + place * 8);
            const uint32_t pairs[4] = {gain.x, gain.y, gain.z, gain.w};
#pragma unroll
            for (int k = 0; k < 4; k++) gains[2 * k] = first_of(pairs[k]), gains[2 * k + 1] = second_of(pairs[k]);
        }
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            auto* at = reinterpret_cast<uint4*>(tokens + n * row + place * 16);
            const uint32_t pairs[4] = {at->x, at->y, at->z, at->w};
            const float scale = factors[TOKENS + n];
            uint32_t halves[4];
#pragma unroll
            for (int k = 0; k < 4; k++) halves[k] = as_halves(first_of(pairs[k]) * scale * gains[2 * k], second_of(pairs[k]) * scale * gains[2 * k + 1]);
            *at = make_uint4(halves[0], halves[1], halves[2], halves[3]);
        }
    }
    __syncthreads();
}

// One block's rows of a product, from `row` on of its kind of weights, written from `out_row` on.
template <class Weights, int TOKENS, int WARPS, int DEPTH>
__device__ __forceinline__ void compute(const Product& p, int row, int out_row, int first_token) {
    constexpr int THREADS = WARPS * 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int all = p.num_columns / Weights::COLUMNS, num_steps = (all - warp + WARPS - 1) / WARPS;
    const uint4* const near = Weights::from(p) + Weights::first(p, row + g) + (Weights::SECOND == 1 ? 2 * q : q);
    const uint4* const far = near + Weights::first(p, 8);
    const float* const scales = p.scales + static_cast<int64_t>(row / ROWS) * (p.num_columns / STEP);
    constexpr int PER_STEP = 8;  // sixteens of a row
    uint4 ahead[DEPTH][4];
    float scale_ahead[DEPTH];
    const auto load = [&](int d, int step) {
        const int at = warp + step * WARPS;
        ahead[d][0] = stream(near + at * PER_STEP), ahead[d][1] = stream(near + at * PER_STEP + Weights::SECOND);
        ahead[d][2] = stream(far + at * PER_STEP), ahead[d][3] = stream(far + at * PER_STEP + Weights::SECOND);
        scale_ahead[d] = Weights::COLUMNS == STEP ? __uint_as_float(stream(reinterpret_cast<const uint32_t*>(scales + at))) : 1.0f;
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (d < num_steps) load(d, d);

    char* const tokens = reinterpret_cast<char*>(dynamic_shared());
    float* const parts = reinterpret_cast<float*>(tokens + TOKENS * row_bytes(p.num_columns));  // [WARPS][TOKENS][ROWS]
    float* const factors = parts + WARPS * TOKENS * ROWS;
    let_dependents_start();
    wait_for_inputs(p.x);
    stage<TOKENS, WARPS>(p, first_token, tokens, parts, factors);

    float sums[4] = {};
    const char* const x = tokens + g % TOKENS * row_bytes(p.num_columns) + q * 32;
    for (int base = 0; base < num_steps; base += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (base + d >= num_steps) break;
            float part[4] = {};
            Weights::add(part, ahead[d], x + (warp + (base + d) * WARPS) * Weights::COLUMNS * 2);
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i] += part[i] * scale_ahead[d];
            if (base + d + DEPTH < num_steps) load(d, base + d + DEPTH);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int n = q * 2 + i % 2;
        if (n < TOKENS) parts[(warp * TOKENS + n) * ROWS + g + i / 2 * 8] = sums[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * ROWS; i += THREADS) {
        const int token = first_token + i / ROWS;
        if (token >= p.num_tokens) continue;
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += parts[w * TOKENS * ROWS + i];
        sum *= factors[i / ROWS];
        const int64_t at = static_cast<int64_t>(token) * (p.num_rows + p.num_others) + out_row + i % ROWS;
        if (p.wide_out) static_cast<float*>(p.out)[at] = sum;
        else static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16(sum);
    }
}

template <int WARPS>
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
template <int WARPS>
__device__ __forceinline__ void append(const Product& p, const Kept& k, int token, float* found) {
    constexpr int THREADS = WARPS * 32;
    const int slot = k.slots[token], thread = threadIdx.x;
    if (slot < 0) return;
    const float* const from = static_cast<const float*>(p.x) + static_cast<int64_t>(token) * p.x_stride + p.num_columns;
    const int64_t page = slot / k.page_size, place = slot % k.page_size;
    __nv_bfloat16* const latent = k.latents + page * k.latent_page + place * (k.latent + 2 * k.half);
    float squares = 0;
    for (int i = thread; i < k.latent; i += THREADS) squares += fresh(from + i) * fresh(from + i);
    const float scale = rsqrtf(sum_of_block<WARPS>(squares, found) / k.latent + k.latent_eps);
    for (int i = thread; i < k.latent; i += THREADS)
        latent[i] = __float2bfloat16(rounded(fresh(from + i) * scale) * __bfloat162float(k.latent_gain[i]));
    const float* const turned = from + k.latent;
    for (int i = thread; i < k.half; i += THREADS) turn(k, token, i, fresh(turned + 2 * i), fresh(turned + 2 * i + 1), latent + k.latent);
    if (k.key == 0) return;
    const float* const key = turned + 2 * k.half;
    float sum = 0, spread = 0;
    for (int i = thread; i < k.key; i += THREADS) sum += fresh(key + i);
    const float mean = sum_of_block<WARPS>(sum, found) / k.key;
    for (int i = thread; i < k.key; i += THREADS) spread += (fresh(key + i) - mean) * (fresh(key + i) - mean);
    const float by = rsqrtf(sum_of_block<WARPS>(spread, found) / k.key + k.key_eps);
    const auto normed = [&](int i) { return rounded((fresh(key + i) - mean) * by * k.key_gain[i] + k.key_bias[i]); };
    for (int i = thread; i < k.key / 2; i += THREADS)
        turn(k, token, i, normed(2 * i), normed(2 * i + 1), k.keys + page * k.key_page + place * k.key);
}

// Rows that are not in e4m3 first, since there is more of them to read; behind all rows what tokens leave in their pages.
template <int TOKENS, int WARPS, int DEPTH, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) product(const __grid_constant__ Product p, const __grid_constant__ Kept kept) {
    const int others = p.num_others / ROWS, tiles = others + p.num_rows / ROWS, block = blockIdx.x;
    const int first_token = blockIdx.y * EIGHT;
    if (block >= tiles) {
        let_dependents_start();
        wait_for_inputs(p.x);
        if (blockIdx.y == 0) append<WARPS>(p, kept, block - tiles, dynamic_shared());
    } else if (block >= others) {
        compute<Codes, TOKENS, WARPS, DEPTH>(p, (block - others) * ROWS, (block - others) * ROWS, first_token);
    } else {
        compute<Halves, TOKENS, WARPS, DEPTH>(p, block * ROWS, p.num_rows + block * ROWS, first_token);
    }
}

// The matrix in bf16, without the others; a thread has sixteen codes.
__global__ void __launch_bounds__(256) dequantize(const __grid_constant__ Product p) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    const int sixteens = p.num_columns / 16, row = static_cast<int>(place / sixteens), column = static_cast<int>(place % sixteens) * 16;
    let_dependents_start();
    wait_for_inputs(p.codes);
    if (row >= p.num_rows) return;
    const uint4 codes = stream(reinterpret_cast<const uint4*>(p.codes) + place);
    const float scale = p.scales[row / ROWS * (p.num_columns / STEP) + column / STEP];
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint2 halves = from_fp8(words[i]);
        const float2 a = from_halves(halves.x), b = from_halves(halves.y);
        pairs[2 * i] = as_pair(a.x * scale, a.y * scale), pairs[2 * i + 1] = as_pair(b.x * scale, b.y * scale);
    }
    auto* to = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + place * 16);
    to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]), to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, bool early, cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute attributes[1];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = attributes, config.numAttrs = early;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int TOKENS, int WARPS, int DEPTH, int BLOCKS>
cudaError_t run(const Product& p, const Kept* kept, bool early, cudaStream_t stream) {
    const size_t shared = TOKENS * (p.num_columns * 2 + 16) + sizeof(float) * (WARPS * TOKENS * ROWS + 2 * TOKENS);
    auto* kernel = product<TOKENS, WARPS, DEPTH, BLOCKS>;
    if (shared > 40 << 10) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    const int blocks = (p.num_rows + p.num_others) / ROWS + (kept ? p.num_tokens : 0);
    const dim3 grid(blocks, (p.num_tokens + EIGHT - 1) / EIGHT);
    return launch(kernel, grid, WARPS * 32, shared, early, stream, p, kept ? *kept : Kept{});
}

template <int TOKENS>
cudaError_t run(const Product& p, const Kept* kept, int warps, int depth, int blocks, bool early, cudaStream_t stream) {
    switch (warps * 100 + depth * 10 + blocks) {
        case 426: return run<TOKENS, 4, 2, 6>(p, kept, early, stream);
        case 434: return run<TOKENS, 4, 3, 4>(p, kept, early, stream);
        case 444: return run<TOKENS, 4, 4, 4>(p, kept, early, stream);
        case 463: return run<TOKENS, 4, 6, 3>(p, kept, early, stream);
        case 822: return run<TOKENS, 8, 2, 2>(p, kept, early, stream);
        case 823: return run<TOKENS, 8, 2, 3>(p, kept, early, stream);
        case 832: return run<TOKENS, 8, 3, 2>(p, kept, early, stream);
        case 861: return run<TOKENS, 8, 6, 1>(p, kept, early, stream);
        case 1631: return run<TOKENS, 16, 3, 1>(p, kept, early, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace forebay

extern "C" {

// Each returns a cudaError_t. Without `kept` nothing is written into pages.
int forebay_fp8_product(const forebay::Product* p, const forebay::Kept* kept, int warps, int depth, int blocks, int early, void* stream) {
    auto* s = static_cast<cudaStream_t>(stream);
    if (p->num_tokens == 1) return forebay::run<1>(*p, kept, warps, depth, blocks, early, s);
    if (p->num_tokens == 2) return forebay::run<2>(*p, kept, warps, depth, blocks, early, s);
    if (p->num_tokens <= 4) return forebay::run<4>(*p, kept, warps, depth, blocks, early, s);
    return forebay::run<forebay::EIGHT>(*p, kept, warps, depth, blocks, early, s);
}

int forebay_fp8_dequantize(const forebay::Product* p, int early, void* stream) {
    const int64_t threads = static_cast<int64_t>(p->num_rows) * (p->num_columns / 16);
    return forebay::launch(forebay::dequantize, dim3(static_cast<unsigned>((threads + 255) / 256)), 256, 0, early, static_cast<cudaStream_t>(stream), *p);
}
}
