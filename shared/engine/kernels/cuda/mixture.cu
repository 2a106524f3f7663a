// The C side of `kernels.cuda_mixture`.
#include "mixture.cuh"

namespace forebay {

template <int T, int H>
cudaError_t run(const Mixture& p, int blocks, int most_shared, cudaStream_t stream) {
    const size_t shared = Memory<T, H>(nullptr, p.num_experts, p.num_chosen, blocks).bytes;
    if (shared > static_cast<size_t>(most_shared)) return cudaErrorInvalidValue;
    auto* kernel = mixture<T, H>;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared))) return error;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = attributes, config.numAttrs = 1;
    all_at_once(config);
    return cudaLaunchKernelEx(&config, kernel, p);
}

template <int H>
cudaError_t run(const Mixture& p, int blocks, int most_shared, cudaStream_t stream) {
    if (p.num_tokens == 1) return run<1, H>(p, blocks, most_shared, stream);
    if (p.num_tokens == 2) return run<2, H>(p, blocks, most_shared, stream);
    if (p.num_tokens <= 4) return run<4, H>(p, blocks, most_shared, stream);
    if (p.num_tokens <= 8) return run<8, H>(p, blocks, most_shared, stream);
    return cudaErrorInvalidValue;
}

}  // namespace forebay

extern "C" {

// Each returns a cudaError_t. `blocks` are no more than there are multiprocessors, of `most_shared` bytes.
int forebay_mixture(const forebay::Mixture* p, int hidden, int blocks, int most_shared, void* stream) {
    auto* s = static_cast<cudaStream_t>(stream);
    if (hidden == 2048) return forebay::run<1>(*p, blocks, most_shared, s);
    return hidden == 6144 ? forebay::run<3>(*p, blocks, most_shared, s) : cudaErrorInvalidValue;
}

const char* forebay_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
