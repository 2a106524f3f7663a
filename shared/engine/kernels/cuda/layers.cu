// The C side of `kernels.cuda_layers`.
#include "attention.cuh"

using forebay::Step;

extern "C" {

// Returns a cudaError_t. A block has `num_bytes` of shared memory, as struct Shared lays it out.
int forebay_layers(const Step* p, int num_blocks, int num_bytes, void* stream) {
    const cudaError_t error = cudaFuncSetAttribute(forebay::decode_layers, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;  // all blocks at once
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(num_blocks), config.blockDim = dim3(forebay::ALL_THREADS), config.dynamicSmemBytes = num_bytes;
    config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, forebay::decode_layers, *p);
}
}
