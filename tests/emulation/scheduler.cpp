// Fibers, barriers, exchanges within a warp, and the grid.
#include "emulator.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
asm(R"(
.text
.hidden cuda_host_switch
.globl cuda_host_switch
.type cuda_host_switch,@function
cuda_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuda_host_switch,.-cuda_host_switch
)");
#endif

namespace cuda_host {

Thread* self;
uint3 block_index;
dim3 block_dim, grid_dim;
Settings settings;
std::vector<Launch> launches;
Block block;
std::string error;

static Context launcher;
static void (*kernel_body)(void*);
static void* kernel_argument;
static uint64_t random_state;

static uint64_t random_bits() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

// --------------------------------------------------------------------- which fiber runs

static void set_ready(Fiber& f) {
  f.state = State::kReady;
  block.ready[f.warp] |= 1u << f.lane;
}

static int pick_random() {
  const int first = static_cast<int>(random_bits() % block.warps);
  for (int i = 0; i < block.warps; ++i) {
    const int warp = (first + i) % block.warps;
    const unsigned lanes = block.ready[warp];
    if (lanes == 0) continue;
    const int turn = static_cast<int>(random_bits() & 31);
    const unsigned above = lanes >> turn;
    return warp * 32 + (above != 0 ? turn + __builtin_ctz(above) : __builtin_ctz(lanes));
  }
  return -1;
}

// A fiber that can run, or -1.
static int pick() {
  if (settings.order == Order::kRandom) return pick_random();
  for (int i = 0; i < block.warps; ++i) {
    const bool forward = settings.order == Order::kForward;
    const int warp = forward ? i : block.warps - 1 - i;
    const unsigned lanes = block.ready[warp];
    if (lanes == 0) continue;
    return warp * 32 + (forward ? __builtin_ctz(lanes) : 31 - __builtin_clz(lanes));
  }
  return -1;
}

void abandon_block() {
  Context dead;
  switch_context(dead, launcher);
}

[[noreturn]] static void report_deadlock() {
  std::string text = "deadlock:";
  int shown = 0;
  for (const Fiber& f : block.fibers) {
    if (f.state == State::kDone || shown++ == 6) continue;
    text += " thread " + std::to_string(f.linear) + " in " +
            (f.state == State::kAtBarrier ? "__syncthreads" : f.name) + " line " +
            std::to_string(f.line) + ";";
  }
  fault("%s", text.c_str());
}

static void release_barrier() {
  const Fiber* first = nullptr;
  for (Fiber& f : block.fibers) {
    if (f.state != State::kAtBarrier) continue;
    if (first == nullptr) first = &f;
    if (f.line == first->line) continue;
    self = &f;
    fault("divergent __syncthreads: thread %d waits at line %d, thread %d at line %d",
          first->linear, first->line, f.linear, f.line);
  }
  if (block.done > 0) {
    fault("divergent __syncthreads: %d threads wait at line %d, %d have returned", block.at_barrier,
          first->line, block.done);
  }
  block.barrier_result = 0;
  for (Fiber& f : block.fibers) {
    block.barrier_result += f.predicate;
    set_ready(f);
  }
  block.at_barrier = 0;
  ++block.epoch;
}

static void reschedule() {
  int next = pick();
  if (next < 0) {
    const int threads = static_cast<int>(block.fibers.size());
    if (block.done == threads) abandon_block();
    if (block.at_barrier == 0 || block.at_barrier + block.done < threads) report_deadlock();
    release_barrier();
    next = pick();
  }
  Fiber* from = current();
  Fiber* to = &block.fibers[next];
  if (from == to) return;
  self = to;
  switch_context(from->context, to->context);
}

static void wait_as(State state) {
  Fiber& f = *current();
  f.state = state;
  block.ready[f.warp] &= ~(1u << f.lane);
  reschedule();
}

void maybe_switch() {
  if (settings.order == Order::kRandom && (random_bits() & 3) == 0) reschedule();
}

// --------------------------------------------------------------- barriers and exchanges

int block_barrier(int predicate, int line) {
  current()->line = line;
  current()->predicate = predicate;
  ++block.at_barrier;
  wait_as(State::kAtBarrier);
  return block.barrier_result;
}

// No lane of the mask may have gone elsewhere: it would never come.
static void check_lanes(const Fiber& f) {
  const unsigned there = block.ready[f.warp] | block.in_warp[f.warp];
  const unsigned gone = f.mask & ~there;
  if (gone == 0) return;
  const int lane = __builtin_ctz(gone);
  const size_t thread = static_cast<size_t>(f.warp * 32 + lane);
  if (thread >= block.fibers.size()) {
    fault("%s line %d: mask %08x names lane %d, which the block does not have", f.name, f.line,
          f.mask, lane);
  }
  const Fiber& other = block.fibers[thread];
  if (other.state == State::kDone) {
    fault("%s line %d: lane %d of the mask has returned", f.name, f.line, lane);
  }
  fault("%s line %d: lane %d of the mask waits in __syncthreads at line %d", f.name, f.line, lane,
        other.line);
}

void exchange_data(const char* name, unsigned mask, int line, void* data, Complete complete) {
  Fiber& f = *current();
  if ((mask >> f.lane & 1) == 0) {
    fault("%s line %d: mask %08x lacks the calling lane %d", name, line, mask, f.lane);
  }
  f.name = name;
  f.mask = mask;
  f.line = line;
  f.data = data;
  block.in_warp[f.warp] |= 1u << f.lane;
  check_lanes(f);
  if ((block.in_warp[f.warp] & mask) != mask) return wait_as(State::kInWarp);

  void* all[32] = {};
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const Fiber& other = block.fibers[f.warp * 32 + lane];
    if (other.mask != mask || other.name != name || other.line != line) {
      fault("divergent warp: lane %d in %s line %d mask %08x, lane %d in %s line %d mask %08x",
            f.lane, name, line, mask, lane, other.name, other.line, other.mask);
    }
    all[lane] = other.data;
  }
  block.in_warp[f.warp] &= ~mask;
  complete(all, mask);
  for (unsigned left = mask; left != 0; left &= left - 1) {
    set_ready(block.fibers[f.warp * 32 + __builtin_ctz(left)]);
  }
  if (settings.order == Order::kRandom) reschedule();
}

// ------------------------------------------------------------------------------ the grid

static void fiber_entry() {
  kernel_body(kernel_argument);
  ++block.done;
  wait_as(State::kDone);
}

static void check_launch(const Launch& launch) {
  const dim3 grid = launch.grid, threads = launch.block;
  const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  if (count < 1 || count > 1024) throw std::runtime_error("launch: a block has 1 to 1024 threads");
  if (launch.dynamic_bytes > settings.shared_limit) {
    throw std::runtime_error("launch: " + std::to_string(launch.dynamic_bytes) +
                             " bytes of shared memory, a block may have " +
                             std::to_string(settings.shared_limit));
  }
  const bool fits = grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535;
  if (!fits || grid.x == 0 || grid.y == 0 || grid.z == 0) {
    throw std::runtime_error("launch: no such grid");
  }
}

static void begin_block(uint64_t index, size_t dynamic_bytes) {
  const uint64_t row = index / grid_dim.x;
  block_index = {static_cast<unsigned>(index % grid_dim.x), static_cast<unsigned>(row % grid_dim.y),
                 static_cast<unsigned>(row / grid_dim.y)};
  block.began = ++block.epoch;
  block.done = block.at_barrier = 0;
  std::fill_n(block.ready, 32, 0);
  std::fill_n(block.in_warp, 32, 0);
  std::fill_n(block.warp_epoch, 32, 0);
  begin_block_memory(dynamic_bytes);
  for (size_t t = 0; t < block.fibers.size(); ++t) {
    Fiber& f = block.fibers[t];
    const unsigned thread = static_cast<unsigned>(t), line = thread / block_dim.x;
    f.index = {thread % block_dim.x, line % block_dim.y, line / block_dim.y};
    f.linear = static_cast<int>(t);
    f.lane = f.linear % 32;
    f.warp = f.linear / 32;
    f.copies.clear();
    prepare_context(f.context, stack_top(f.linear), fiber_entry);
    set_ready(f);
  }
}

static std::vector<uint32_t> block_order(uint64_t blocks) {
  if (blocks > (1u << 24)) throw std::runtime_error("launch: a grid too large to emulate");
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == Order::kBackward) std::reverse(order.begin(), order.end());
  if (settings.order == Order::kRandom) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  }
  return order;
}

void run_grid(const Launch& launch, void (*body)(void*), void* argument) {
  check_launch(launch);
  launches.push_back(launch);
  if (settings.dry) return;
  init_memory();
  set_launcher(__builtin_frame_address(0));
  const SignalHandlers handlers;
  const dim3 grid = launch.grid, threads = launch.block;
  block_dim = threads;
  grid_dim = grid;
  kernel_body = body;
  kernel_argument = argument;
  random_state = settings.seed * 2654435761u + 88172645463325252ull;
  error.clear();
  block.fibers.assign(threads.x * threads.y * threads.z, Fiber());
  block.warps = static_cast<int>(block.fibers.size() + 31) / 32;
  block.launched = ++block.epoch;
  for (const uint32_t index : block_order(static_cast<uint64_t>(grid.x) * grid.y * grid.z)) {
    begin_block(index, launch.dynamic_bytes);
    block.running = true;
    Fiber* first = &block.fibers[pick()];
    self = first;
    switch_context(launcher, first->context);
    block.running = false;
    if (error.empty()) error = damage();
    if (!error.empty()) throw std::runtime_error(error);
  }
}

}  // namespace cuda_host
