// What Python hands to a launch and reads back (mirrored by runtime.py), and the state of the launch.
#pragma once
#include <stdint.h>

#include "msl_abi.h"

// The order is that of CHECKS in report.py.
enum Check : uint32_t {
  OUT_OF_BOUNDS, ARRAY_INDEX, READ_ONLY, UNINITIALISED, THREADGROUP_RACE, DEVICE_RACE, LOCKSTEP,
  DIVERGENT_BARRIER, DIVERGENT_SIMD, THREADGROUP_MEMORY, MISALIGNED, DIVISION_BY_ZERO, INVALID_ACCESS,
};
enum Option : uint32_t { INSTRUMENTED = 1, REVERSE = 2 };
enum BufferFlag : uint32_t { WRITABLE = 1, INITIALISED = 2 };
enum AccessKind : uint32_t { LOAD, STORE };
enum SyncKind : uint32_t { SYNC_SIMD, SYNC_MATRIX, SYNC_THREADGROUP_BARRIER, SYNC_SIMDGROUP_BARRIER };

extern "C" {
struct EmuBuffer {
  uint64_t base, size;
  const char* name;
  uint32_t flags, reserved;
  uint64_t distinct_load_sectors, distinct_store_sectors;  // summed over threadgroups
  uint64_t bytes_written, first_unwritten;
};
struct EmuLaunch {
  void (*entry)();
  uint32_t grid[3], threadgroup[3];
  void** table;
  EmuBuffer* buffers;
  const uint64_t* threadgroup_buffer_sizes;
  const uint64_t* threadgroups;  // linear indices of those to run, in this order
  uint64_t threadgroup_count;
  uint32_t buffer_count, threadgroup_buffer_count, options;
  uint32_t allowed;  // bit set of checks that do not count
};
// Loads or stores of one instruction of the program to one buffer (-1: threadgroup memory). An
// instruction is what the lanes of a simdgroup execute together between two rendezvous.
struct EmuAccesses {
  uint64_t pc;
  int32_t buffer;
  uint32_t kind;
  uint64_t instructions, lanes, bytes, sectors, lines, conflicts;
};
struct EmuSyncs {
  EmuSite site;
  uint32_t kind, reserved;
  uint64_t count;
};
struct EmuFinding {
  uint32_t check;
  int32_t buffer;
  uint64_t pc;  // 0: the place is site
  EmuSite site;
  uint64_t occurrences;
  char text[400];
};
struct EmuResult {
  EmuAccesses* accesses;
  EmuSyncs* syncs;
  EmuFinding* findings;
  uint32_t access_count, sync_count, finding_count, stopped;
  uint64_t image_base, threadgroup_bytes, threadgroups_run;
};
}
