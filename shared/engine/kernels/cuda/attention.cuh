// Attention of `layers.cu`: rotating, appending to pages, and the context's splits, whose blocks merge what they found.
//
// A block has a sequence, a head of keys and a split. Its warps take eight tokens at a time. Those in pages are under way before
// the first queries are known; new ones are rotated, and written to their pages, by who attends to them. A lane takes values
// that lie side by side, of queries and of keys alike, and values are turned around in registers.
#pragma once
#include "worker.cuh"

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

// What a warp has found for queries g and, of two sides, g + 8: their highest scores, the sums of the weights and the weighted
// values.
template <int SIDES>
struct Found {
    float best[SIDES], total[SIDES] = {}, values[16][SIDES * 2] = {};

    __device__ __forceinline__ Found() {
        for (int side = 0; side < SIDES; side++) best[side] = -INFINITY;
    }
    // Eight tokens, of which a query sees those below its limit: two weights for each side.
    __device__ __forceinline__ void weigh(const Quarter (&queries)[SIDES], const Quarter& keys, const int (&limits)[SIDES], float scale, int q,
                                          uint32_t (&weights)[2]) {
        float scores[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 low = queries[0].words[i], high = SIDES > 1 ? queries[SIDES - 1].words[i] : make_uint4(0, 0, 0, 0), k = keys.words[i];
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
            multiply(scores, first, k.x, k.y), multiply(scores, second, k.z, k.w);
        }
        weights[1] = 0;
#pragma unroll
        for (int side = 0; side < SIDES; side++) {
            float highest = best[side];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[side * 2 + i];
                score = q * 2 + i < limits[side] ? score * scale : -INFINITY;
                highest = fmaxf(highest, score);
            }
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1)), highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const float safe = highest == -INFINITY ? 0 : highest, old = exp2f(best[side] - safe);
            const float one = exp2f(scores[side * 2] - safe), two = exp2f(scores[side * 2 + 1] - safe);
            best[side] = highest, total[side] = total[side] * old + (one + two), weights[side] = both(one, two);
#pragma unroll
            for (int n = 0; n < 16; n++) values[n][side * 2] *= old, values[n][side * 2 + 1] *= old;
        }
    }
    __device__ __forceinline__ void add(const uint32_t (&weights)[2], const Quarter& theirs) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float sums[4] = {};
                float (&own)[SIDES * 2] = values[i * 4 + j];
#pragma unroll
                for (int k = 0; k < SIDES * 2; k++) sums[k] = own[k];
                multiply_eight(sums, weights, transposed((&theirs.words[i].x)[j]));
#pragma unroll
                for (int k = 0; k < SIDES * 2; k++) own[k] = sums[k];
            }
    }
};

template <int SIDES>
__device__ inline void Worker::attend(const Layer& layer, int layer_index) {
    const int group = p.num_q / p.num_kv, num_queries = p.width * group, all_heads = p.num_q + 2 * p.num_kv;
    const Split& split = shared.split;
    if (!split.is_there) {
        wait();
        done();
        return;
    }
    __nv_bfloat16* pages = p.kv + layer_index * p.layer_stride + split.head * p.head_stride;
    const auto place = [&](int page, int token) { return pages + page * p.page_stride + token % p.page_size * HEAD; };
    const auto row = [&](int token, int of_head) {
        return p.qkv + (static_cast<int64_t>(split.sequence * p.width + token) * all_heads + of_head) * HEAD;
    };
    const __nv_bfloat16 *key, *value;  // of a lane's token
    const auto find = [&](int base) {
        const int token = base + g;
        key = value = nullptr;
        if (token >= split.last) return;
        if (token < split.old) {
            key = place(base < split.first + WARPS * TOKENS ? shared.first_pages[thread] : split.table[token / p.page_size], token);
            value = key + p.kind_stride;
        } else {
            key = row(token - split.old, p.num_q + split.head), value = key + p.num_kv * HEAD;
        }
    };
    Quarter keys, values, queries[SIDES];
    int base = split.first + warp * TOKENS;
    find(base);
    keys.clear(), values.clear();
    const bool is_early = base + g < split.old;
    if (key != nullptr && is_early) keys.load(key, q), values.load(value, q);
    wait();
    if (key != nullptr && !is_early) keys.load(key, q), values.load(value, q);
    const auto rotate = [&](Quarter& what, int token, const __nv_bfloat16* norm) {
        const int of = (split.sequence * p.width + token) * (HEAD / 2);
        what.rotate(angles() + of, angles() + num_tokens * (HEAD / 2) + of, norm, p.eps, q);
    };
#pragma unroll
    for (int side = 0; side < SIDES; side++) {
        const int query = g + side * 8, token = query < num_queries ? query / group : 0;
        queries[side].clear();
        if (query < num_queries) queries[side].load(row(token, split.head * group + query % group), q);
        rotate(queries[side], token, layer.q_norm);
    }
    const float scale = 1.4426950408889634f * rsqrtf(static_cast<float>(HEAD));  // to base 2
    Found<SIDES> found;
#pragma unroll 1
    for (; base < split.last; base += WARPS * TOKENS) {
        const int token = base + g;
        if (base + TOKENS > split.old) {  // there are new ones
            Quarter turned = keys;
            const bool is_new = token >= split.old && token < split.last;
            rotate(turned, is_new ? token - split.old : 0, layer.k_norm);
            const int slot = is_new ? shared.new_slots[token - split.old] : -1;
            if (is_new) keys = turned;
            if (slot >= 0) {
                __nv_bfloat16* to = place(slot / p.page_size, slot);
                keys.store(to, q), values.store(to + p.kind_stride, q);
            }
        }
        int limits[SIDES];
#pragma unroll
        for (int side = 0; side < SIDES; side++) limits[side] = min(split.last, split.old + (g + side * 8) / group + 1) - base;
        uint32_t weights[2];
        found.weigh(queries, keys, limits, scale, q, weights);
        find(base + WARPS * TOKENS);
        keys.clear();
        if (key != nullptr) keys.load(key, q);
        found.add(weights, values);
        values.clear();
        if (value != nullptr) values.load(value, q);
    }
    // Of all warps.
    float* merged = merging();
#pragma unroll
    for (int side = 0; side < SIDES; side++) {
        float& total = found.total[side];
        total += __shfl_xor_sync(~0u, total, 1), total += __shfl_xor_sync(~0u, total, 2);
        if (q == 0) shared.maxima[warp][g + side * 8] = found.best[side], shared.sums[warp][g + side * 8] = total;
    }
    const auto place_of = [&](int query) {  // among the step's queries
        return static_cast<int64_t>(split.sequence * p.width + query / group) * p.num_q + split.head * group + query % group;
    };
#pragma unroll
    for (int begin = 0; begin < SIDES * 8; begin += MERGED) {
        if (begin >= num_queries) break;
        if (g / MERGED == begin % 8 / MERGED) {
            float* to = merged + (warp * MERGED + g % MERGED) * MERGED_STRIDE + q * 8;
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
            for (int w = 0; w < WARPS; w++) best = fmaxf(best, shared.maxima[w][query]);
            const float safe = best == -INFINITY ? 0 : best;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float weight = exp2f(shared.maxima[w][query] - safe);
                const float* theirs = merged + (w * MERGED + query - begin) * MERGED_STRIDE + value;
                total += weight * shared.sums[w][query];
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

}  // namespace forebay
