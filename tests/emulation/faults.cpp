// How a fault is told: what, where in the source, in which block and thread.
#include "emulator.h"

#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

namespace cuda_host {

void fault(const char* format, ...) {
  char text[1024], where[128];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!block.running) throw std::runtime_error(text);
  snprintf(where, sizeof where, " [block (%u,%u,%u) thread (%u,%u,%u)]", block_index.x,
           block_index.y, block_index.z, self->index.x, self->index.y, self->index.z);
  error = std::string(text) + where;
  abandon_block();
  __builtin_unreachable();
}

// Where an address is in the file of this module.
static bool locate(const void* address, Dl_info* info, size_t* offset) {
  if (address == nullptr || dladdr(address, info) == 0) return false;
  *offset = static_cast<size_t>(static_cast<const char*>(address) -
                                static_cast<const char*>(info->dli_fbase));
  return true;
}

static std::vector<std::string> lines_of(const char* command) {
  std::vector<std::string> lines;
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return lines;
  char line[4096];
  while (fgets(line, sizeof line, pipe) != nullptr) lines.emplace_back(line, strcspn(line, "\n"));
  pclose(pipe);
  return lines;
}

// " at file:line <- file:line ..."; the frames are those that were inlined into one.
std::string place(const void* pc) {
  Dl_info info;
  size_t offset;
  if (!locate(pc, &info, &offset)) return "";
  char command[1024];
  snprintf(command, sizeof command, "addr2line -i -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           offset - 1);
  std::string all;
  for (const std::string& line : lines_of(command)) {
    if (all.size() > 256) break;
    all += (all.empty() ? " at " : " <- ") + line.substr(0, line.find_first_of(" ("));
  }
  return all;
}

std::string function_name(const void* function) {
  Dl_info info;
  size_t offset;
  if (!locate(function, &info, &offset)) return "";
  char command[1024], address[32];
  snprintf(command, sizeof command, "nm -C --defined-only '%s'", info.dli_fname);
  snprintf(address, sizeof address, "%016zx ", offset);
  for (const std::string& line : lines_of(command)) {  // address, type, name
    if (line.rfind(address, 0) == 0) return line.substr(strlen(address) + 2);
  }
  return "";
}

// ---------------------------------------------------------------------------- the hardware's

static const int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
static struct sigaction saved[4];
static stack_t saved_stack;
static char signal_stack[128 * 1024];

static void on_signal(int number, siginfo_t* info, void* context) {
  if (!block.running) {  // not ours
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  const void* pc = nullptr;
#if defined(__x86_64__)
  const auto at = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  pc = reinterpret_cast<const char*>(at) + 1;  // `place` expects a return address
#endif
  const std::string where = place(pc);
  if (number == SIGILL) {
    fault(
        "undefined behaviour: an index out of a local array, a misaligned vector access or an "
        "overflow%s",
        where.c_str());
  }
  if (number == SIGFPE) fault("division by zero%s", where.c_str());
  const char* p = static_cast<const char*>(info->si_addr);
  if (stack_guard(self->linear).holds(p)) fault("a fiber's stack is full%s", where.c_str());
  const std::string whose = owner(p);
  fault("access to unmapped memory, %s%s",
        whose.empty() ? "or one that the hardware wants aligned" : whose.c_str(), where.c_str());
}

SignalHandlers::SignalHandlers() {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &saved_stack);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &saved[i]);
}

SignalHandlers::~SignalHandlers() {
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &saved[i], nullptr);
  sigaltstack(&saved_stack, nullptr);
}

}  // namespace cuda_host
