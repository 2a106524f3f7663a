// All layers of a decode step in one kernel: a block on each multiprocessor from the first product to the last.
//
// A step of few tokens is bound by reading weights, and weights depend on nothing. So a warp of each block does nothing but
// copy its block's share of them into a ring in shared memory, product after product and layer after layer, as far ahead as
// the ring is long; the others multiply what has come. Between products all blocks wait for one another, and meanwhile
// memory goes on: that is what separate kernels cannot have.
//
// A layer is five parts: queries, keys and values; attention; its output, added to the residual stream; gate and up; down,
// added. Each block has the same tiles of 16 rows in every layer. What a block adds to the residual stream it keeps.
// Weights lie as `w4a16.pack` lays them out, for a tile's columns are one span of bytes there.
#include "attention.cuh"

#include <algorithm>

namespace forebay {

// Neither is a part of the kernel, for whose registers there would be too much that all of them share.
__noinline__ __device__ void multiply_part(int layer_index, int part, uint32_t met) {
    Worker worker(met);
    const Step& p = worker.p;
    const Layer& layer = worker.layer(layer_index);
    const Matrix& matrix = part == QKV ? layer.qkv : part == OUTPUT ? layer.output : part == GATE_UP ? layer.gate_up : layer.down;
    const __nv_bfloat16* input = part == OUTPUT ? p.attended : part == DOWN ? p.inner : p.x;
    const __nv_bfloat16* norm = part == QKV ? layer.input_norm : part == GATE_UP ? layer.post_norm : nullptr;
    worker.product(part, matrix, input, norm);
}
template <int SIDES>
__noinline__ __device__ void attend_part(int layer_index, uint32_t met) {
    Worker worker(met);
    worker.attend<SIDES>(worker.layer(layer_index), layer_index);
}

__global__ void __launch_bounds__(ALL_THREADS, 1) decode_layers(const __grid_constant__ Step p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    Shared& shared = Shared::here();
    if (threadIdx.x == 0) {
        const int heads = p.num_q * HEAD;
        shared.step = p;
        shared.split.find(p);
        shared.shares[QKV].find(heads + 2 * p.num_kv * HEAD, p.hidden), shared.shares[OUTPUT].find(p.hidden, heads);
        shared.shares[GATE_UP].find(2 * p.inner_size, p.hidden), shared.shares[DOWN].find(p.hidden, p.inner_size);
        for (int i = 0; i < p.depth; i++) signal_init(&shared.full[i], 1), signal_init(&shared.empty[i], WARPS);
        signals_ready();
    }
    // Scales that no chunk brings, where a matrix's last is a short one, must not make codes infinite.
    for (int i = threadIdx.x; i < p.depth * CHUNK_STEPS * STEP_SCALES / 4; i += ALL_THREADS)
        reinterpret_cast<uint32_t*>(Shared::chunk(i / (CHUNK_STEPS * STEP_SCALES / 4)) + CHUNK_CODES)[i % (CHUNK_STEPS * STEP_SCALES / 4)] = 0;
    copies_follow();
    __syncthreads();
    if (threadIdx.x == THREADS) {
        Cursor at{0, 0}, behind{0, 0};
        int num_brought = 0;
        for (int i = 0; i < p.num_layers; i++) {
            const Layer& layer = p.layers[i];
            bring(layer.qkv, shared.shares[QKV], p.depth, at, behind, num_brought);
            bring(layer.output, shared.shares[OUTPUT], p.depth, at, behind, num_brought);
            bring(layer.gate_up, shared.shares[GATE_UP], p.depth, at, behind, num_brought);
            bring(layer.down, shared.shares[DOWN], p.depth, at, behind, num_brought);
        }
    } else if (threadIdx.x < THREADS) {
        Worker(0).begin();
        const bool is_narrow = p.width * (p.num_q / p.num_kv) <= 8;
        uint32_t met = 0;
#pragma unroll 1
        for (int i = 0; i < p.num_layers; i++) {
            multiply_part(i, QKV, met);
            if (is_narrow) attend_part<1>(i, met + gridDim.x);
            else attend_part<2>(i, met + gridDim.x);
            for (int part = OUTPUT; part <= DOWN; part++) multiply_part(i, part, met + (part + 1) * gridDim.x);
            met += 5 * gridDim.x;
        }
        // Whoever is last leaves the counters as they were.
        if (threadIdx.x == 0 && counted(p.counters) == met + gridDim.x - 1)
            for (int i = 0; i <= p.num_sequences * p.num_kv; i++) p.counters[i] = 0;
    }
#endif
}

}  // namespace forebay

using forebay::Step;

extern "C" {

// Whether a block of the current device can have as much shared memory as a step takes.
int forebay_layers_fit() {
    int device = 0, num_bytes = 0;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&num_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return 0;
    return num_bytes >= forebay::MAX_SHARED_BYTES;
}

// Lays a block's shared memory out, with as long a ring as fits, and runs a step; `num_parts` floats are added up at once.
// Returns a cudaError_t.
int forebay_layers(Step* p, int num_blocks, int num_parts, void* stream) {
    using namespace forebay;
    const int num_tokens = p->num_sequences * p->width, most = std::max(std::max(p->hidden, p->inner_size), p->num_q * HEAD);
    const int columns = CHUNK_STEPS * Packed::COLUMNS, layers = p->num_layers * static_cast<int>(sizeof(Layer));
    p->x_stride = (most + columns - 1) / columns * GROUP_VALUES + PADDING;
    const int x_bytes = std::max(WARPS * num_tokens * p->x_stride * 2, MERGED_BYTES), parts_bytes = num_parts * 4, angles_bytes = num_tokens * HEAD * 4;
    const int others = RING_AT + x_bytes + parts_bytes + angles_bytes + layers;
    p->depth = std::min(p->depth, (MAX_SHARED_BYTES - others) / CHUNK_BYTES);
    if (p->depth < UNDER_WAY) return cudaErrorInvalidValue;
    p->x_at = RING_AT + p->depth * CHUNK_BYTES, p->parts_at = p->x_at + x_bytes, p->angles_at = p->parts_at + parts_bytes;
    p->layers_at = p->angles_at + angles_bytes;
    const int num_bytes = others + p->depth * CHUNK_BYTES;
    const cudaError_t error = cudaFuncSetAttribute(decode_layers, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;  // all blocks at once
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(num_blocks), config.blockDim = dim3(ALL_THREADS), config.dynamicSmemBytes = num_bytes;
    config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, decode_layers, *p);
}
}
