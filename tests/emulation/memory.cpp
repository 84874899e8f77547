// Memory that kernels get: shared memory of a block before an unmapped page, stacks of fibers
// between unmapped pages, and margins around fresh device memory.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <stdexcept>

namespace cuda_host {

constexpr size_t kPage = 4096;
constexpr size_t kDynamicBytes = 228 * 1024, kStaticBytes = 64 * 1024;
constexpr size_t kStaticLimit = 48 * 1024, kRedZone = 64;
constexpr size_t kStackBytes = 128 * 1024, kStackStep = kStackBytes + kPage;
constexpr int kFibers = 1024;
constexpr int kPoison = 0xff;  // a NaN in every format

Range shared_memory, fiber_stacks;

struct StaticArray {
  char* begin;
  size_t bytes;
};
static char *dynamic_pages, *static_pages, *static_next;
static size_t dynamic_bytes;
static std::map<const void*, StaticArray> static_arrays;  // by the place in the source
static std::map<char*, size_t> fresh_memory;

static char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("the emulator found no memory");
  return static_cast<char*>(p);
}
static char* open_pages(char* p, size_t bytes) {
  mprotect(p, bytes, PROT_READ | PROT_WRITE);
  return p;
}

void init_memory() {
  if (dynamic_pages != nullptr) return;
  // page | dynamic | page | static | page
  char* all = reserve(kDynamicBytes + kStaticBytes + 3 * kPage);
  dynamic_pages = open_pages(all + kPage, kDynamicBytes);
  static_pages = open_pages(dynamic_pages + kDynamicBytes + kPage, kStaticBytes);
  shared_memory = {dynamic_pages, static_pages + kStaticBytes};
  char* stacks = reserve(kFibers * kStackStep);
  for (int i = 0; i < kFibers; ++i) open_pages(stacks + i * kStackStep + kPage, kStackBytes);
  fiber_stacks = {stacks, stacks + kFibers * kStackStep};
}

Range stack_guard(int fiber) {
  const char* page = fiber_stacks.begin + fiber * kStackStep;
  return {page, page + kPage};
}

// Not all at the same place within a page, where they would share sets of the cache.
char* stack_top(int fiber) {
  char* end = const_cast<char*>(fiber_stacks.begin) + (fiber + 1) * kStackStep;
  return end - static_cast<size_t>(fiber) * 832 % 8192 / 64 * 64;
}

// ------------------------------------------------------------------ shared memory of a block

// As far right as 128-byte alignment allows, so that the unmapped page follows.
void* dynamic_shared() {
  const auto end = reinterpret_cast<uintptr_t>(dynamic_pages + kDynamicBytes);
  return reinterpret_cast<void*>((end - dynamic_bytes) / 128 * 128);
}

void* static_shared(const void* site, size_t bytes, size_t align) {
  const auto known = static_arrays.find(site);
  if (known != static_arrays.end()) return known->second.begin;
  const auto next = reinterpret_cast<uintptr_t>(static_next);
  char* begin = reinterpret_cast<char*>((next + align - 1) / align * align);
  static_next = begin + bytes + kRedZone;
  static_arrays[site] = {begin, bytes};
  size_t total = 0;
  for (const auto& each : static_arrays) total += each.second.bytes;
  if (total > kStaticLimit) fault("more than 48 KB of static shared memory");
  if (total + dynamic_bytes > settings.shared_limit) {
    fault("%zu bytes of shared memory, static and dynamic; a block may have %zu",
          total + dynamic_bytes, settings.shared_limit);
  }
  mark_shared(begin, bytes, true);
  return begin;
}

size_t shared_limit() { return settings.shared_limit; }

// The part of the dynamic pages that is watched: from `kPage` before what the block has.
static char* watched() {
  return std::max(dynamic_pages, static_cast<char*>(dynamic_shared()) - kPage);
}

void begin_block_memory(size_t bytes) {
  dynamic_bytes = bytes;
  const size_t size = static_cast<size_t>(dynamic_pages + kDynamicBytes - watched());
  memset(watched(), kPoison, size);
  mark_shared(watched(), size, false);
  mark_shared(dynamic_shared(), bytes, true);
  // What the block before took of the static pages, and its last red zone; at first all of them.
  const size_t used =
      static_next != nullptr ? static_cast<size_t>(static_next - static_pages) : kStaticBytes;
  memset(static_pages, kPoison, used);
  mark_shared(static_pages, used, false);
  static_arrays.clear();
  static_next = static_pages + kRedZone;
}

void must_be_shared(const void* p, size_t bytes, const char* what, const void* pc) {
  if (!shared_memory.holds(p)) {
    fault("%s: the address is not in shared memory%s", what, place(pc).c_str());
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fault("%s: the address is no multiple of %zu bytes%s", what, bytes, place(pc).c_str());
  }
}

// ------------------------------------------------------------------------------- margins

static bool poisoned(const char* begin, const char* end) {
  return std::all_of(begin, end, [](char c) { return c == static_cast<char>(kPoison); });
}

void give_fresh(void* p, size_t bytes) {
  char* begin = static_cast<char*>(p);
  memset(begin - kMargin, kPoison, bytes + 2 * kMargin);
  fresh_memory[begin] = bytes;
  give(p, bytes, Given::kFresh);
}

bool checking() { return settings.checking; }

void give(const void* p, size_t bytes, Given how) {
  if (settings.checking) mark_given(p, bytes, how);
}

void forget_given() {
  fresh_memory.clear();
  forget_marks();
}

static bool static_damage() {
  std::vector<StaticArray> arrays;
  for (const auto& each : static_arrays) arrays.push_back(each.second);
  std::sort(arrays.begin(), arrays.end(),
            [](const StaticArray& a, const StaticArray& b) { return a.begin < b.begin; });
  const char* free = static_pages;
  for (const StaticArray& array : arrays) {
    if (!poisoned(free, array.begin)) return true;
    free = array.begin + array.bytes;
  }
  return !poisoned(free, static_next);
}

std::string damage() {
  const char* begin = static_cast<char*>(dynamic_shared());
  if (!poisoned(watched(), begin)) return "write before dynamic shared memory";
  if (!poisoned(begin + dynamic_bytes, dynamic_pages + kDynamicBytes)) {
    return "write past dynamic shared memory";
  }
  if (static_damage()) return "write past a static shared array";
  for (const auto& fresh : fresh_memory) {
    const char* end = fresh.first + fresh.second;
    if (!poisoned(fresh.first - kMargin, fresh.first)) return "write before a device tensor";
    if (!poisoned(end, end + kMargin)) return "write past a device tensor";
  }
  return "";
}

std::string owner(const char* p) {
  if (Range{dynamic_pages + kDynamicBytes, static_pages}.holds(p)) return "past shared memory";
  if (Range{dynamic_pages - kPage, dynamic_pages}.holds(p)) return "before shared memory";
  return "";
}

}  // namespace cuda_host
