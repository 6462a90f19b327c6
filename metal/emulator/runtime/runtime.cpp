// The scheduler: runs the threads of one threadgroup as fibers, and brings together those that wait
// for each other.
//
// A thread runs until a simd operation or a barrier, so the interleaving is coarse and fixed; the
// checks do not depend on it. Linked without a C++ library: building one takes zig over a minute.
#include <dlfcn.h>
#include <signal.h>

#include "hooks.h"

static void count_sync(SyncKind kind, EmuSite site) {
  for (EmuSyncs& s : state.syncs)
    if (s.kind == kind && s.site.line == site.line && s.site.column == site.column &&
        s.site.file == site.file) {
      s.count++;
      return;
    }
  state.syncs.push({site, kind, 0, 1});
}
static bool same_site(EmuSite a, EmuSite b) {
  return a.line == b.line && a.column == b.column && a.file == b.file;
}
static bool before(EmuSite a, EmuSite b) {
  return a.line != b.line ? a.line < b.line : a.column < b.column;
}
static const char* short_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}

// ---- called by the kernel ------------------------------------------------------------------------
static void wait(Wait wait_for, uint32_t argument, EmuSite site) {
  Fiber* fiber = state.current;
  fiber->wait = wait_for;
  fiber->argument = argument;
  fiber->site = site;
  emu_switch(&fiber->sp, state.scheduler);
}
extern "C" {
uint32_t emu_simd(EmuOperation op, const void* value, uint32_t size, EmuSite site) {
  EmuThread& thread = state.current->thread;
  uint32_t half = thread.parity;
  memcpy(thread.simdgroup->slots[half][thread.thread_index_in_simdgroup], value, size);
  thread.parity ^= 1;
  wait(Wait::SIMD, op, site);
  return thread.parity ^ 1;
}
void emu_threadgroup_barrier(uint32_t flags, EmuSite site) {
  wait(Wait::THREADGROUP_BARRIER, flags, site);
}
void emu_simdgroup_barrier(uint32_t flags, EmuSite site) { wait(Wait::SIMDGROUP_BARRIER, flags, site); }

void* emu_threadgroup_variable(uint32_t id, size_t size, const char* name) {
  for (Region& r : state.variables)
    if (r.id == id) return (void*)r.base;
  uint64_t start = (state.arena_used + 15) / 16 * 16;
  state.arena_payload = (state.arena_payload + 15) / 16 * 16 + size;
  if (state.arena_payload > state.result.threadgroup_bytes)
    state.result.threadgroup_bytes = state.arena_payload;
  if (state.arena_payload > THREADGROUP_LIMIT) {
    fail(THREADGROUP_MEMORY, at_site({nullptr, 0, 0}), "%llu bytes with '%s'; a threadgroup has %llu",
         (unsigned long long)state.arena_payload, name, (unsigned long long)THREADGROUP_LIMIT);
    return nullptr;
  }
  state.arena_used = start + size + 16;  // the gap makes an overrun visible
  Region r{(uint64_t)state.arena + start, size, name, WRITABLE, -1, id, state.arena_cells + start,
           nullptr, nullptr};
  state.variables.push(r);
  return (void*)r.base;
}
// clang calls it to round a float to bfloat; only new compiler runtimes have it.
__bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  uint16_t rounded = (uint16_t)(nan ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  __bf16 result;
  memcpy(&result, &rounded, 2);
  return result;
}
}

// ---- rendezvous ----------------------------------------------------------------------------------
struct Lanes {
  uint32_t first, end, live, waiting;  // waiting: for the simdgroup, not for the threadgroup
};
static Lanes survey(uint32_t simdgroup) {
  Lanes lanes{simdgroup * 32, simdgroup * 32 + 32, 0, 0};
  if (lanes.end > state.thread_count) lanes.end = state.thread_count;
  for (uint32_t i = lanes.first; i < lanes.end; i++) {
    Wait w = state.fibers[i].wait;
    lanes.live += w != Wait::FINISHED;
    lanes.waiting += w == Wait::SIMD || w == Wait::SIMDGROUP_BARRIER;
  }
  return lanes;
}
static void report_divergence(const Lanes& lanes, const Fiber& leader, uint32_t mask) {
  uint32_t other = lanes.first;
  while (mask >> (other - lanes.first) & 1) other++;
  const Fiber& absent = state.fibers[other];
  bool barrier = leader.wait == Wait::SIMDGROUP_BARRIER;
  report(barrier ? DIVERGENT_BARRIER : DIVERGENT_SIMD, at_site(leader.site),
         "%s reached by lanes %08x of simdgroup %u only; lane %u %s (%s:%u)",
         barrier ? "simdgroup_barrier" : "simd operation", mask, lanes.first / 32, other - lanes.first,
         absent.wait == Wait::FINISHED ? "has returned" : "waits elsewhere",
         short_name(absent.site.file), absent.site.line);
}
// Lets the lanes that wait at the earliest place go on; they exchange what they brought. All live
// lanes must be there: on a GPU the others' values would be undefined.
static void meet(uint32_t simdgroup, const Lanes& lanes) {
  const Fiber* leader = nullptr;
  for (uint32_t i = lanes.first; i < lanes.end; i++) {
    const Fiber& f = state.fibers[i];
    bool waits = f.wait == Wait::SIMD || f.wait == Wait::SIMDGROUP_BARRIER;
    if (waits && (!leader || before(f.site, leader->site))) leader = &f;
  }
  Wait kind = leader->wait;
  uint32_t mask = 0, half = leader->thread.parity ^ 1, argument = leader->argument;
  for (uint32_t i = lanes.first; i < lanes.end; i++) {
    const Fiber& f = state.fibers[i];
    if (f.wait == kind && same_site(f.site, leader->site)) mask |= 1u << (i - lanes.first);
  }
  uint32_t arrived = (uint32_t)__builtin_popcount(mask);
  bool barrier = kind == Wait::SIMDGROUP_BARRIER;
  if (arrived != lanes.live || (!barrier && lanes.live != lanes.end - lanes.first)) {
    report_divergence(lanes, *leader, mask);
    if (!allowed(barrier ? DIVERGENT_BARRIER : DIVERGENT_SIMD)) return stop_launch();
  }
  EmuSimdgroup& group = state.simdgroups[simdgroup];
  group.mask[half] = mask;
  group.reduced[half] = 0;
  bool matrix = !barrier && argument == EMU_MATRIX;
  count_sync(barrier ? SYNC_SIMDGROUP_BARRIER : matrix ? SYNC_MATRIX : SYNC_SIMD, leader->site);
  if (barrier)
    for (int space = 0; space < 2; space++)
      if (argument >> space & 1) state.epochs.simdgroup[space][simdgroup]++;
  if (arrived == lanes.live) flush_simdgroup(simdgroup);
  for (uint32_t i = lanes.first; i < lanes.end; i++) {
    Fiber& f = state.fibers[i];
    if (!(mask >> (i - lanes.first) & 1)) continue;
    if (!barrier && (f.thread.parity ^ 1) != half) {  // after an allowed divergence the halves differ
      memcpy(group.slots[half][i - lanes.first], group.slots[half ^ 1][i - lanes.first], 64);
      f.thread.parity = half ^ 1;
    }
    f.wait = Wait::READY;
  }
}
// Every thread of the threadgroup waits at a barrier or has finished. Returns whether any waits.
static bool pass_threadgroup_barrier() {
  const Fiber *first = nullptr, *other = nullptr;
  for (uint32_t i = 0; i < state.thread_count; i++)
    if (state.fibers[i].wait != Wait::FINISHED && !first) first = &state.fibers[i];
  if (!first) return false;
  for (uint32_t i = 0; i < state.thread_count && !other; i++) {
    const Fiber& f = state.fibers[i];
    bool same = f.wait != Wait::FINISHED && same_site(f.site, first->site) && f.argument == first->argument;
    if (!same) other = &f;
  }
  bool only_returned = other && other->wait == Wait::FINISHED;
  if (other && !(only_returned && allowed(DIVERGENT_BARRIER))) {
    fail(DIVERGENT_BARRIER, at_site(first->site),
         "threadgroup_barrier reached by thread %u, while thread %u %s (%s:%u)",
         first->thread.thread_index_in_threadgroup, other->thread.thread_index_in_threadgroup,
         only_returned ? "has returned" : "waits at another barrier", short_name(other->site.file),
         other->site.line);
    return false;
  }
  count_sync(SYNC_THREADGROUP_BARRIER, first->site);
  for (int space = 0; space < 2; space++)
    if (first->argument >> space & 1) {
      state.epochs.threadgroup[space]++;
      for (uint32_t s = 0; s < state.simdgroup_count; s++) state.epochs.simdgroup[space][s]++;
    }
  for (uint32_t s = 0; s < state.simdgroup_count; s++) flush_simdgroup(s);
  for (uint32_t i = 0; i < state.thread_count; i++)
    if (state.fibers[i].wait == Wait::THREADGROUP_BARRIER) state.fibers[i].wait = Wait::READY;
  return true;
}

// ---- one threadgroup -----------------------------------------------------------------------------
static void run_fiber() {
  state.launch->entry();
  state.current->wait = Wait::FINISHED;
  emu_switch(&state.current->sp, state.scheduler);
}
static void run_lanes(const Lanes& lanes) {
  bool reverse = state.launch->options & REVERSE;
  for (uint32_t k = lanes.first; k < lanes.end && !state.failed; k++) {
    Fiber& fiber = state.fibers[reverse ? lanes.end - 1 - (k - lanes.first) : k];
    if (fiber.wait != Wait::READY) continue;
    state.current = &fiber;
    emu_thread = &fiber.thread;
    emu_switch(&state.scheduler, fiber.sp);
    state.current = nullptr;
  }
}
static void run_simdgroup(uint32_t simdgroup) {
  while (!state.failed) {
    run_lanes(survey(simdgroup));
    if (state.failed) return;
    Lanes lanes = survey(simdgroup);
    if (!lanes.waiting) return;  // all wait for the threadgroup or have finished
    meet(simdgroup, lanes);
  }
}
static EmuUint3 edge_size() {  // a threadgroup at the edge of the grid has fewer threads
  const uint32_t *grid = state.launch->grid, *tg = state.launch->threadgroup;
  EmuUint3 p = state.group_position;
  auto left = [](uint32_t grid, uint32_t tg, uint32_t p) { return grid - p * tg < tg ? grid - p * tg : tg; };
  return {left(grid[0], tg[0], p.x), left(grid[1], tg[1], p.y), left(grid[2], tg[2], p.z)};
}
static void start_thread(uint32_t i, EmuUint3 size, void** threadgroup_buffers) {
  const uint32_t *grid = state.launch->grid, *tg = state.launch->threadgroup;
  Fiber& fiber = state.fibers[i];
  EmuThread& t = fiber.thread;
  EmuUint3 p = {i % size.x, i / size.x % size.y, i / (size.x * size.y)}, g = state.group_position;
  memset(&t, 0, sizeof t);
  t.thread_position_in_threadgroup = p;
  t.threadgroup_position_in_grid = g;
  t.thread_position_in_grid = {g.x * tg[0] + p.x, g.y * tg[1] + p.y, g.z * tg[2] + p.z};
  t.threads_per_threadgroup = size;
  t.dispatch_threads_per_threadgroup = {tg[0], tg[1], tg[2]};
  t.threads_per_grid = {grid[0], grid[1], grid[2]};
  t.threadgroups_per_grid = state.groups;
  t.thread_index_in_threadgroup = i;
  t.thread_index_in_simdgroup = i % 32;
  t.simdgroup_index_in_threadgroup = i / 32;
  t.simdgroups_per_threadgroup = state.simdgroup_count;
  t.dispatch_simdgroups_per_threadgroup = (tg[0] * tg[1] * tg[2] + 31) / 32;
  t.threads_per_simdgroup = 32;
  t.quadgroup_index_in_threadgroup = i / 4;
  t.thread_index_in_quadgroup = i % 4;
  t.quadgroups_per_threadgroup = (state.thread_count + 3) / 4;
  t.simdgroup = &state.simdgroups[i / 32];
  t.buffers = state.launch->table;
  t.threadgroup_buffers = threadgroup_buffers;
  if (!fiber.stack && !(fiber.stack = new_stack())) abort();
  fiber.sp = fiber_start(fiber.stack + STACK, run_fiber);
  fiber.wait = Wait::READY;
  fiber.site = {nullptr, 0, 0};
}
static void run_threadgroup(uint32_t group) {
  state.group = group;
  EmuUint3 n = state.groups;
  state.group_position = {group % n.x, group / n.x % n.y, group / (n.x * n.y)};
  EmuUint3 size = edge_size();
  state.thread_count = size.x * size.y * size.z;
  state.simdgroup_count = (state.thread_count + 31) / 32;
  memset(&state.epochs, 0, sizeof state.epochs);
  memset((void*)state.arena_cells, 0, state.arena_used * sizeof(Cell));
  memset(state.arena, 0xFF, ARENA);  // NaN to a kernel that reads before it writes
  state.variables.size = 0;
  state.arena_used = state.arena_payload = 0;
  void* threadgroup_buffers[32] = {};
  for (uint32_t i = 0; i < state.launch->threadgroup_buffer_count && !state.failed; i++)
    if (uint64_t bytes = state.launch->threadgroup_buffer_sizes[i])
      threadgroup_buffers[i] = emu_threadgroup_variable(~i, bytes, "[[threadgroup]] argument");
  for (uint32_t i = 0; i < state.thread_count; i++) start_thread(i, size, threadgroup_buffers);
  do {
    for (uint32_t k = 0; k < state.simdgroup_count && !state.failed; k++)
      run_simdgroup(state.launch->options & REVERSE ? state.simdgroup_count - 1 - k : k);
  } while (!state.failed && pass_threadgroup_barrier());
  if (state.failed) return;
  for (uint32_t s = 0; s < state.simdgroup_count; s++) flush_simdgroup(s);
  state.result.threadgroups_run++;
}
#include "entry.h"
