// The running launch: its threads, its findings. One launch at a time, on one OS thread.
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include "fibers.h"
#include "memory.h"

enum class Wait : uint8_t { READY, SIMD, SIMDGROUP_BARRIER, THREADGROUP_BARRIER, FINISHED };

struct Fiber {
  EmuThread thread;
  void* sp;
  char* stack;
  Wait wait;
  uint32_t argument;  // of what it waits for: operation or memory flags
  EmuSite site;
};

enum Space { DEVICE, THREADGROUP };
// What separates accesses of one threadgroup: barriers count epochs, for each kind of memory.
struct Epochs {
  uint32_t threadgroup[2];
  uint32_t simdgroup[2][32];
};

// A piece of memory a kernel may touch: a buffer, or a variable in threadgroup memory.
struct Region {
  uint64_t base, size;
  const char* name;
  uint32_t flags;
  int32_t buffer;      // -1: threadgroup memory
  uint32_t id;         // of a threadgroup variable
  struct Cell* cells;  // per byte: who touched it last
  uint32_t* load_stamp;  // per sector: the last threadgroup (+ 1) that loaded it
  uint32_t* store_stamp;
};

constexpr uint32_t MAX_THREADS = 1024, MAX_SIMDGROUPS = 32;
constexpr uint64_t THREADGROUP_LIMIT = 32 << 10, ARENA = 64 << 10;

struct State {
  const EmuLaunch* launch;
  EmuResult result;
  Fiber fibers[MAX_THREADS];
  EmuSimdgroup simdgroups[MAX_SIMDGROUPS];
  uint32_t thread_count, simdgroup_count;
  void* scheduler;
  Fiber* current;  // null while the scheduler runs
  bool failed;
  jmp_buf on_fault;
  uint32_t group;  // linear index of the running threadgroup
  EmuUint3 group_position, groups;
  Epochs epochs;
  char* arena;
  uint64_t arena_used, arena_payload;
  struct Cell* arena_cells;
  Array<Region> buffers, variables;
  Array<EmuFinding> findings;
  Array<EmuSyncs> syncs;
};
static State state;
extern "C" {
EmuThread* emu_thread;
}

static bool tracing() { return state.current && (state.launch->options & INSTRUMENTED); }
static bool allowed(Check check) { return state.launch->allowed >> check & 1; }

// Drops every thread of the launch and returns to the scheduler for good.
static void stop_launch() {
  state.failed = true;
  emu_thread = nullptr;
  if (!state.current) return;
  state.current = nullptr;
  void* abandoned;
  emu_switch(&abandoned, state.scheduler);
}

// Where a check found something: an instruction, or a place that the kernel passed along.
struct Place {
  uint64_t pc;
  EmuSite site;
  int32_t buffer;
};
static Place at_pc(uint64_t pc, int32_t buffer) { return {pc, {nullptr, 0, 0}, buffer}; }
static Place at_site(EmuSite site) { return {0, site, -1}; }

static bool same_place(const EmuFinding& f, Place place) {
  return f.pc == place.pc && f.site.line == place.site.line &&
         f.site.column == place.site.column && f.site.file == place.site.file;
}
static void record(Check check, Place place, const char* format, va_list arguments) {
  for (EmuFinding& f : state.findings)
    if (f.check == check && same_place(f, place)) {
      f.occurrences++;
      return;
    }
  if (state.findings.size >= 64) return;
  EmuFinding& f = state.findings.push({check, place.buffer, place.pc, place.site, 1, {}});
  int n = vsnprintf(f.text, sizeof f.text, format, arguments);
  if (!state.current || n < 0 || (size_t)n >= sizeof f.text) return;
  const EmuThread& t = state.current->thread;
  EmuUint3 g = state.group_position;
  snprintf(f.text + n, sizeof f.text - n, "; thread %u (simdgroup %u lane %u) of threadgroup (%u, %u, %u)",
           t.thread_index_in_threadgroup, t.simdgroup_index_in_threadgroup,
           t.thread_index_in_simdgroup, g.x, g.y, g.z);
}
// Records a fault after which the kernel can go on, once per place, unless the caller allows it.
__attribute__((format(printf, 3, 4))) static void report(Check check, Place place,
                                                         const char* format, ...) {
  if (allowed(check)) return;
  va_list arguments;
  va_start(arguments, format);
  record(check, place, format, arguments);
  va_end(arguments);
}
// Records a fault and ends the launch. Does not return to a kernel.
__attribute__((format(printf, 3, 4))) static void fail(Check check, Place place, const char* format,
                                                       ...) {
  va_list arguments;
  va_start(arguments, format);
  record(check, place, format, arguments);
  va_end(arguments);
  stop_launch();
}
