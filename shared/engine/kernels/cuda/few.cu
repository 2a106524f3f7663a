// The C side of `kernels.cuda_few`.
#include "few.cuh"
#include "launch.cuh"

namespace forebay {

template <int S, int R>
cudaError_t run(const Few& p, bool early, cudaStream_t stream) {
    const auto bytes = reinterpret_cast<size_t>(Room<S, R>(nullptr, p.num_batches, p.num_tokens).end);
    return launch_together(few<S, R>, FEW_BLOCKS, FEW_THREADS, bytes, early, stream, p);
}

template <int S>
cudaError_t run(const Few& p, bool early, cudaStream_t stream) {
    if (p.inner == 2 * FEW_BLOCKS) return run<S, 2>(p, early, stream);
    return p.inner == 4 * FEW_BLOCKS ? run<S, 4>(p, early, stream) : cudaErrorInvalidValue;
}

}  // namespace forebay

extern "C" {

// Returns a cudaError_t.
int forebay_few(const forebay::Few* p, int early, void* stream) {
    using namespace forebay;
    auto* s = static_cast<cudaStream_t>(stream);
    if (p->num_tokens < 1 || p->num_tokens > FEW_TOKENS || p->scoring.num_chosen != MAX_CHOSEN || p->scoring.num_experts > MAX_EXPERTS) return cudaErrorInvalidValue;
    if (p->num_batches < 2 || p->num_batches > MOST_BATCHES) return cudaErrorInvalidValue;
    if (p->hidden == 2048) return run<1>(*p, early, s);
    return p->hidden == 6144 ? run<3>(*p, early, s) : cudaErrorInvalidValue;
}
}
