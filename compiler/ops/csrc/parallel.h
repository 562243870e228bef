// Threads of torch's own pool (never a second OpenMP runtime). Defined in bindings.cpp.
#pragma once

#include <atomic>
#include <cstdint>

namespace fxlm {

int num_threads();
void on_threads(int count, void (*body)(void*), void* context);

// Calls body(i) for every i in [0, count); threads take the next i when free, so that items of
// unequal cost need no plan. The order in which a thread sees items is ascending.
template <class Body>
void for_each_item(int64_t count, const Body& body) {
  struct Queue {
    std::atomic<int64_t> next;
    int64_t count;
    const Body* body;
  } queue{{0}, count, &body};
  const int64_t threads = num_threads() < count ? num_threads() : count;
  on_threads(
      int(threads),
      [](void* context) {
        auto& queue = *static_cast<Queue*>(context);
        for (int64_t i; (i = queue.next.fetch_add(1)) < queue.count;) (*queue.body)(i);
      },
      &queue);
}

}  // namespace fxlm
