// The choice of tokens of sparse attention as one call, for layers whose other parts are computed elsewhere.
#include "choosing.h"

namespace forebay {

template <class T> void choose(const Choosing& choosing, Team& team) {
    choosing.begin();
    const auto work = [&](int thread) { Chooser<T>(choosing, thread).run(); };
    choosing.num_units() == 1 ? work(0) : team.run(work);
}

}  // namespace forebay

using namespace forebay;

extern "C" {

int64_t forebay_index_workspace_bytes(const IndexStep* step, const Team* team) {
    return Choosing(*step, team->size).num_bytes;
}

void forebay_index_choose(const IndexStep* step, Team* team) {
    const Choosing choosing(*step, team->size);
    step->q_is_bf16 ? choose<bf16>(choosing, *team) : choose<float>(choosing, *team);
}
}
