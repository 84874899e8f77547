// Switching between stacks.
#pragma once

#if !defined(__x86_64__) || defined(CUDA_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_host {

#if !defined(__x86_64__) || defined(CUDA_HOST_UCONTEXT)

struct Context {  // two system calls a switch, about 20 times slower
  ucontext_t saved;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
inline void prepare_context(Context& c, char* stack_top, void (*entry)()) {
  constexpr size_t kBelow = 32 * 1024;
  getcontext(&c.saved);
  c.saved.uc_stack = {stack_top - kBelow, 0, kBelow};
  c.saved.uc_link = nullptr;
  makecontext(&c.saved, entry, 0);
}

#else

struct Context {
  void* stack_pointer;  // the saved registers lie there
};
extern "C" void cuda_host_switch(void** save, void* load);
inline void switch_context(Context& from, Context& to) {
  cuda_host_switch(&from.stack_pointer, to.stack_pointer);
}
inline void prepare_context(Context& c, char* stack_top, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack_top);
  *--top = nullptr;  // so that the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  c.stack_pointer = top - kSavedRegisters;
}

#endif

}  // namespace cuda_host
