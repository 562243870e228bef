// Memory of the tensors of a step. A step of a small model makes a few hundred of them, each
// aligned to 64 bytes, and the C library's aligned allocation searches its lists for every one.
// Here a thread keeps what it gave back, by size, and hands it out again. Blocks beyond kLargest
// come from torch's own allocator.

#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr size_t kLine = 64;          // alignment, and the header before each block
constexpr size_t kLargest = 1 << 20;  // bytes of a block that is kept
constexpr size_t kKept = 8 << 20;     // bytes a thread keeps, headers aside
constexpr size_t kMost = SIZE_MAX / 2;  // beyond are negative sizes
constexpr int kClasses = 52;          // 64 to 320, then four sizes a power of two
constexpr int kLarge = -1;

struct Block {
  int size_class;
  Block* next;  // while it is kept
};
static_assert(sizeof(Block) <= kLine, "the header has a line");

int class_of(size_t bytes) {
  const size_t last = (bytes + kLine - 1) / kLine - 1;  // lines, less one
  if (last < 8) return int(last);
  const int shift = 61 - __builtin_clzll(last);  // leaves 4 to 7
  return 4 * shift + int(last >> shift);
}

size_t bytes_of(int size_class) {
  if (size_class < 8) return (size_class + 1) * kLine;
  return size_t(size_class % 4 + 5) << (size_class / 4 - 1) << 6;
}

thread_local bool ended = false;  // outlives the cache: tensors are dropped at exit, too

class Cache {
 public:
  ~Cache() {
    clear();
    ended = true;
  }

  Block* take(int size_class) {
    Block* block = first_[size_class];
    if (block) {
      first_[size_class] = block->next;
      kept_ -= bytes_of(size_class);
    }
    return block;
  }

  // Full: begin anew, as what is kept may be of sizes that nobody asks for any more.
  void keep(Block* block) {
    const size_t bytes = bytes_of(block->size_class);
    if (kept_ + bytes > kKept) clear();
    block->next = first_[block->size_class];
    first_[block->size_class] = block;
    kept_ += bytes;
  }

 private:
  void clear() {
    for (Block*& first : first_)
      while (first) {
        Block* next = first->next;
        std::free(first);
        first = next;
      }
    kept_ = 0;
  }

  Block* first_[kClasses] = {};
  size_t kept_ = 0;
};

thread_local Cache cache;

Block* block_of(size_t bytes) {
  const int size_class = class_of(bytes);
  if (!ended)
    if (Block* block = cache.take(size_class)) return block;
  void* memory = nullptr;
  if (posix_memalign(&memory, kLine, kLine + bytes_of(size_class)) != 0) return nullptr;
  Block* block = static_cast<Block*>(memory);
  block->size_class = size_class;
  return block;
}

void release(void* data) {
  if (!data) return;
  Block* block = reinterpret_cast<Block*>(static_cast<char*>(data) - kLine);
  if (block->size_class == kLarge)
    c10::GetDefaultCPUAllocator()->raw_deallocate(block);
  else if (ended)
    std::free(block);
  else
    cache.keep(block);
}

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      Block* block = bytes <= kLargest ? block_of(bytes) : nullptr;
      if (!block) {  // torch's allocator also words the error where there is no memory
        if (bytes > kMost) c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
        block = static_cast<Block*>(c10::GetDefaultCPUAllocator()->raw_allocate(kLine + bytes));
        block->size_class = kLarge;
      }
      data = reinterpret_cast<char*>(block) + kLine;
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

// Lets this process take tensors on the CPU from the pool, from now on. Those that there are stay
// where they are.
extern "C" __attribute__((visibility("default"))) void fxlm_pool_tensors() {
  static Pool pool;
  c10::SetCPUAllocator(&pool);
}
