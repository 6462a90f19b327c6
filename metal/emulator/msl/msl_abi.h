// The contract between a compiled kernel and the runtime: what a GPU thread is, and the calls it makes.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct EmuUint3 {
  uint32_t x, y, z;
};

// One place in the kernel source. Two lanes meet in a simd operation when their sites are equal:
// a machine address would not do, since inlining and unrolling copy code.
struct EmuSite {
  const char* file;
  uint32_t line, column;
};

// Where the lanes of one simdgroup exchange values. Two halves alternate, so that a fast lane's
// next operation cannot overwrite what a slow lane has yet to read.
struct EmuSimdgroup {
  alignas(64) unsigned char slots[2][32][64];
  unsigned char result[2][64];
  uint32_t mask[2];     // lanes that took part
  uint32_t reduced[2];  // whether result holds the reduction of the slots
};

// One GPU thread. The members carry Metal's attribute names, so that `[[name]]` binds to `.name`.
struct EmuThread {
  EmuUint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  EmuUint3 threads_per_threadgroup, dispatch_threads_per_threadgroup;
  EmuUint3 threads_per_grid, threadgroups_per_grid;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, threads_per_simdgroup;
  uint32_t quadgroup_index_in_threadgroup, thread_index_in_quadgroup, quadgroups_per_threadgroup;
  uint32_t parity;  // half of the simdgroup's slots that the next operation uses
  EmuSimdgroup* simdgroup;
  void** buffers;
  void** threadgroup_buffers;  // [[threadgroup(n)]] arguments
};

enum EmuOperation { EMU_SHUFFLE, EMU_REDUCE, EMU_BALLOT, EMU_PREFIX, EMU_MATRIX, EMU_OPERATIONS };

// A store alone needs no value before it.
enum EmuAtomic { EMU_ATOMIC_READS, EMU_ATOMIC_STORES };

#define EMU_CONVERGENT __attribute__((convergent))
#ifndef MSL_PTX
extern "C" {
extern EmuThread* emu_thread;  // the running thread
// Deposits a value, waits for the other lanes, returns the half of the slots to read.
EMU_CONVERGENT uint32_t emu_simd(EmuOperation op, const void* value, uint32_t size, EmuSite site);
EMU_CONVERGENT void emu_threadgroup_barrier(uint32_t flags, EmuSite site);
EMU_CONVERGENT void emu_simdgroup_barrier(uint32_t flags, EmuSite site);
// The threadgroup's one copy of a variable, made when the first thread asks for it.
void* emu_threadgroup_variable(uint32_t id, size_t size, const char* name);
void emu_atomic(const void* address, uint32_t size, EmuAtomic kind, EmuSite site);
}
#endif
