// What is known of every two bytes that kernels may touch, and what each access must respect:
// bounds, initialised memory, no races. Used where kernels are compiled with -fsanitize=thread,
// which puts a call before every load and store; its run-time library is not linked, the hooks at
// the end of this file take those calls.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>

#include <array>
#include <memory>
#include <unordered_map>

namespace cuda_host {

// Who touched a granule last, and when. Two threads of a warp or more count as that warp, more
// warps as many.
struct Touch {
  uint32_t epoch;
  uint16_t who;
  uint16_t warp_epoch;
};
constexpr uint16_t kWarp = 0x8000;  // plus its number
constexpr uint16_t kManyWarps = 0xffff, kAtomic = 0xfffe;

enum Flag : uint8_t { kAllocated = 1, kInitialised = 2, kWritable = 4, kPending = 8 };

struct Cell {
  Touch write, read;
  uint8_t flags;
};

constexpr size_t kGranule = 2;  // bytes: the smallest type that kernels store
constexpr uintptr_t kPageBytes = 4096, kCells = kPageBytes / kGranule;
using Page = std::array<Cell, kCells>;
static std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;  // of device memory
constexpr size_t kCached = 256;
static struct {
  uintptr_t number;
  Page* page;
} cache[kCached];
static std::vector<Cell> shared_cells;
static Range launcher_stack, module_memory;

// ------------------------------------------------------------------------------ the marks

static Page* find_page(uintptr_t number) {
  auto& entry = cache[number % kCached];
  if (entry.number == number) return entry.page;
  const auto found = pages.find(number);
  if (found == pages.end()) return nullptr;
  entry = {number, found->second.get()};
  return entry.page;
}

static Cell* cell_of(uintptr_t p) {
  if (shared_memory.holds(reinterpret_cast<const void*>(p))) {
    return &shared_cells[(p - reinterpret_cast<uintptr_t>(shared_memory.begin)) / kGranule];
  }
  Page* page = find_page(p / kPageBytes);
  return page != nullptr ? &(*page)[p % kPageBytes / kGranule] : nullptr;
}

// Memory that was given before stays what it is: its contents may be a kernel's.
void mark_given(const void* begin, size_t bytes, Given how) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  for (uintptr_t p = first; p < first + bytes; p += kGranule) {
    Page* page = find_page(p / kPageBytes);
    if (page == nullptr) {
      page = (pages[p / kPageBytes] = std::make_unique<Page>()).get();
    }
    Cell& cell = (*page)[p % kPageBytes / kGranule];
    if ((cell.flags & kAllocated) == 0) {
      cell = {};
      cell.flags = how == Given::kFresh ? kAllocated : kAllocated | kInitialised;
    }
    if (how != Given::kRead) cell.flags |= kWritable;
  }
}

void forget_marks() {
  pages.clear();
  for (auto& entry : cache) entry = {};
}

void mark_shared(const void* begin, size_t bytes, bool allocated) {
  if (!settings.checking) return;
  const size_t all = static_cast<size_t>(shared_memory.end - shared_memory.begin);
  if (shared_cells.empty()) shared_cells.resize(all / kGranule);
  Cell cell{};
  if (allocated) cell.flags = kAllocated | kWritable;
  const size_t first = static_cast<size_t>(static_cast<const char*>(begin) - shared_memory.begin);
  std::fill_n(shared_cells.begin() + static_cast<std::ptrdiff_t>(first / kGranule),
              (bytes + kGranule - 1) / kGranule, cell);
}

void set_pending(const void* p, size_t bytes, bool pending) {
  if (!settings.checking) return;
  for (size_t i = 0; i < bytes; i += kGranule) {
    uint8_t& flags = cell_of(reinterpret_cast<uintptr_t>(p) + i)->flags;
    flags = pending ? flags | kPending : flags & ~kPending;
  }
}

// --------------------------------------------------- memory of the emulator and of the launch

static int find_module(dl_phdr_info* info, size_t, void*) {
  Range all{nullptr, nullptr};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
    if (all.begin == nullptr) all.begin = begin;
    all.end = begin + segment.p_memsz;
  }
  if (!all.holds(&settings)) return 0;
  module_memory = all;
  return 1;
}

void set_launcher(const void* frame) {
  constexpr size_t kArguments = 64 * 1024;  // the kernel's arguments lie in a frame above
  const char* begin = static_cast<const char*>(frame);
  launcher_stack = {begin, begin + kArguments};
  if (module_memory.begin == nullptr) dl_iterate_phdr(find_module, nullptr);
}

static bool private_memory(const void* p) {
  const char* fibers = reinterpret_cast<const char*>(block.fibers.data());
  return launcher_stack.holds(p) || module_memory.holds(p) ||
         Range{fibers, fibers + block.fibers.size() * sizeof(Fiber)}.holds(p);
}

// ----------------------------------------------------------------------------- the checks

// Whether a barrier lies between `then` and now: of the block, or of the whole warp where the two
// are in it. Nothing orders blocks of one launch. Shuffles, mma and ldmatrix order no memory.
static bool ordered(const Touch& then) {
  if (then.epoch < block.launched) return true;
  if (then.epoch < block.began) return false;
  if (then.epoch != block.epoch || then.who == self->linear) return true;
  if (then.who == kManyWarps || then.who == kAtomic) return false;
  const int warp = then.who >= kWarp ? then.who - kWarp : then.who / 32;
  return warp == self->warp && then.warp_epoch != block.warp_epoch[warp];
}

static std::string describe(const Touch& touch) {
  std::string who = "thread " + std::to_string(touch.who);
  if (touch.who >= kWarp) who = "warp " + std::to_string(touch.who - kWarp);
  if (touch.who == kManyWarps) who = "several warps";
  if (touch.who == kAtomic) who = "an atomic";
  return touch.epoch < block.began ? who + " of another block" : who;
}

static Touch now(uint16_t who) { return {block.epoch, who, block.warp_epoch[self->warp]}; }

static void note_read(Touch& read) {
  const auto me = static_cast<uint16_t>(self->linear);
  const auto mine = static_cast<uint16_t>(kWarp | self->warp);
  if (read.epoch != block.epoch || read.who == me) {
    read = now(me);
  } else if (read.who == mine || (read.who < kWarp && read.who / 32 == self->warp)) {
    read = now(mine);
  } else {
    read = now(kManyWarps);
  }
}

enum class Wrong { kNothing, kBounds, kReadOnly, kPending, kUninitialised, kWritten, kRead };

static Wrong objection(const Cell& cell, bool write) {
  if ((cell.flags & kAllocated) == 0) return Wrong::kBounds;
  if (write && (cell.flags & kWritable) == 0) return Wrong::kReadOnly;
  if ((cell.flags & kPending) != 0) return Wrong::kPending;
  if (!write && (cell.flags & kInitialised) == 0) return Wrong::kUninitialised;
  if (!ordered(cell.write)) return Wrong::kWritten;
  if (write && !ordered(cell.read)) return Wrong::kRead;
  return Wrong::kNothing;
}

static std::string describe(Wrong wrong, const Cell& cell) {
  switch (wrong) {
    case Wrong::kBounds:
      return "out of bounds";
    case Wrong::kReadOnly:
      return "that the call only reads";
    case Wrong::kPending:
      return "before the wait for its cp.async";
    case Wrong::kUninitialised:
      return "that is not initialised";
    case Wrong::kWritten:
      return "that " + describe(cell.write) + " wrote, no barrier between";
    default:
      return "that " + describe(cell.read) + " read, no barrier between";
  }
}

[[noreturn]] static void report(const char* what, const void* p, size_t bytes, Wrong wrong,
                                const Cell& cell, const void* pc) {
  const bool race = wrong == Wrong::kWritten || wrong == Wrong::kRead;
  fault("%s%s of %zu bytes of %s memory %s%s", race ? "race: " : "", what, bytes,
        shared_memory.holds(p) ? "shared" : "device", describe(wrong, cell).c_str(),
        place(pc).c_str());
}

// Null where it is nobody's business. The emulator's own memory may share a page with a tensor's.
static Cell* checked_cell(const void* p, uintptr_t at) {
  static Cell nowhere;
  Cell* cell = cell_of(at);
  if (cell != nullptr && (cell->flags & kAllocated) != 0) return cell;
  if (private_memory(p)) return nullptr;
  nowhere = {};
  return &nowhere;
}

void check(const void* p, size_t bytes, bool write, const void* pc) {
  if (!settings.checking || !block.running || fiber_stacks.holds(p)) return;
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes; at += kGranule) {
    Cell* cell = checked_cell(p, at);
    if (cell == nullptr) return;
    const Wrong wrong = objection(*cell, write);
    if (wrong != Wrong::kNothing) report(write ? "write" : "read", p, bytes, wrong, *cell, pc);
    if (write) {
      cell->write = now(static_cast<uint16_t>(self->linear));
      cell->flags |= kInitialised;
    } else {
      note_read(cell->read);
    }
  }
}

void check_atomic(const void* p, size_t bytes) {
  const void* pc = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fault("misaligned atomic%s", place(pc).c_str());
  if (!settings.checking) return;
  for (size_t i = 0; i < bytes; i += kGranule) {
    Cell* cell = checked_cell(p, reinterpret_cast<uintptr_t>(p) + i);
    if (cell == nullptr) return;
    const Wrong wrong = objection(*cell, false);
    const bool after_atomic = wrong == Wrong::kWritten && cell->write.who == kAtomic;
    if (wrong != Wrong::kNothing && !after_atomic) report("atomic", p, bytes, wrong, *cell, pc);
    cell->write = now(kAtomic);
  }
}

}  // namespace cuda_host

// ------------------------------------------------------------------------------- the hooks

#define CUDA_HOST_HOOK(name, bytes, write) \
  void name(void* p) { cuda_host::check(p, bytes, write, __builtin_return_address(0)); }
#define CUDA_HOST_HOOKS(n)                           \
  CUDA_HOST_HOOK(__tsan_read##n, n, false)           \
  CUDA_HOST_HOOK(__tsan_write##n, n, true)           \
  CUDA_HOST_HOOK(__tsan_unaligned_read##n, n, false) \
  CUDA_HOST_HOOK(__tsan_unaligned_write##n, n, true)

extern "C" {
CUDA_HOST_HOOKS(1)
CUDA_HOST_HOOKS(2)
CUDA_HOST_HOOKS(4)
CUDA_HOST_HOOKS(8)
CUDA_HOST_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  cuda_host::check(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  cuda_host::check(p, bytes, true, __builtin_return_address(0));
}
// Host code counts references: these order nothing that kernels see.
int __tsan_atomic32_fetch_add(int* p, int v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
char __tsan_atomic8_load(const char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
