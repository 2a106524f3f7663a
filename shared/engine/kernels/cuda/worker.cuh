// The products of `layers.cu`: what the warps that multiply do.
#pragma once
#include "step.cuh"

namespace forebay {

// A word of two bf16 times a word of norms, each rounded; adds up the squares of what it was.
__device__ __forceinline__ uint32_t weighed(uint32_t word, uint32_t norm, float& squares) {
    const float low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xFFFF0000u);
    squares += low * low + high * high;
    return times(word, norm);
}

// One consumer's view of a step: the warps that multiply.
struct Worker {
    const Step& p;
    Shared& shared;
    int thread, warp, lane, g, q, num_tokens;
    uint32_t met;  // what the blocks' counter is once all are here

    __device__ Worker(uint32_t met)
        : p(Shared::here().step), shared(Shared::here()), thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4),
          q(lane % 4), num_tokens(p.num_sequences * p.width), met(met) {}

    // What is the same in all layers.
    __device__ void begin() {
        for (int part = 0; part < NUM_PARTS; part++) {
            const Share& share = shared.shares[part];
            const int rows = share.count * (part == GATE_UP ? ROWS / 2 : ROWS);
            shared.places[part][thread] = rows && thread < THREADS / rows * rows ? thread % rows | thread / rows << 8 : NOBODYS;
        }
        if (lane == 0) shared.taken[warp] = {0, 0};
        for (int i = thread; i < p.num_layers * static_cast<int>(sizeof(Layer) / sizeof(void*)); i += THREADS)
            reinterpret_cast<void**>(Shared::at(p.layers_at))[i] = reinterpret_cast<void* const*>(p.layers)[i];
        const int num_angles = num_tokens * (HEAD / 2);
        for (int i = thread; i < num_angles; i += THREADS) angles()[i] = p.cos[i], angles()[num_angles + i] = p.sin[i];
        const int row = shared.places[OUTPUT][thread] & 255, of = shared.places[OUTPUT][thread] >> 8;
        if (of < num_tokens) shared.kept[thread] = __bfloat162float(p.x[static_cast<int64_t>(of) * p.hidden + shared.shares[OUTPUT].first * ROWS + row]);
        meet<THREADS>();
        const Split& split = shared.split;
        if (!split.is_there) return;
        const int token = split.first + warp * TOKENS + g;
        shared.first_pages[thread] = token < min(split.last, split.old) ? split.table[token / p.page_size] : 0;
        if (thread < p.width) shared.new_slots[thread] = p.slots[split.sequence * p.width + thread];
        meet<THREADS>();
    }
    __device__ __forceinline__ float* angles() const { return reinterpret_cast<float*>(Shared::at(p.angles_at)); }
    __device__ __forceinline__ float* merging() const { return reinterpret_cast<float*>(Shared::at(p.x_at)); }
    __device__ __forceinline__ float* parts() const { return reinterpret_cast<float*>(Shared::at(p.parts_at)); }
    __device__ __forceinline__ const Layer& layer(int index) const { return reinterpret_cast<const Layer*>(Shared::at(p.layers_at))[index]; }

    __device__ __forceinline__ void wait() const {
        if (thread == 0) wait_until(p.counters, met);
        meet<THREADS>();
    }
    __device__ __forceinline__ void done() {
        meet<THREADS>();
        if (thread == 0) count(p.counters);
    }

    // Which of a share's rows and tokens a thread finishes: `row`, and tokens from `token` on. Nothing is done yet with what is
    // loaded, so that nobody waits for it.
    struct Ending {
        int row, token;
        float factor[2];
        __nv_bfloat16 bias[2];
        __device__ Ending(const Matrix& matrix, const Share& share, int place, bool is_gated) : row(place & 255), token(place >> 8) {
            factor[0] = factor[1] = 0, bias[0] = bias[1] = __float2bfloat16(0);
            if (place == NOBODYS) return;
            const int of_all = share.first * (is_gated ? ROWS / 2 : ROWS) + row, half = share.num_rows / 2;
            factor[0] = matrix.factors[of_all];
            if (is_gated) factor[1] = matrix.factors[of_all + half];
            if (matrix.bias == nullptr) return;
            bias[0] = matrix.bias[of_all];
            if (is_gated) bias[1] = matrix.bias[of_all + half];
        }
    };

    // A tile's sums of tokens 2 q and 2 q + 1, rows g and g + 8.
    __device__ __forceinline__ void store(const float (&sums)[4][4], float* to, int rows) const {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (q * 2 + i % 2 < num_tokens) to[i % 2 * rows + i / 2 * 8] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    }

    // Adds up what all warps have found, and writes it.
    __device__ void finish(int part, const Ending& end, const Share& share) {
        const bool is_gated = part == GATE_UP, is_normed = part == QKV || part == GATE_UP;
        const int rows = share.count * ROWS, stride = rows ? THREADS / (is_gated ? rows / 2 : rows) : 1;
        meet<THREADS>();
        for (int n = end.token; n < num_tokens; n += stride) {
            float scale = 1, value[2] = {0, 0};
            if (is_normed) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += shared.squares[w][n];
                scale = rsqrtf(total / share.num_columns + p.eps);
            }
            const int local = is_gated ? end.row / 8 * ROWS + end.row % 8 : end.row;
#pragma unroll
            for (int side = 0; side < 2; side++) {
                if (side && !is_gated) break;
#pragma unroll
                for (int w = 0; w < WARPS; w++) value[side] += parts()[(w * num_tokens + n) * rows + local + side * 8];
                value[side] = value[side] * scale * (end.factor[side] * Packed::FACTOR) + __bfloat162float(end.bias[side]);
            }
            if (part == QKV) {
                p.qkv[static_cast<int64_t>(n) * share.num_rows + share.first * ROWS + end.row] = __float2bfloat16(value[0]);
            } else if (part == GATE_UP) {
                p.inner[static_cast<int64_t>(n) * p.inner_size + share.first * 8 + end.row] = __float2bfloat16(gated(value[0], value[1]));
            } else {
                const __nv_bfloat16 sum = __float2bfloat16(shared.kept[thread] + value[0]);
                shared.kept[thread] = __bfloat162float(sum);
                p.x[static_cast<int64_t>(n) * p.hidden + share.first * ROWS + end.row] = sum;
            }
        }
        done();
    }

    __device__ __forceinline__ __nv_bfloat16* staged(int token) const {
        return reinterpret_cast<__nv_bfloat16*>(Shared::at(p.x_at)) + (warp * num_tokens + token) * p.x_stride;
    }
    // Of a lane's eight columns of a chunk.
    __device__ __forceinline__ int step_of(int group) const { return group * CHUNK_STEPS + lane / 16 * WARPS + warp; }
    __device__ __forceinline__ int column_of(int group) const { return step_of(group) * Packed::COLUMNS + lane % 16 * 8; }
    // Brings a warp's columns of N tokens and G chunks into shared memory, times a norm's weights where there is one, and adds up
    // squares. What lies behind the last step is zero.
    template <int N, int G>
    __device__ __forceinline__ void stage(int token, int group, const __nv_bfloat16* input, const __nv_bfloat16* norm, const Share& share,
                                          float (&squares)[MAX_ROWS]) const {
        uint4 values[N][G], weights[G];
#pragma unroll
        for (int i = 0; i < G; i++) {
            weights[i] = make_uint4(0, 0, 0, 0);
            if (norm != nullptr && step_of(group + i) < share.steps) weights[i] = fresh(norm + column_of(group + i));
#pragma unroll
            for (int n = 0; n < N; n++) {
                values[n][i] = make_uint4(0, 0, 0, 0);
                if (token + n < num_tokens && step_of(group + i) < share.steps)
                    values[n][i] = fresh(input + static_cast<int64_t>(token + n) * share.num_columns + column_of(group + i));
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (token + n >= num_tokens) break;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < G; i++) {
                if (group + i >= share.groups) break;
                uint4 v = values[n][i];
                const uint4 w = weights[i];
                if (norm != nullptr) v = make_uint4(weighed(v.x, w.x, sum), weighed(v.y, w.y, sum), weighed(v.z, w.z, sum), weighed(v.w, w.w, sum));
                *reinterpret_cast<uint4*>(staged(token + n) + (group + i) * GROUP_VALUES + lane * 8) = v;
            }
#pragma unroll
            for (int of = 0; of < MAX_ROWS; of++) squares[of] += token + n == of ? sum : 0;
        }
    }

    // A product, tile after tile; the next chunk is taken before this one is multiplied. `norm`: or none.
    __device__ void product(int part, const Matrix& matrix, const __nv_bfloat16* input, const __nv_bfloat16* norm) {
        const Share share = shared.shares[part];
        const Ending end(matrix, share, shared.places[part][thread], part == GATE_UP);
        if (norm != nullptr)
            for (int group = 0; group < share.groups; group++)
                if (step_of(group) < share.steps) expect_soon(norm + column_of(group));
        wait();
        float squares[MAX_ROWS] = {};
        if (share.groups <= FEW) {
            stage<MAX_ROWS, FEW>(0, 0, input, norm, share, squares);
        } else {
#pragma unroll 1
            for (int n = 0; n < num_tokens; n++)
#pragma unroll 1
                for (int group = 0; group < share.groups; group += AT_ONCE) stage<1, AT_ONCE>(n, group, input, norm, share, squares);
        }
        __syncwarp();
        if (norm != nullptr) {
#pragma unroll
            for (int n = 0; n < MAX_ROWS; n++) {
                if (n >= num_tokens) break;
                for (int i = 16; i; i /= 2) squares[n] += __shfl_xor_sync(~0u, squares[n], i);
                if (lane == 0) shared.squares[warp][n] = squares[n];
            }
        }
        const int num_chunks = share.count * share.groups;
        float sums[4][4] = {};
        Taken taken;
        Cursor at = shared.taken[warp];
        const int depth = p.depth, rows = share.count * ROWS;
        // What the tensor cores take of a token's columns. Lanes beyond the tokens bring some, and what comes of it is not used.
        const __nv_bfloat16* own = staged(g < num_tokens ? g : 0) + Packed::column(0, 0, 0, q);
        float* to = parts() + (warp * num_tokens + q * 2) * rows + g;
        if (num_chunks) taken.take(depth, at, warp, lane);
        int group = 0;
#pragma unroll 2
        for (int i = 0; i < num_chunks; i++) {
            uint4 x[2][4];
#pragma unroll
            for (int u = 0; u < 2; u++)
#pragma unroll
                for (int piece = 0; piece < 4; piece++)
                    x[u][piece] = *reinterpret_cast<const uint4*>(own + group * GROUP_VALUES + Packed::column(u, piece / 2, piece % 2, 0));
            const Taken now = taken;
            if (i + 1 < num_chunks) taken.take(depth, at, warp, lane);
#pragma unroll
            for (int piece = 0; piece < 4; piece++)
#pragma unroll
                for (int u = 0; u < 2; u++) {
                    uint32_t a[2][4];
                    now.steps[u].operands(piece / 2, piece % 2, a);
                    multiply(sums[u * 2], a[0], x[u][piece].x, x[u][piece].y), multiply(sums[u * 2 + 1], a[1], x[u][piece].z, x[u][piece].w);
                }
            if (++group < share.groups) continue;
            store(sums, to, rows);
            to += ROWS, group = 0;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int k = 0; k < 4; k++) sums[n][k] = 0;
        }
        __syncwarp();
        if (lane == 0) shared.taken[warp] = at;
        finish(part, end, share);
    }

    template <int SIDES>
    __device__ void attend(const Layer& layer, int index);
};

}  // namespace forebay
