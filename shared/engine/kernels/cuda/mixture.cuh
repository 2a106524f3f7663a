// A mixture of experts of few tokens in one kernel: the residual's sum and the norm, the router, the choice, gate and up
// of the chosen NVFP4 experts and of the shared one, their way down, and the weighted sum.
//
// One block a multiprocessor goes through all of it; blocks meet twice, where the choice and where the inner values must be
// complete. Weights go to shared memory by bulk copies, which no thread waits for: those that need no choice before the
// kernel's inputs are there, the chosen experts' as soon as the choice is known, through a ring of stages that holds rows of
// gate and up and then of the way down. So memory is seldom idle, and a meeting costs about a microsecond where the end of
// a kernel and the start of the next cost two to four.
//
// Products with codes are tensor cores': a warp takes 16 rows, tokens are the second operand's columns; those that stand for
// no token are computed of whatever there is and left out. A code becomes an fp16 by a permutation of bytes
// (`experts.Experts` says how they lie) and is multiplied by its scale, exactly. Activations, bfloat16, are fp16 times a power
// of two of their row, exactly too unless they are 2^-30 of the row's largest. Every block computes the norm and the choice
// for itself: cheaper than another meeting.
#pragma once
#include <device.cuh>
#include <stdint.h>

namespace forebay {

constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int INNER = 256;                        // of a routed expert, and of the shared one
constexpr int MAX_EXPERTS = 256, MAX_CHOSEN = 8;  // all, and of a token
constexpr int VALUES = 8;                         // inner values of a task, whose rows are eight of gate's and eight of up's
constexpr int TASKS = INNER / VALUES;             // of an expert
constexpr int DOWN_TILES = 3, DOWN_ROWS = DOWN_TILES * 16;  // of a block at a time
constexpr int BATCH = WARPS / 2;                  // experts on their way down at a time: half their columns a warp
constexpr int DOWN_CODES = DOWN_ROWS * INNER / 2, DOWN_SCALES = DOWN_ROWS * INNER / 16;  // bytes of an expert
constexpr int UNIT = 16;                          // bytes that a lane takes at once: 32 codes, the second 16 half a row on

struct Mixture {
    const __nv_bfloat16 *x, *delta, *gain;        // [tokens, hidden] twice, [hidden]
    const __nv_bfloat16* router;                  // [experts, hidden]
    const float* bias;                            // [experts]
    const uint8_t *gate_up, *gate_up_scale, *down, *down_scale;  // as `experts.Experts`
    const float* factors;                         // [experts, 2]
    const __nv_bfloat16 *shared_gate_up, *shared_down;
    __nv_bfloat16* total;                         // [tokens, hidden]: x + delta
    float* logits;                                // [tokens, experts]
    __nv_bfloat16* inner;                         // [tokens, chosen + 1, INNER], the shared expert's last
    __nv_bfloat16* out;                           // [tokens, hidden]
    uint64_t* arrivals;                           // 2, of whatever grids of this size came before
    int num_tokens, num_experts, num_chosen, normalize;
    float eps, factor;
};

// Where things lie in shared memory. T: tokens that there is room for; H: 2048s of hidden.
template <int T, int H>
struct Memory {
    static constexpr int K = 2048 * H, X_STRIDE = K + 8, INNER_STRIDE = INNER + 8;  // in halves
    // Of rows of codes and scales in bytes: lanes that read together find what they read in different banks.
    static constexpr int ROW = K / 2 + 64, SCALE_ROW = K / 16 + 16;
    static constexpr int OF_TASK = 16 * (ROW + SCALE_ROW), OF_BATCH = BATCH * (DOWN_CODES + DOWN_SCALES), OF_SHARED = 2 * DOWN_ROWS * INNER;
    static constexpr int LARGEST = OF_TASK > OF_BATCH ? OF_TASK : OF_BATCH, STAGE = LARGEST > OF_SHARED ? LARGEST : OF_SHARED;
    static constexpr int STAGES = T <= 4 ? 3 : 2, MAX_DISTINCT = T * MAX_CHOSEN;

    int router_rows, pairs;  // of a block
    __half* x;               // [T][X_STRIDE]; then inner values [T][chosen + 1][INNER_STRIDE]
    float* down_parts;       // behind them: [WARPS][DOWN_ROWS][T]
    char* stages;            // [STAGES][STAGE]
    __nv_bfloat16* weights;  // in their place at first: [router_rows + 2 pairs][K]
    float *parts, *scores;   // [2][WARPS][16][T] or more; there too: [T][MAX_EXPERTS]
    float *bias, *factors;   // [MAX_EXPERTS]; of the distinct [MAX_DISTINCT][2]
    float *x_scale, *inner_scale, *chance;  // [T], [T][chosen + 1], [T][MAX_CHOSEN]
    int *chosen, *distinct;  // [T][MAX_CHOSEN], [MAX_DISTINCT]
    uint32_t* mask;          // [MAX_EXPERTS / 32]
    int8_t* place;           // [MAX_DISTINCT][8]: which choice of a token an expert is, or -1
    uint64_t *of_stage, *of_router, *of_shared;  // copies that have come
    size_t bytes;

    __device_and_host__ Memory(char* at, int num_experts, int num_chosen, int blocks) {
        char* const begin = at;
        const auto take = [&](size_t size) { char* const was = at; at += (size + 127) / 128 * 128; return was; };
        const auto larger = [](size_t a, size_t b) { return a > b ? a : b; };
        router_rows = (num_experts + blocks - 1) / blocks, pairs = (INNER + blocks - 1) / blocks;
        const size_t inner = size_t{2} * T * (num_chosen + 1) * INNER_STRIDE;
        x = reinterpret_cast<__half*>(take(larger(2 * T * X_STRIDE, inner + 4 * WARPS * DOWN_ROWS * T)));
        down_parts = reinterpret_cast<float*>(reinterpret_cast<char*>(x) + inner);
        stages = take(larger(STAGES * STAGE, size_t{2} * (router_rows + 2 * pairs) * K));
        weights = reinterpret_cast<__nv_bfloat16*>(stages);
        parts = scores = reinterpret_cast<float*>(take(4 * T * larger(larger(8 * router_rows, 8 * pairs), 2 * WARPS * 16)));
        bias = reinterpret_cast<float*>(take(4 * MAX_EXPERTS));
        factors = reinterpret_cast<float*>(take(8 * MAX_DISTINCT));
        x_scale = reinterpret_cast<float*>(take(4 * T));
        inner_scale = reinterpret_cast<float*>(take(4 * T * (MAX_CHOSEN + 1)));
        chance = reinterpret_cast<float*>(take(4 * MAX_DISTINCT));
        chosen = reinterpret_cast<int*>(take(4 * MAX_DISTINCT));
        distinct = reinterpret_cast<int*>(take(4 * MAX_DISTINCT));
        mask = reinterpret_cast<uint32_t*>(take(MAX_EXPERTS / 8));
        place = reinterpret_cast<int8_t*>(take(MAX_DISTINCT * 8));
        of_stage = reinterpret_cast<uint64_t*>(take(8 * (STAGES + 2)));
        of_router = of_stage + STAGES, of_shared = of_router + 1;
        bytes = at - begin;
    }
};

// Two words of codes, of rows g and g + 8, to operands: of the elements that come first, and of those half a row on.
__device__ __forceinline__ void decode(uint32_t word, uint32_t low_scale, uint32_t high_scale, uint32_t (&first)[2], uint32_t (&second)[2]) {
    const uint32_t magnitudes = word & 0x77777777u;
    const uint32_t a = __byte_perm(0x3E3C3800u, 0x46444240u, magnitudes) | (word & 0x80808080u);
    const uint32_t b = __byte_perm(0x3E3C3800u, 0x46444240u, magnitudes >> 16) | ((word << 4) & 0x80808080u);
    first[0] = times_half(__byte_perm(a, 0, 0x1404), low_scale), first[1] = times_half(__byte_perm(a, 0, 0x3424), low_scale);
    second[0] = times_half(__byte_perm(b, 0, 0x1404), high_scale), second[1] = times_half(__byte_perm(b, 0, 0x3424), high_scale);
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// e4m3 to two equal fp16: the value times 2^-8.
__device__ __forceinline__ uint32_t scale_of(uint8_t bits) { return bits * 0x00800080u; }

// Units of rows g and g + 8 times the lane's 32 values `b` of a column.
__device__ __forceinline__ void multiply_units(float (&low)[4], float (&high)[4], const uint4& row, const uint4& row_8,
                                               const uint32_t (&scales)[4], const uint4 (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t one[2], one_high[2], other[2], other_high[2];
        decode(word_of(row, i), scales[0], scales[1], one, one_high);
        decode(word_of(row_8, i), scales[2], scales[3], other, other_high);
        const uint32_t a[4] = {one[0], other[0], one[1], other[1]}, c[4] = {one_high[0], other_high[0], one_high[1], other_high[1]};
        multiply_half(low, a, word_of(b[i / 2], i % 2 * 2), word_of(b[i / 2], i % 2 * 2 + 1));
        multiply_half(high, c, word_of(b[2 + i / 2], i % 2 * 2), word_of(b[2 + i / 2], i % 2 * 2 + 1));
    }
}

// A column's values for `unit`, of a row whose second half begins `half` values on.
__device__ __forceinline__ void values_of(uint4 (&b)[4], const __half* row, int unit, int half) {
    const auto* low = reinterpret_cast<const uint4*>(row + unit * 16);
    const auto* high = reinterpret_cast<const uint4*>(row + half + unit * 16);
    b[0] = low[0], b[1] = low[1], b[2] = high[0], b[3] = high[1];
}

// sums[t] += 8 bfloat16 weights times values of token t, rows of x being `stride` halves long.
template <int T>
__device__ __forceinline__ void dot(float (&sums)[T], const __nv_bfloat16* weights, const __half* x, int stride) {
    const uint4 w = *reinterpret_cast<const uint4*>(weights);
#pragma unroll
    for (int t = 0; t < T; t++) {
        const uint4 v = *reinterpret_cast<const uint4*>(x + t * stride);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t both = word_of(w, i);
            const float2 value = from_halves(word_of(v, i));
            sums[t] += __uint_as_float(both << 16) * value.x + __uint_as_float(both & 0xFFFF0000u) * value.y;
        }
    }
}

template <int T>
__device__ __forceinline__ void add_lanes(float (&sums)[T]) {
#pragma unroll
    for (int t = 0; t < T; t++)
        for (int i = 16; i; i /= 2) sums[t] += __shfl_xor_sync(~0u, sums[t], i);
}

// A power of two by which values up to `largest` become at most 2^14; `back` undoes it.
__device__ __forceinline__ float to_halves(float largest, float& back) {
    const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23 & 255), 20);
    back = __uint_as_float(static_cast<uint32_t>(exponent - 13) << 23);
    return __uint_as_float(static_cast<uint32_t>(267 - exponent) << 23);
}

// By one warp: ask for what depends on nothing, rows of the router and of the shared expert.
template <int T, int H>
__device__ void fetch_fixed(const Mixture& p, const Memory<T, H>& m) {
    constexpr int K = Memory<T, H>::K;
    const int first = blockIdx.x * m.router_rows, rows = max(0, min(m.router_rows, p.num_experts - first));
    const int pair = blockIdx.x * m.pairs, pairs = max(0, min(m.pairs, INNER - pair));
    if (threadIdx.x == 0) {
        expect_copies(m.of_router, rows * K * 2);
        if (rows > 0) copy_bulk(m.weights, p.router + static_cast<size_t>(first) * K, rows * K * 2, m.of_router);
        expect_copies(m.of_shared, 2 * pairs * K * 2);
        for (int side = 0; side < 2 && pairs > 0; side++)
            copy_bulk(m.weights + static_cast<size_t>(m.router_rows + side * m.pairs) * K,
                      p.shared_gate_up + static_cast<size_t>(side * INNER + pair) * K, pairs * K * 2, m.of_shared);
    }
}

// What a block needs of the chosen experts, in its order: a stage full of each. First gate's and up's rows of its tasks;
// then, for each DOWN_ROWS rows of its own, experts' rows in batches and at last the shared expert's.
template <int T, int H>
struct Fills {
    static constexpr int K = Memory<T, H>::K, CHUNKS = (K + DOWN_ROWS - 1) / DOWN_ROWS;
    int count, tasks, batches, chunks;  // distinct experts; of this block: tasks, batches of a chunk, chunks

    __device__ Fills(int count) : count(count) {
        const int blocks = gridDim.x, block = blockIdx.x;
        tasks = (count * TASKS - block + blocks - 1) / blocks, batches = (count + BATCH - 1) / BATCH;
        chunks = (CHUNKS - block + blocks - 1) / blocks;
        tasks = max(tasks, 0), chunks = max(chunks, 0);
    }
    __device__ int all() const { return tasks + chunks * (batches + 1); }
    __device__ static int task(int fill) { return blockIdx.x + fill * gridDim.x; }
    __device__ int chunk(int fill) const { return blockIdx.x + (fill - tasks) / (batches + 1) * gridDim.x; }
    __device__ int batch(int fill) const { return (fill - tasks) % (batches + 1); }  // `batches`: the shared expert

    // By one warp: ask for a fill, if there is such a one, into the stage whose turn it is.
    __device__ void fetch(const Mixture& p, const Memory<T, H>& m, int fill) const {
        if (fill >= all()) return;
        const int lane = threadIdx.x % 32;
        char* const stage = m.stages + fill % Memory<T, H>::STAGES * Memory<T, H>::STAGE;
        uint64_t* const come = m.of_stage + fill % Memory<T, H>::STAGES;
        if (fill < tasks) {
            const int at = task(fill), side = lane / 8 % 2;
            const size_t row = static_cast<size_t>(m.distinct[at / TASKS]) * 2 * INNER + side * INNER + at % TASKS * VALUES + lane % 8;
            if (lane == 0) expect_copies(come, 16 * (K / 2 + K / 16));
            __syncwarp();
            if (lane < 16) copy_bulk(stage + lane * Memory<T, H>::ROW, p.gate_up + row * (K / 2), K / 2, come);
            else copy_bulk(stage + 16 * Memory<T, H>::ROW + (lane - 16) * Memory<T, H>::SCALE_ROW, p.gate_up_scale + row * (K / 16), K / 16, come);
            return;
        }
        const int first = chunk(fill) * DOWN_ROWS, rows = min(DOWN_ROWS, K - first), begin = batch(fill) * BATCH;
        if (batch(fill) == batches) {
            if (lane == 0) {
                expect_copies(come, rows * INNER * 2);
                copy_bulk(stage, p.shared_down + static_cast<size_t>(first) * INNER, rows * INNER * 2, come);
            }
            return;
        }
        const int experts = min(BATCH, count - begin), own = lane % BATCH;
        if (lane == 0) expect_copies(come, experts * rows * (INNER / 2 + INNER / 16));
        __syncwarp();
        if (own >= experts || lane >= 2 * BATCH) return;
        const size_t row = static_cast<size_t>(m.distinct[begin + own]) * K + first;
        if (lane < BATCH) copy_bulk(stage + own * DOWN_CODES, p.down + row * (INNER / 2), rows * INNER / 2, come);
        else copy_bulk(stage + BATCH * DOWN_CODES + own * DOWN_SCALES, p.down_scale + row * (INNER / 16), rows * INNER / 16, come);
    }
    // Wait for a fill, and where it is.
    __device__ static const uint8_t* await(const Memory<T, H>& m, int fill) {
        await_copies(m.of_stage + fill % Memory<T, H>::STAGES, fill / Memory<T, H>::STAGES % 2);
        return reinterpret_cast<const uint8_t*>(m.stages + fill % Memory<T, H>::STAGES * Memory<T, H>::STAGE);
    }
};

// The residual's sum and its norm, all of it in every block: x in shared memory; `total`, some columns of it.
template <int T, int H>
__device__ void normalize(const Mixture& p, const Memory<T, H>& m) {
    constexpr int K = Memory<T, H>::K, VECTORS = K / 4, EACH = VECTORS / THREADS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = VECTORS * blockIdx.x / gridDim.x, last = VECTORS * (blockIdx.x + 1) / gridDim.x;
    uint2 values[T][EACH], deltas[T][EACH], gains[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {  // all on their way before the first is looked at; rows of no token repeat the last
        const int v = threadIdx.x + i * THREADS;
#pragma unroll
        for (int t = 0; t < T; t++) {
            const int at = min(t, p.num_tokens - 1) * VECTORS + v;
            values[t][i] = fresh(reinterpret_cast<const uint2*>(p.x) + at);
            deltas[t][i] = fresh(reinterpret_cast<const uint2*>(p.delta) + at);
        }
        gains[i] = reinterpret_cast<const uint2*>(p.gain)[v];
    }
    float squares[T], largest[T];
#pragma unroll
    for (int t = 0; t < T; t++) {
        squares[t] = largest[t] = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int v = threadIdx.x + i * THREADS;
            values[t][i] = make_uint2(sum_of_pairs(values[t][i].x, deltas[t][i].x), sum_of_pairs(values[t][i].y, deltas[t][i].y));
            if (v >= first && v < last && t < p.num_tokens) reinterpret_cast<uint2*>(p.total)[t * VECTORS + v] = values[t][i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float value = of_pair(j / 2 ? values[t][i].y : values[t][i].x, j % 2);
                squares[t] += value * value;
                largest[t] = fmaxf(largest[t], fabsf(value * of_pair(j / 2 ? gains[i].y : gains[i].x, j % 2)));
            }
        }
    }
#pragma unroll
    for (int i = 16; i; i /= 2)
#pragma unroll
        for (int t = 0; t < T; t++) {
            squares[t] += __shfl_xor_sync(~0u, squares[t], i);
            largest[t] = fmaxf(largest[t], __shfl_xor_sync(~0u, largest[t], i));
        }
#pragma unroll
    for (int t = 0; t < T; t++)
        if (lane == 0) m.parts[t * WARPS + warp] = squares[t], m.parts[(T + t) * WARPS + warp] = largest[t];
    __syncthreads();
#pragma unroll
    for (int t = 0; t < T; t++) {
        float total = 0, most = 0, back;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += m.parts[t * WARPS + w], most = fmaxf(most, m.parts[(T + t) * WARPS + w]);
        const float scale = rsqrtf(total / K + p.eps), up = to_halves(most * scale, back);
        if (threadIdx.x == 0) m.x_scale[t] = back;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float normed[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                normed[j] = up * rounded(of_pair(j / 2 ? values[t][i].y : values[t][i].x, j % 2) * scale *
                                         of_pair(j / 2 ? gains[i].y : gains[i].x, j % 2));
            *reinterpret_cast<uint2*>(m.x + t * Memory<T, H>::X_STRIDE + (threadIdx.x + i * THREADS) * 4) =
                make_uint2(as_halves(normed[0], normed[1]), as_halves(normed[2], normed[3]));
        }
    }
}

// Rows of bfloat16 in shared memory times x, each cut into `cuts`; parts [rows * cuts][T].
template <int T, int H>
__device__ void multiply_rows(const Memory<T, H>& m, const __nv_bfloat16* weights, int rows, int cuts) {
    constexpr int K = Memory<T, H>::K;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = K / 8 / cuts;
    for (int item = warp; item < rows * cuts; item += WARPS) {
        float sums[T] = {};
        for (int v = lane; v < length; v += 32) {
            const int column = (item % cuts * length + v) * 8;
            dot<T>(sums, weights + static_cast<size_t>(item / cuts) * K + column, m.x + column, Memory<T, H>::X_STRIDE);
        }
        add_lanes(sums);
#pragma unroll
        for (int t = 0; t < T; t++)
            if (lane == 0) m.parts[item * T + t] = sums[t];
    }
}

template <int T>
__device__ __forceinline__ float part_sum(const float* parts, int row, int cuts, int t) {
    float sum = 0;
    for (int i = 0; i < cuts; i++) sum += parts[(row * cuts + i) * T + t];
    return sum;
}

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// A token's experts, by one warp: those of the largest score with its bias, of equal ones the first.
template <int T, int H>
__device__ void choose(const Mixture& p, const Memory<T, H>& m, int t) {
    constexpr int EACH = MAX_EXPERTS / 32;
    const int lane = threadIdx.x % 32;
    float logits[EACH];
    uint32_t order[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) logits[j] = fresh(p.logits + t * p.num_experts + min(lane + 32 * j, p.num_experts - 1));
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const float score = 1.0f / (1.0f + __expf(-logits[j]));
        m.scores[t * MAX_EXPERTS + lane + 32 * j] = score;
        const uint32_t bits = __float_as_uint(score + m.bias[lane + 32 * j]);
        order[j] = lane + 32 * j < p.num_experts ? (bits >> 31 ? ~bits : bits | 0x80000000u) : 0;
    }
    int mine = 0;
    for (int turn = 0; turn < p.num_chosen; turn++) {
        uint32_t best = order[0];
#pragma unroll
        for (int j = 1; j < EACH; j++) best = max(best, order[j]);
        const uint32_t most = largest_of_warp(best);
        uint32_t first = MAX_EXPERTS;
#pragma unroll
        for (int j = EACH - 1; j >= 0; j--)
            if (order[j] == most) first = lane + 32 * j;
        const int expert = MAX_EXPERTS - static_cast<int>(largest_of_warp(MAX_EXPERTS - first));
        if (lane == turn) mine = expert;
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (lane + 32 * j == expert) order[j] = 0;
    }
    __syncwarp();
    float score = lane < p.num_chosen ? m.scores[t * MAX_EXPERTS + mine] : 0.0f, total = score;
    for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
    if (lane < p.num_chosen) {
        m.chance[t * MAX_CHOSEN + lane] = (p.normalize ? score / (total + 1e-20f) : score) * p.factor;
        m.chosen[t * MAX_CHOSEN + lane] = mine;
        atomicOr(m.mask + mine / 32, 1u << mine % 32);
    }
}

// The different experts that were chosen, in their order, and whose choices they are; how many there are.
template <int T, int H>
__device__ int list_distinct(const Mixture& p, const Memory<T, H>& m) {
    uint32_t words[MAX_EXPERTS / 32];
    int count = 0;
#pragma unroll
    for (int word = 0; word < MAX_EXPERTS / 32; word++) words[word] = m.mask[word], count += __popc(words[word]);
    const auto rank = [&](int expert) {
        int before = 0;
#pragma unroll
        for (int word = 0; word < MAX_EXPERTS / 32; word++) {
            const uint32_t all = word < expert / 32 ? ~0u : word == expert / 32 ? (1u << expert % 32) - 1 : 0u;
            before += __popc(words[word] & all);
        }
        return before;
    };
    const int i = threadIdx.x, t = i / MAX_CHOSEN, choice = i % MAX_CHOSEN;
    if (t >= p.num_tokens || choice >= p.num_chosen) return count;
    const int expert = m.chosen[i], d = rank(expert);
    m.place[d * 8 + t] = static_cast<int8_t>(choice);
    m.distinct[d] = expert;
    return count;
}

// A warp's slice of a task's rows times x: parts [turn][WARPS][16][T].
template <int T, int H>
__device__ __forceinline__ void multiply_task(const Memory<T, H>& m, const uint8_t* stage, int turn) {
    constexpr int K = Memory<T, H>::K, EACH = K / 32 / WARPS / 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint8_t* codes = stage + g * Memory<T, H>::ROW;
    const uint8_t* scale = stage + 16 * Memory<T, H>::ROW + g * Memory<T, H>::SCALE_ROW;
    const __half* x = m.x + min(g, T - 1) * Memory<T, H>::X_STRIDE;
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int unit = (warp * EACH + i) * 4 + q;
        const uint8_t* at = scale + unit;
        const uint32_t scales[4] = {scale_of(at[0]), scale_of(at[K / 32]), scale_of(at[8 * Memory<T, H>::SCALE_ROW]),
                                    scale_of(at[8 * Memory<T, H>::SCALE_ROW + K / 32])};
        uint4 b[4];
        values_of(b, x, unit, K / 2);
        multiply_units(low, high, *reinterpret_cast<const uint4*>(codes + unit * UNIT),
                       *reinterpret_cast<const uint4*>(codes + 8 * Memory<T, H>::ROW + unit * UNIT), scales, b);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (q * 2 + i % 2 < T) m.parts[((turn * WARPS + warp) * 16 + i / 2 * 8 + g) * T + q * 2 + i % 2] = low[i] + high[i];
}

// Add up the slices of a task's rows and write what they give.
template <int T, int H>
__device__ __forceinline__ void finish_task(const Mixture& p, const Memory<T, H>& m, int task, int turn) {
    if (threadIdx.x >= VALUES * T) return;
    const int value = threadIdx.x / T, t = threadIdx.x % T, place = m.place[task / TASKS * 8 + t];
    if (place < 0) return;
    float sums[2] = {};
#pragma unroll
    for (int side = 0; side < 2; side++)
#pragma unroll
        for (int slice = 0; slice < WARPS; slice++) sums[side] += m.parts[((turn * WARPS + slice) * 16 + side * 8 + value) * T + t];
    const float scale = m.factors[task / TASKS * 2] * m.x_scale[t];
    p.inner[(t * (p.num_chosen + 1) + place) * INNER + task % TASKS * VALUES + value] = __float2bfloat16(gated(sums[0] * scale, sums[1] * scale));
}

// Inner values, which all blocks have written, to shared memory as fp16.
template <int T, int H>
__device__ void read_inner(const Mixture& p, const Memory<T, H>& m) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = p.num_tokens * (p.num_chosen + 1);
    for (int row = warp; row < rows; row += WARPS) {
        const uint4 v = fresh(reinterpret_cast<const uint4*>(p.inner + row * INNER) + lane);
        float largest = 0, back;
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(of_pair(word_of(v, i / 2), i % 2)));
        for (int i = 16; i; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
        const float up = to_halves(largest, back);
        if (lane == 0) m.inner_scale[row] = back;
        uint32_t halves[4];
#pragma unroll
        for (int i = 0; i < 4; i++) halves[i] = as_halves(up * of_pair(word_of(v, i), 0), up * of_pair(word_of(v, i), 1));
        *reinterpret_cast<uint4*>(m.x + row * Memory<T, H>::INNER_STRIDE + lane * 8) = make_uint4(halves[0], halves[1], halves[2], halves[3]);
    }
}

// A warp's part of a batch's way down, of expert `d` half the columns, weighed.
template <int T, int H>
__device__ __forceinline__ void multiply_down(float (&sums)[DOWN_TILES][4], const Mixture& p, const Memory<T, H>& m, const uint8_t* stage, int d) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, unit = warp % 2 * 4 + q, chosen = p.num_chosen;
    const int own = max(0, static_cast<int>(m.place[d * 8 + min(g, T - 1)]));
    uint4 b[4];
    values_of(b, m.x + (min(g, p.num_tokens - 1) * (chosen + 1) + own) * Memory<T, H>::INNER_STRIDE, unit, INNER / 2);
    float chance[2];
    bool used[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int t = q * 2 + j, place = t < T ? m.place[d * 8 + t] : -1;
        used[j] = place >= 0, chance[j] = 0;
        if (used[j]) chance[j] = m.chance[t * MAX_CHOSEN + place] * m.factors[d * 2 + 1] * m.inner_scale[t * (chosen + 1) + place];
    }
#pragma unroll
    for (int tile = 0; tile < DOWN_TILES; tile++) {
        const uint8_t* codes = stage + warp / 2 * DOWN_CODES + (tile * 16 + g) * (INNER / 2) + unit * UNIT;
        const uint8_t* at = stage + BATCH * DOWN_CODES + warp / 2 * DOWN_SCALES + (tile * 16 + g) * (INNER / 16) + unit;
        const uint32_t scales[4] = {scale_of(at[0]), scale_of(at[8]), scale_of(at[8 * INNER / 16]), scale_of(at[8 * INNER / 16 + 8])};
        float low[4] = {}, high[4] = {};
        multiply_units(low, high, *reinterpret_cast<const uint4*>(codes), *reinterpret_cast<const uint4*>(codes + 8 * INNER / 2), scales, b);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (used[i % 2]) sums[tile][i] += (low[i] + high[i]) * chance[i % 2];
    }
}

// The shared expert's way down and all warps' parts, added up and written.
template <int T, int H>
__device__ void finish_down(const float (&sums)[DOWN_TILES][4], const Mixture& p, const Memory<T, H>& m, const uint8_t* stage, int chunk) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int shared = p.num_chosen * Memory<T, H>::INNER_STRIDE, stride = (p.num_chosen + 1) * Memory<T, H>::INNER_STRIDE;
#pragma unroll
    for (int i = 0; i < 4 * DOWN_TILES; i++)
        if (q * 2 + i % 2 < T)
            m.down_parts[(warp * DOWN_ROWS + i / 4 * 16 + i % 4 / 2 * 8 + g) * T + q * 2 + i % 2] = sums[i / 4][i % 4];
    for (int row = warp; row < DOWN_ROWS; row += WARPS) {
        float own[T] = {};
        dot<T>(own, reinterpret_cast<const __nv_bfloat16*>(stage) + row * INNER + lane * 8, m.x + shared + lane * 8, stride);
        add_lanes(own);
#pragma unroll
        for (int t = 0; t < T; t++)
            if (lane == 0) m.parts[row * T + t] = own[t] * m.inner_scale[t * (p.num_chosen + 1) + p.num_chosen];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < DOWN_ROWS * T; i += THREADS) {
        const int row = i / T, t = i % T, at = chunk * DOWN_ROWS + row;
        if (at >= Memory<T, H>::K || t >= p.num_tokens) continue;
        float sum = m.parts[i];
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += m.down_parts[w * DOWN_ROWS * T + i];
        p.out[t * Memory<T, H>::K + at] = __float2bfloat16(sum);
    }
}

// From the residual to the choice, with the shared expert's inner values on the way; how many experts were chosen.
template <int T, int H>
__device__ int begin_mixture(const Mixture& p, const Memory<T, H>& m, uint64_t chosen_at) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    normalize(p, m);
    await_copies(m.of_router, 0);
    __syncthreads();
    multiply_rows(m, m.weights, m.router_rows, 8);
    __syncthreads();
    if (warp == 0) {
        for (int i = lane; i < m.router_rows * T; i += 32) {
            const int row = i / T, t = i % T, expert = blockIdx.x * m.router_rows + row;
            if (expert < p.num_experts && t < p.num_tokens)
                p.logits[t * p.num_experts + expert] = part_sum<T>(m.parts, row, 8, t) * m.x_scale[t];
        }
        __syncwarp();
        if (lane == 0) arrive(p.arrivals);
    }
    await_copies(m.of_shared, 0);
    __syncthreads();
    multiply_rows(m, m.weights + static_cast<size_t>(m.router_rows) * Memory<T, H>::K, 2 * m.pairs, 4);
    __syncthreads();
    for (int i = threadIdx.x; i < m.pairs * T; i += THREADS) {
        const int pair = i / T, t = i % T, value = blockIdx.x * m.pairs + pair;
        if (value >= INNER || t >= p.num_tokens) continue;
        const float gate = part_sum<T>(m.parts, pair, 4, t) * m.x_scale[t], up = part_sum<T>(m.parts, m.pairs + pair, 4, t) * m.x_scale[t];
        p.inner[(t * (p.num_chosen + 1) + p.num_chosen) * INNER + value] = __float2bfloat16(gated(gate, up));
    }
    __syncthreads();
    if (warp < p.num_tokens) {
        if (lane == 0) meet(p.arrivals, chosen_at);
        __syncwarp();
        choose(p, m, warp);
    }
    __syncthreads();
    const int count = list_distinct(p, m);
    __syncthreads();
    return count;
}

template <int T, int H>
__global__ void __launch_bounds__(THREADS, 1) mixture(const __grid_constant__ Mixture p) {
    constexpr int STAGES = Memory<T, H>::STAGES;
    const Memory<T, H> m(reinterpret_cast<char*>(dynamic_shared()), p.num_experts, p.num_chosen, gridDim.x);
    const int warp = threadIdx.x / 32, blocks = gridDim.x;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES + 2; i++) begin_copies(m.of_stage + i);
        announce_copies();
        fetch_fixed(p, m);
    }
    if (threadIdx.x < MAX_EXPERTS / 32) m.mask[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < T * MAX_CHOSEN * 8; i += THREADS) m.place[i] = -1;
    if (threadIdx.x < MAX_EXPERTS) m.bias[threadIdx.x] = static_cast<int>(threadIdx.x) < p.num_experts ? p.bias[threadIdx.x] : 0.0f;
    wait_for_kernels();
    const uint64_t chosen_at = next_meeting(p.arrivals, blocks), gated_at = next_meeting(p.arrivals + 1, blocks);

    const Fills<T, H> fills(begin_mixture(p, m, chosen_at));
    let_dependents_start();  // all blocks are there
    if (warp == 0)
        for (int fill = 0; fill < STAGES; fill++) fills.fetch(p, m, fill);
    else if (const int i = threadIdx.x - 32; i < 2 * fills.count)
        m.factors[i] = p.factors[m.distinct[i / 2] * 2 + i % 2];
    int fill = 0;
    for (; fill < fills.tasks; fill++) {
        multiply_task(m, fills.await(m, fill), fill % 2);
        __syncthreads();
        if (warp == 0) fills.fetch(p, m, fill + STAGES);
        finish_task(p, m, fills.task(fill), fill % 2);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        arrive(p.arrivals + 1);
        meet(p.arrivals + 1, gated_at);
    }
    __syncthreads();
    read_inner(p, m);
    __syncthreads();
    float sums[DOWN_TILES][4] = {};
    for (; fill < fills.all(); fill++) {
        const uint8_t* stage = fills.await(m, fill);
        if (fills.batch(fill) < fills.batches) {
            const int d = fills.batch(fill) * BATCH + warp / 2;
            if (d < fills.count) multiply_down(sums, p, m, stage, d);
        } else {
            finish_down(sums, p, m, stage, fills.chunk(fill));
            for (int i = 0; i < 4 * DOWN_TILES; i++) sums[i / 4][i % 4] = 0;
        }
        if (fill + 1 == fills.all()) break;
        __syncthreads();
        if (warp == 0) fills.fetch(p, m, fill + STAGES);
    }
}

}  // namespace forebay
