// The threads that compute steps, kept from step to step.
//
// Not OpenMP: its threads spin for milliseconds after each step and take the processor from the very processes that feed
// the next one, and its join waits for threads that have not even woken up. Here a thread spins for as long as waking it
// would take, then sleeps, and one that is late for a step misses it.
#pragma once
#include <functional>
#include <thread>
#include <vector>

#include "share.h"

namespace forebay {

class Team {
  public:
    // The caller of `run` is one of the threads.
    explicit Team(int size) : size(size) {
        for (int thread = 1; thread < size; thread++) threads.emplace_back([this, thread] { serve(thread); });
    }

    ~Team() {
        ending = true;
        call();
        for (std::thread& thread : threads) thread.join();
    }

    // work(thread) on this thread and on whichever others come while it runs.
    void run(const std::function<void(int)>& work) {
        job = &work;
        gate.store(OPEN, std::memory_order_release);
        call();
        work(0);
        gate.fetch_and(~OPEN, std::memory_order_acq_rel);
        await(gate, 0);
    }

    const int size;

  private:
    static constexpr int OPEN = 1 << 30;

    void call() {
        round.fetch_add(1, std::memory_order_release);
        round.notify_all();
    }

    void serve(int thread) {
        for (int seen = 0;;) {
            await_change(round, seen);
            seen = round.load(std::memory_order_acquire);
            if (ending) return;
            if (!enter()) continue;
            (*job)(thread);
            if (gate.fetch_sub(1, std::memory_order_acq_rel) == 1) gate.notify_all();
        }
    }

    bool enter() {
        int inside = gate.load(std::memory_order_acquire);
        while (inside & OPEN)
            if (gate.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) return true;
        return false;
    }

    std::vector<std::thread> threads;
    const std::function<void(int)>* job = nullptr;
    std::atomic<bool> ending{false};
    alignas(64) std::atomic<int> round{0};
    alignas(64) std::atomic<int> gate{0};  // threads inside, and whether more may come in
};

}  // namespace forebay
