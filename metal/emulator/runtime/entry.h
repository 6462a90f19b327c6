// The launch from Python's side: buffers become regions, faults become findings.
#pragma once
#include <signal.h>

#include "hooks.h"

// The instruction that faulted, plus one: places are return addresses.
static uint64_t fault_pc(void* context) {
  const ucontext_t* c = (const ucontext_t*)context;
#if defined(__APPLE__) && defined(__aarch64__)
  return c->uc_mcontext->__ss.__pc + 1;
#elif defined(__APPLE__)
  return c->uc_mcontext->__ss.__rip + 1;
#elif defined(__aarch64__)
  return c->uc_mcontext.pc + 1;
#else
  return (uint64_t)c->uc_mcontext.gregs[REG_RIP] + 1;
#endif
}

static void on_signal(int number, siginfo_t* info, void* context) {
  if (!state.current) {
    signal(number, SIG_DFL);
    return;
  }
  uint64_t address = (uint64_t)info->si_addr;
  const Region* near = nullptr;
  for (Region& r : state.buffers)
    if (address + GUARD / 2 >= r.base && address < r.base + r.size + GUARD / 2) near = &r;
  char* stack = state.current->stack;
  Place place = at_pc(fault_pc(context), near ? near->buffer : -1);
  // recorded whether allowed or not; the jump below ends the launch
  auto say = [&](Check check, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record(check, place, format, arguments);
    va_end(arguments);
  };
  if (number == SIGILL || number == SIGTRAP)  // what -fsanitize=local-bounds executes
    say(ARRAY_INDEX, "access outside an array of the thread, or a constant table");
  else if (near)
    say(OUT_OF_BOUNDS, "access at byte %lld of buffer '%s', which has %llu bytes",
        (long long)(address - near->base), near->name, (unsigned long long)near->size);
  else if (address - (uint64_t)stack < STACK_GUARD)
    say(INVALID_ACCESS, "the thread needs more than %llu bytes of stack",
        (unsigned long long)(STACK - STACK_GUARD));
  else if (address < GUARD)
    say(INVALID_ACCESS, "null pointer: no buffer is bound there");
  else
    say(INVALID_ACCESS, "access at address 0x%llx, which belongs to no buffer",
        (unsigned long long)address);
  siglongjmp(state.on_fault, 1);
}

static void add_buffers() {
  state.buffers.size = 0;
  for (uint32_t i = 0; i < state.launch->buffer_count; i++) {
    EmuBuffer& b = state.launch->buffers[i];
    Region r{b.base, b.size, b.name, b.flags, (int32_t)i, 0, nullptr, nullptr, nullptr};
    if (state.launch->options & INSTRUMENTED) {
      r.load_stamp = (uint32_t*)calloc(b.size / 32 + 2, sizeof(uint32_t));
      r.store_stamp = (uint32_t*)calloc(b.size / 32 + 2, sizeof(uint32_t));
      if (b.flags & WRITABLE) r.cells = (Cell*)calloc(b.size, sizeof(Cell));
    }
    state.buffers.push(r);
  }
}
static void release_buffers() {
  for (Region& r : state.buffers) {
    EmuBuffer& b = state.launch->buffers[r.buffer];
    b.first_unwritten = b.size;
    for (uint64_t i = 0; r.cells && i < r.size; i++) {
      bool written = r.cells[i].write.state != UNTOUCHED;
      b.bytes_written += written;
      if (!written && i < b.first_unwritten) b.first_unwritten = i;
    }
    free(r.cells);
    free(r.load_stamp);
    free(r.store_stamp);
  }
}
static void run_threadgroups() {
  for (uint64_t i = 0; i < state.launch->threadgroup_count && !state.failed; i++) {
    if (sigsetjmp(state.on_fault, 1)) {  // the fault of a thread, on the signal's own stack
      state.current = nullptr;
      state.failed = true;
      return;
    }
    run_threadgroup((uint32_t)state.launch->threadgroups[i]);
  }
}

// Runs the threadgroups; the result and all it points to live until the next launch.
extern "C" const EmuResult* emu_run(const EmuLaunch* launch) {
  state.launch = launch;
  state.result = EmuResult{};
  state.failed = false;
  state.current = nullptr;
  state.findings.size = state.syncs.size = 0;
  release_traffic();
  auto groups = [&](int d) { return (launch->grid[d] + launch->threadgroup[d] - 1) / launch->threadgroup[d]; };
  state.groups = {groups(0), groups(1), groups(2)};
  if (!state.arena) {
    state.arena = (char*)mmap(nullptr, ARENA + GUARD, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(state.arena + ARENA, GUARD, PROT_NONE);
    state.arena_cells = (Cell*)calloc(ARENA, sizeof(Cell));
  }
  state.arena_used = ARENA;  // what an earlier, failed launch left is cleared
  add_buffers();

  static char signal_stack[64 << 10];
  stack_t own_stack = {}, old_stack;
  own_stack.ss_sp = signal_stack;
  own_stack.ss_size = sizeof signal_stack;
  sigaltstack(&own_stack, &old_stack);
  constexpr int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction action = {}, old_actions[4];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 4; i++) sigaction(signals[i], &action, &old_actions[i]);
  run_threadgroups();
  for (int i = 0; i < 4; i++) sigaction(signals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);

  release_buffers();
  static Array<EmuAccesses> accesses;
  accesses.size = 0;
  for (Site* site : traffic.sites) accesses.push(site->counts);
  Dl_info image = {};
  dladdr((void*)launch->entry, &image);
  EmuResult& result = state.result;
  result.accesses = accesses.data;
  result.access_count = accesses.size;
  result.syncs = state.syncs.data;
  result.sync_count = state.syncs.size;
  result.findings = state.findings.data;
  result.finding_count = state.findings.size;
  result.stopped = state.failed;
  result.image_base = (uint64_t)image.dli_fbase;
  return &result;
}
