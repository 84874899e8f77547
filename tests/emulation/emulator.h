// What the files of the emulator share; kernels see cuda_host.h alone.
#pragma once

#include "cuda_host.h"
#include "context.h"

#include <string>
#include <vector>

namespace cuda_host {

enum class Order { kForward, kBackward, kRandom };

struct Settings {
  Order order = Order::kForward;  // in which blocks run, and threads of a block that can
  uint64_t seed = 1;              // of the random order
  bool late_copies = true;        // cp.async lands when it is waited for, else when it is issued
  size_t shared_limit = 227 * 1024;
  bool dry = false;       // launches are only noted
  bool checking = false;  // the kernels are instrumented: every access comes to `check`
};
extern Settings settings;
extern std::vector<Launch> launches;  // since the settings were made

// --------------------------------------------------------------- the running block

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kDone };

struct Copy {  // one cp.async
  char* to;
  const char* from;
  int bytes, source_bytes;
};

struct Fiber : Thread {
  Context context;
  State state;
  int line, predicate;  // where it waits
  const char* name;     // of the exchange that it waits in, with its mask and its data
  unsigned mask;
  void* data;
  std::vector<std::vector<Copy>> copies;  // in groups, oldest first; the last group is open
};

// Time is counted in epochs: a new one begins with every launch, block and barrier.
struct Block {
  std::vector<Fiber> fibers;
  int warps;
  int done, at_barrier, barrier_result;
  unsigned ready[32], in_warp[32];  // a bit for each lane, a word for each warp
  uint16_t warp_epoch[32];          // how many barriers of the whole warp there were
  uint32_t epoch, began, launched;  // now, and when the block and its launch began
  bool running;
};
extern Block block;
inline Fiber* current() { return static_cast<Fiber*>(self); }

// All lanes of `mask` come with the same exchange; the last one completes it for all of them.
using Complete = void (*)(void** data, unsigned mask);
void exchange_data(const char* name, unsigned mask, int line, void* data, Complete complete);
void maybe_switch();   // where the random order may let another fiber run
void abandon_block();  // back to run_grid, which raises `error`
extern std::string error;

// -------------------------------------------------------------------------- memory

void init_memory();
void begin_block_memory(size_t dynamic_bytes);
std::string damage();  // which margin was written to, or ""
void must_be_shared(const void* p, size_t bytes, const char* what, const void* pc);
std::string owner(const char* p);  // the guard page that holds p, in words, or ""

struct Range {
  const char* begin;
  const char* end;
  bool holds(const void* p) const { return begin <= p && p < end; }
};
extern Range shared_memory;  // of a block: dynamic, then static
extern Range fiber_stacks;
Range stack_guard(int fiber);
char* stack_top(int fiber);

// ------------------------------------------------------- what is checked of each access

void check(const void* p, size_t bytes, bool write, const void* pc);
void check_atomic(const void* p, size_t bytes);
void set_pending(const void* p, size_t bytes, bool pending);
void mark_given(const void* p, size_t bytes, Given how);
void mark_shared(const void* p, size_t bytes, bool allocated);
void forget_marks();
void set_launcher(const void* frame);  // the stack that holds the arguments of a launch

// ---------------------------------------------------------------------------- faults

std::string place(const void* pc);  // file and line of a return address, with its callers inlined
std::string function_name(const void* function);
class SignalHandlers {  // turn what the hardware catches into faults
 public:
  SignalHandlers();
  ~SignalHandlers();
};

}  // namespace cuda_host
