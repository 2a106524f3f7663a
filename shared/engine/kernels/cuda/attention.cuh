// Attention within `layers.cuh`: rotating, appending to pages, and the context's splits, whose blocks merge what they found.
//
// A block has a sequence, a head of keys and a split. Its warps take 16 tokens of the pages at a time; the new tokens, which
// are in no page yet, come last, by one warp. Tokens of the first round are under way before their queries are known. A lane
// takes values that lie side by side, of queries and of keys alike, and values are turned around in registers.
#pragma once
#include "layers.cuh"

namespace forebay {

__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __uint_as_float(word & 0xFFFF0000u); }
__device__ __forceinline__ uint32_t both(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float rounded(float value) { return __bfloat162float(__float2bfloat16(value)); }

// Of four lanes each a quarter of a head: values 32 i + 8 q to 32 i + 8 q + 7.
struct Quarter {
    uint4 words[4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void load(const __nv_bfloat16* head, int q) {
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = fresh(head + i * 32 + q * 8);
    }
    __device__ __forceinline__ void store(__nv_bfloat16* head, int q) const {
#pragma unroll
        for (int i = 0; i < 4; i++) *reinterpret_cast<uint4*>(head + i * 32 + q * 8) = words[i];
    }
    // Normed, where there is a norm, and rotated by a token's angles. All four lanes.
    __device__ __forceinline__ void rotate(const float* cos, const float* sin, const __nv_bfloat16* norm, float eps, int q) {
        if (norm != nullptr) {
            float squares = 0;
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const uint32_t word = (&words[i].x)[j];
                    squares += low_half(word) * low_half(word) + high_half(word) * high_half(word);
                }
            squares += __shfl_xor_sync(~0u, squares, 1), squares += __shfl_xor_sync(~0u, squares, 2);
            const float scale = rsqrtf(squares / HEAD + eps);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 weights = *reinterpret_cast<const uint4*>(norm + i * 32 + q * 8);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint32_t& word = (&words[i].x)[j];
                    word = times(both(low_half(word) * scale, high_half(word) * scale), (&weights.x)[j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* c = cos + i * 32 + q * 8 + j * 2;
                const float* s = sin + i * 32 + q * 8 + j * 2;
                uint32_t &first = (&words[i].x)[j], &second = (&words[i + 2].x)[j];
                const float a = low_half(first), b = high_half(first), d = low_half(second), e = high_half(second);
                first = both(a * c[0] - d * s[0], b * c[1] - e * s[1]), second = both(d * c[0] + a * s[0], e * c[1] + b * s[1]);
            }
    }
};

// What a warp has found for queries g and g + 8: their highest scores, the sums of the weights and the weighted values.
struct Found {
    float best[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, values[16][4] = {};

    // 16 tokens: those of two halves, of which query g sees `limits[0]` and query g + 8 `limits[1]`.
    __device__ __forceinline__ uint4 weigh(const Quarter (&queries)[2], const Quarter (&keys)[2], const int (&limits)[2], float scale, int q) {
        float scores[2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 a = queries[0].words[i], b = queries[1].words[i], k = keys[half].words[i];
                const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
                multiply(scores[half], first, k.x, k.y), multiply(scores[half], second, k.z, k.w);
            }
        uint4 weights;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float highest = best[side];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& score = scores[half][side * 2 + i];
                    score = half * 8 + q * 2 + i < limits[side] ? score * scale : -INFINITY;
                    highest = fmaxf(highest, score);
                }
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1)), highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const float safe = highest == -INFINITY ? 0 : highest, old = exp2f(best[side] - safe);
            best[side] = highest, total[side] *= old;
#pragma unroll
            for (int n = 0; n < 16; n++) values[n][side * 2] *= old, values[n][side * 2 + 1] *= old;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float a = exp2f(scores[half][side * 2] - safe), b = exp2f(scores[half][side * 2 + 1] - safe);
                total[side] += a + b;
                (&weights.x)[half * 2 + side] = both(a, b);
            }
        }
        return weights;
    }
    __device__ __forceinline__ void add(const uint4& weights, const Quarter (&theirs)[2]) {
        const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                multiply(values[i * 4 + j], a, transposed((&theirs[0].words[i].x)[j]), transposed((&theirs[1].words[i].x)[j]));
    }
};

__device__ inline void Worker::attend(const Layer& layer, int layer_index) {
    const int group = p.num_q / p.num_kv, num_queries = p.width * group, all_heads = p.num_q + 2 * p.num_kv;
    if (!split.is_there) {
        wait();
        done();
        return;
    }
    __nv_bfloat16* pages = p.kv + layer_index * p.layer_stride + split.head * p.head_stride;
    const auto place = [&](int page, int token) { return pages + page * p.page_stride + token % p.page_size * HEAD; };
    const auto load = [&](Quarter (&into)[2], const __nv_bfloat16* const (&from)[2], int64_t kind) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            into[half].clear();
            if (from[half] != nullptr) into[half].load(from[half] + kind, q);
        }
    };
    const __nv_bfloat16* from[2];
    const auto find = [&](int base) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = base + half * 8 + g;
            from[half] = token < split.last ? place(token < WARPS * 16 + split.first ? first_pages[half] : split.table[token / p.page_size], token) : nullptr;
        }
    };
    Quarter keys[2], values[2], queries[2];
    int base = split.first + warp * 16;
    bool has_new = split.index == p.splits - 1 && warp == WARPS - 1;
    find(base);
    load(keys, from, 0), load(values, from, p.kind_stride);
    wait();
    const auto row = [&](int token, int of_head) {
        return p.qkv + (static_cast<int64_t>(split.sequence * p.width + token) * all_heads + of_head) * HEAD;
    };
    const auto rotate = [&](Quarter& what, int token, const __nv_bfloat16* norm) {
        const int angles = (split.sequence * p.width + token) * (HEAD / 2);
        what.rotate(shared.cos + angles, shared.sin + angles, norm, p.eps, q);
    };
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const int query = g + side * 8, token = query < num_queries ? query / group : 0;
        queries[side].clear();
        if (query < num_queries) queries[side].load(row(token, split.head * group + query % group), q);
        if (side * 8 < num_queries) rotate(queries[side], token, layer.q_norm);
    }
    const float scale = 1.4426950408889634f * rsqrtf(static_cast<float>(HEAD));  // to base 2
    Found found;
#pragma unroll 1
    for (;;) {
        int limits[2] = {split.last - base, split.last - base};
        if (base >= split.last) {
            if (!has_new) break;
            has_new = false;
            const int token = g < p.width ? g : 0;
            keys[0].clear(), values[0].clear(), keys[1].clear(), values[1].clear();
            if (g < p.width) {
                keys[0].load(row(token, p.num_q + split.head), q);
                values[0].load(row(token, p.num_q + p.num_kv + split.head), q);
            }
            rotate(keys[0], token, layer.k_norm);
            if (new_slot >= 0) {
                __nv_bfloat16* to = place(new_slot / p.page_size, new_slot);
                keys[0].store(to, q), values[0].store(to + p.kind_stride, q);
            }
#pragma unroll
            for (int side = 0; side < 2; side++) limits[side] = min(p.width, (g + side * 8) / group + 1);
        }
        const uint4 weights = found.weigh(queries, keys, limits, scale, q);
        base += WARPS * 16;
        find(base);
        load(keys, from, 0);
        found.add(weights, values);
        load(values, from, p.kind_stride);
    }
    // Of all warps.
#pragma unroll
    for (int side = 0; side < 2; side++) {
        float& total = found.total[side];
        total += __shfl_xor_sync(~0u, total, 1), total += __shfl_xor_sync(~0u, total, 2);
        const int at_query = warp * MAX_QUERIES + g + side * 8;
        if (q == 0) shared.maxima[at_query] = found.best[side], shared.sums[at_query] = total;
    }
    const auto place_of = [&](int query) {  // among the step's queries
        return static_cast<int64_t>(split.sequence * p.width + query / group) * p.num_q + split.head * group + query % group;
    };
#pragma unroll
    for (int begin = 0; begin < MAX_QUERIES; begin += MERGED) {
        if (begin >= num_queries) break;
        if (g / MERGED == begin % 8 / MERGED) {
            float* to = shared.parts + (warp * MERGED + g % MERGED) * MERGED_STRIDE + q * 8;
#pragma unroll
            for (int n = 0; n < 16; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) to[n / 4 * 32 + n % 4 * 2 + i] = found.values[n][begin / 8 * 2 + i];
        }
        meet<THREADS>();
        const int query = begin + thread / (THREADS / MERGED), value = thread % (THREADS / MERGED) * 2;
        if (query < num_queries) {
            float best = -INFINITY, total = 0, sum[2] = {0, 0};
#pragma unroll
            for (int w = 0; w < WARPS; w++) best = fmaxf(best, shared.maxima[w * MAX_QUERIES + query]);
            const float safe = best == -INFINITY ? 0 : best;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float weight = exp2f(shared.maxima[w * MAX_QUERIES + query] - safe);
                const float* theirs = shared.parts + (w * MERGED + query - begin) * MERGED_STRIDE + value;
                total += weight * shared.sums[w * MAX_QUERIES + query];
                sum[0] += weight * theirs[0], sum[1] += weight * theirs[1];
            }
            const int64_t to = place_of(query) * p.splits + split.index;
            if (value == 0) p.maxima[to] = best, p.sums[to] = total;
            p.parts[to * HEAD + value] = sum[0], p.parts[to * HEAD + value + 1] = sum[1];
        }
        meet<THREADS>();
    }
    // Of all splits: their blocks wait for one another, and each merges some of the values.
    if (thread == 0) {
        uint32_t* counter = p.counters + 1 + split.sequence * p.num_kv + split.head;
        count(counter);
        wait_until(counter, (layer_index + 1) * p.splits);
    }
    meet<THREADS>();
    const int each = (num_queries * HEAD + p.splits - 1) / p.splits, end = min((split.index + 1) * each, num_queries * HEAD);
    for (int i = split.index * each + thread; i < end; i += THREADS) {
        const int64_t to = place_of(i / HEAD);
        float maxima[MAX_SPLITS], sums[MAX_SPLITS], parts[MAX_SPLITS], best = -INFINITY, total = 0, sum = 0;
#pragma unroll
        for (int s = 0; s < MAX_SPLITS; s++) {
            const bool used = s < p.splits;
            maxima[s] = used ? fresh(p.maxima + to * p.splits + s) : -INFINITY;
            sums[s] = used ? fresh(p.sums + to * p.splits + s) : 0;
            parts[s] = used ? fresh(p.parts + (to * p.splits + s) * HEAD + i % HEAD) : 0;
        }
#pragma unroll
        for (int s = 0; s < MAX_SPLITS; s++) best = fmaxf(best, maxima[s]);
#pragma unroll
        for (int s = 0; s < MAX_SPLITS; s++) {
            const float weight = exp2f(maxima[s] - best);
            total += weight * sums[s], sum += weight * parts[s];
        }
        p.attended[to * HEAD + i % HEAD] = __float2bfloat16(sum / total);
    }
    done();
}

__global__ void __launch_bounds__(ALL_THREADS, 1) decode_layers(const __grid_constant__ Step p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const Shared shared(p);
    for (int i = threadIdx.x; i < p.num_layers * static_cast<int>(sizeof(Layer) / sizeof(void*)); i += ALL_THREADS)
        reinterpret_cast<void**>(shared.layers)[i] = reinterpret_cast<void* const*>(p.layers)[i];
    for (int i = threadIdx.x; i < p.num_sequences * p.width * (HEAD / 2); i += ALL_THREADS) shared.cos[i] = p.cos[i], shared.sin[i] = p.sin[i];
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.depth; i++) signal_init(&shared.full[i], 1), signal_init(&shared.empty[i], WARPS);
        signals_ready();
    }
    __syncthreads();
    const int rows[4] = {(p.num_q + 2 * p.num_kv) * HEAD, p.hidden, 2 * p.inner_size, p.hidden};
    const int columns[4] = {p.hidden, p.num_q * HEAD, p.hidden, p.inner_size};
    if (threadIdx.x >= THREADS) {
        Cursor at, behind;
        int num_brought = 0;
        for (int i = 0; i < (threadIdx.x == THREADS ? p.num_layers : 0); i++) {
            const Layer& layer = shared.layers[i];
            bring(layer.qkv, Share(rows[QKV], columns[QKV]), false, shared, p.depth, at, behind, num_brought);
            bring(layer.output, Share(rows[OUTPUT], columns[OUTPUT]), false, shared, p.depth, at, behind, num_brought);
            bring(layer.gate_up, Share(rows[GATE_UP], columns[GATE_UP]), false, shared, p.depth, at, behind, num_brought);
            bring(layer.down, Share(rows[DOWN], columns[DOWN]), true, shared, p.depth, at, behind, num_brought);
        }
    } else {
        Worker worker(p, shared);
        worker.begin();
#pragma unroll 1
        for (int i = 0; i < p.num_layers; i++) {
            const Layer& layer = shared.layers[i];
#pragma unroll 1
            for (int part = QKV; part < DOWN; part++) {
                const Matrix& matrix = part == QKV ? layer.qkv : part == OUTPUT ? layer.output : layer.gate_up;
                const __nv_bfloat16* norm = part == QKV ? layer.input_norm : part == OUTPUT ? nullptr : layer.post_norm;
                if (part == OUTPUT) worker.attend(layer, i);
                worker.held(static_cast<Part>(part), matrix, part == OUTPUT ? p.attended : p.x, norm, rows[part], columns[part]);
            }
            worker.flowing(DOWN, layer.down, p.inner, rows[DOWN], columns[DOWN]);
        }
        // Whoever is last leaves the counters as they were.
        if (threadIdx.x == 0 && counted(p.counters) == worker.met + gridDim.x - 1)
            for (int i = 0; i <= p.num_sequences * p.num_kv; i++) p.counters[i] = 0;
    }
#endif
}

}  // namespace forebay
