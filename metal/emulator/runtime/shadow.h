// Races and uninitialised reads: every byte of writable memory remembers its last writer and reader.
//
// Two accesses of different threads, one of them a write, conflict unless a barrier of the right kind
// lies between them. Between threads of one simdgroup a simdgroup barrier is enough; without one the
// kernel relies on lanes running in lock-step, which Metal does not promise. No barrier orders
// threadgroups. Device memory remembers one reader only, so a write after two threads' reads may go
// unnoticed in one schedule order; the reverse order sees the write first.
#pragma once
#include "state.h"

enum MarkState : uint8_t { UNTOUCHED, PLAIN, ATOMIC };
constexpr uint16_t MANY_THREADS = 0xFFFF;
constexpr uint8_t MANY_SIMDGROUPS = 0xFF;
constexpr uint32_t MANY_GROUPS = 0xFFFFFFFF;
struct Mark {
  uint32_t group, epoch, simd_epoch;
  uint16_t thread;
  uint8_t simdgroup;
  MarkState state;
};
struct Cell {
  Mark write, read;
};
enum Conflict { NO_CONFLICT, LOCKSTEP_CONFLICT, RACE };

static Mark mark_of(const EmuThread& t, Space space, MarkState kind) {
  uint32_t simdgroup = t.simdgroup_index_in_threadgroup;
  return {state.group, state.epochs.threadgroup[space], state.epochs.simdgroup[space][simdgroup],
          (uint16_t)t.thread_index_in_threadgroup, (uint8_t)simdgroup, kind};
}
static Conflict conflict(const Mark& old, const Mark& mine) {
  if (old.state == UNTOUCHED || (old.state == ATOMIC && mine.state == ATOMIC)) return NO_CONFLICT;
  if (old.group != mine.group) return RACE;
  if (old.thread == mine.thread || old.epoch != mine.epoch) return NO_CONFLICT;
  if (old.simdgroup != mine.simdgroup) return RACE;
  return old.simd_epoch == mine.simd_epoch ? LOCKSTEP_CONFLICT : NO_CONFLICT;
}
// The readers of one epoch, folded into one mark.
static void add_reader(Mark& readers, const Mark& mine, Space space) {
  bool other_group = readers.state != UNTOUCHED && readers.group != mine.group;
  bool same_epoch = readers.state != UNTOUCHED && !other_group && readers.epoch == mine.epoch;
  Mark old = readers;
  readers = mine;
  if (other_group && space == DEVICE) readers.group = MANY_GROUPS;
  if (!same_epoch || old.thread == mine.thread) return;
  readers.thread = MANY_THREADS;
  if (old.simdgroup != mine.simdgroup) readers.simdgroup = MANY_SIMDGROUPS;
  if (old.simd_epoch > mine.simd_epoch) readers.simd_epoch = old.simd_epoch;
}

static void report_conflict(Conflict found, const Region& region, Space space, uint64_t offset,
                            const Mark& old, bool store, const char* earlier, Place place) {
  const char* what = store ? "written" : "read";
  if (found == LOCKSTEP_CONFLICT)
    report(LOCKSTEP, place, "byte %llu of '%s' is %s after a %s by another lane of the simdgroup with "
           "no simdgroup_barrier between", (unsigned long long)offset, region.name, what, earlier);
  else if (old.group != state.group)
    report(DEVICE_RACE, place, "byte %llu of '%s' is %s after a %s by another threadgroup",
           (unsigned long long)offset, region.name, what, earlier);
  else
    report(space == DEVICE ? DEVICE_RACE : THREADGROUP_RACE, place,
           "byte %llu of '%s' is %s after a %s by thread %d with no barrier for this memory between",
           (unsigned long long)offset, region.name, what, earlier,
           old.thread == MANY_THREADS ? -1 : (int)old.thread);
}

// Checks and marks the bytes of one access.
static void check_shadow(Region& region, uint64_t offset, uint64_t size, AccessKind kind,
                         MarkState mode, Place place) {
  Space space = region.buffer < 0 ? THREADGROUP : DEVICE;
  Mark mine = mark_of(state.current->thread, space, mode);
  bool store = kind == STORE;
  for (uint64_t i = offset; i < offset + size; i++) {
    Cell& cell = region.cells[i];
    if (!store && cell.write.state == UNTOUCHED && !(region.flags & INITIALISED)) {
      report(UNINITIALISED, place, "byte %llu of '%s' is read and nobody wrote it",
             (unsigned long long)i, region.name);
      break;
    }
    Conflict with_write = conflict(cell.write, mine);
    Conflict with_read = store ? conflict(cell.read, mine) : NO_CONFLICT;
    if (with_write || with_read) {
      bool read_first = with_read > with_write;
      report_conflict(read_first ? with_read : with_write, region, space, i,
                      read_first ? cell.read : cell.write, store, read_first ? "read" : "write", place);
    }
    if (store) cell.write = mine;
    else add_reader(cell.read, mine, space);
  }
}
