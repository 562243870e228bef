// Threads of torch's own pool (never a second OpenMP runtime). Defined in bindings.cpp.
#pragma once

#include <atomic>
#include <cstdint>

namespace fxlm {

int num_threads();
void on_threads(int count, void (*body)(void*), void* context);

// Calls body(first, last) for runs that cover [0, count): half of a thread's share of what is
// left, at last single items. A thread thus works through neighbours, and threads that
// other programs slow down leave the others little to wait for.
template <class Body>
void for_each_run(int64_t count, const Body& body) {
  struct Queue {
    std::atomic<int64_t> next;
    int64_t count, threads;
    const Body* body;
    bool take(int64_t* first, int64_t* last) {
      *first = next.load();
      do {
        if (*first >= count) return false;
        const int64_t share = (count - *first) / (2 * threads);
        *last = *first + (share > 1 ? share : 1);
      } while (!next.compare_exchange_weak(*first, *last));
      return true;
    }
  };
  const int64_t threads = num_threads() < count ? num_threads() : count;
  Queue queue{{0}, count, threads, &body};
  on_threads(
      int(threads),
      [](void* context) {
        auto& queue = *static_cast<Queue*>(context);
        for (int64_t first, last; queue.take(&first, &last);) (*queue.body)(first, last);
      },
      &queue);
}

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
