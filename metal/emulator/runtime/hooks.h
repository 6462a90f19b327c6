// What the instrumented kernel calls: -fsanitize=kernel-address with outlined checks turns every load
// and store into a call, -fsanitize=alignment,bounds,integer-divide-by-zero calls only on failure.
#pragma once
#include "shadow.h"
#include "traffic.h"

static Region* find_region(uint64_t address) {
  bool in_arena = address - (uint64_t)state.arena < ARENA;
  for (Region& r : in_arena ? state.variables : state.buffers)
    if (address - r.base < r.size) return &r;
  return nullptr;
}
static void out_of_bounds(uint64_t address, uint64_t size, AccessKind kind, Place place) {
  bool in_arena = address - (uint64_t)state.arena < ARENA;
  if (!in_arena && !in_heap(address))
    return fail(INVALID_ACCESS, place, address < GUARD ? "null pointer: no buffer is bound there"
                                                       : "the address belongs to no buffer");
  const Region* nearest = nullptr;
  uint64_t nearest_distance = ~0ull;
  for (Region& r : in_arena ? state.variables : state.buffers) {
    uint64_t distance = address < r.base ? r.base - address : address - r.base;
    if (distance < nearest_distance) nearest = &r, nearest_distance = distance;
  }
  if (nearest) place.buffer = nearest->buffer;
  fail(OUT_OF_BOUNDS, place, "%s of %llu bytes at byte %lld of %s '%s', which has %llu bytes",
       kind == LOAD ? "load" : "store", (unsigned long long)size,
       nearest ? (long long)(address - nearest->base) : 0ll,
       in_arena ? "threadgroup variable" : "buffer", nearest ? nearest->name : "(none bound)",
       nearest ? (unsigned long long)nearest->size : 0ull);
}

static void on_access(uint64_t address, uint64_t size, AccessKind kind, uint64_t pc) {
  bool shared = address - (uint64_t)state.arena < ARENA;
  if (!shared && !in_heap(address)) return;  // the thread's own stack, or constants of the program
  Region* region = find_region(address);
  Place place = at_pc(pc, region ? region->buffer : -1);
  if (!region || address + size > region->base + region->size)
    return out_of_bounds(address, size, kind, place);
  uint64_t offset = address - region->base;
  if (kind == STORE && !(region->flags & WRITABLE))
    return fail(READ_ONLY, place, "store to byte %llu of read-only buffer '%s'",
                (unsigned long long)offset, region->name);
  if (region->cells) check_shadow(*region, offset, size, kind, PLAIN, place);
  count_access(*region, offset, size, kind, pc);
}

// A load or store of 16 bytes is of a vector, also where one component is used, which clang's own
// check passes by. Structs are copied in pieces of at most 8, or by memcpy.
static void on_sized_access(uint64_t address, uint64_t size, AccessKind kind, uint64_t pc) {
  const Region* region = size == 16 && address % 16 ? find_region(address) : nullptr;
  if (region)
    return fail(MISALIGNED, at_pc(pc, region->buffer), "16-byte %s at byte %llu of '%s'",
                kind == LOAD ? "load" : "store", (unsigned long long)(address - region->base),
                region->name);
  on_access(address, size, kind, pc);
}

#define RETURN_ADDRESS ((uint64_t)__builtin_return_address(0))
// Apple's clang names them without the suffix.
#define HOOK(size)                                                                                \
  extern "C" void __asan_load##size##_noabort(uint64_t address) {                                 \
    if (tracing()) on_sized_access(address, size, LOAD, RETURN_ADDRESS);                          \
  }                                                                                               \
  extern "C" void __asan_store##size##_noabort(uint64_t address) {                                \
    if (tracing()) on_sized_access(address, size, STORE, RETURN_ADDRESS);                         \
  }                                                                                               \
  extern "C" void __asan_load##size(uint64_t address) {                                           \
    if (tracing()) on_sized_access(address, size, LOAD, RETURN_ADDRESS);                          \
  }                                                                                               \
  extern "C" void __asan_store##size(uint64_t address) {                                          \
    if (tracing()) on_sized_access(address, size, STORE, RETURN_ADDRESS);                         \
  }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16)
extern "C" {
void __asan_loadN_noabort(uint64_t address, uint64_t size) {
  if (tracing()) on_access(address, size, LOAD, RETURN_ADDRESS);
}
void __asan_storeN_noabort(uint64_t address, uint64_t size) {
  if (tracing()) on_access(address, size, STORE, RETURN_ADDRESS);
}
void __asan_loadN(uint64_t address, uint64_t size) {
  if (tracing()) on_access(address, size, LOAD, RETURN_ADDRESS);
}
void __asan_storeN(uint64_t address, uint64_t size) {
  if (tracing()) on_access(address, size, STORE, RETURN_ADDRESS);
}
// Structs are copied by memcpy, which the instrumentation would otherwise leave bare.
void* __asan_memcpy(void* to, const void* from, size_t size) {
  if (tracing() && size) {
    on_access((uint64_t)from, size, LOAD, RETURN_ADDRESS);
    on_access((uint64_t)to, size, STORE, RETURN_ADDRESS);
  }
  return memcpy(to, from, size);
}
void* __asan_memmove(void* to, const void* from, size_t size) {
  if (tracing() && size) {
    on_access((uint64_t)from, size, LOAD, RETURN_ADDRESS);
    on_access((uint64_t)to, size, STORE, RETURN_ADDRESS);
  }
  return memmove(to, from, size);
}
void* __asan_memset(void* to, int value, size_t size) {
  if (tracing() && size) on_access((uint64_t)to, size, STORE, RETURN_ADDRESS);
  return memset(to, value, size);
}
void __asan_handle_no_return() {}
void __asan_init() {}
void __asan_version_mismatch_check_v8() {}
void __asan_register_globals(void*, uint64_t) {}
void __asan_unregister_globals(void*, uint64_t) {}
void __asan_register_elf_globals(void*, void*, void*) {}
void __asan_unregister_elf_globals(void*, void*, void*) {}

void emu_atomic(const void* pointer, uint32_t size, EmuAtomic kind, EmuSite site) {
  if (!tracing()) return;
  uint64_t address = (uint64_t)pointer;
  Region* region = find_region(address);
  if (!region || address + size > region->base + region->size)
    return out_of_bounds(address, size, STORE, at_site(site));
  if (!(region->flags & WRITABLE))
    return fail(READ_ONLY, at_site(site), "atomic operation on read-only buffer '%s'", region->name);
  uint64_t offset = address - region->base;
  const bool unwritten = region->cells[offset].write.state == UNTOUCHED && !(region->flags & INITIALISED);
  if (kind == EMU_ATOMIC_READS && unwritten)
    report(UNINITIALISED, at_site(site), "atomic operation on byte %llu of '%s', which nobody wrote",
           (unsigned long long)offset, region->name);
  check_shadow(*region, offset, size, STORE, ATOMIC, at_site(site));
}
}

// Handlers of the undefined-behaviour checks. The data they get is laid out by clang.
struct UbType {
  uint16_t kind, info;
  char name[1];
};
struct UbOutOfBounds {
  EmuSite site;
  UbType *array, *index;
};
struct UbTypeMismatch {
  EmuSite site;
  UbType* type;
  uint8_t log_alignment, kind;
};
static void index_out_of_bounds(UbOutOfBounds* data, uint64_t index) {
  if (state.current)
    fail(ARRAY_INDEX, at_site(data->site), "index %lld in an array of type %s", (long long)index,
         data->array->name);
}
// Ends the launch: compiled for an aligned address, the access itself may fault.
static void wrong_pointer(UbTypeMismatch* data, uint64_t pointer) {
  if (!state.current) return;
  if (!pointer) return fail(INVALID_ACCESS, at_site(data->site), "null pointer: no buffer is bound there");
  Place place = at_site(data->site);
  unsigned wanted = 1u << data->log_alignment;
  const Region* region = find_region(pointer);
  if (!region)
    return fail(MISALIGNED, place, "the address is no multiple of %u, as type %s needs", wanted,
                data->type->name);
  place.buffer = region->buffer;
  fail(MISALIGNED, place, "byte %llu of '%s' is no multiple of %u, as type %s needs",
       (unsigned long long)(pointer - region->base), region->name, wanted, data->type->name);
}
static void division(EmuSite* site) {
  if (state.current)
    fail(DIVISION_BY_ZERO, at_site(*site), "the divisor is 0, or the quotient overflows");
}
extern "C" {
void __ubsan_handle_type_mismatch_v1(UbTypeMismatch* data, uint64_t pointer) { wrong_pointer(data, pointer); }
void __ubsan_handle_type_mismatch_v1_abort(UbTypeMismatch* data, uint64_t pointer) { wrong_pointer(data, pointer); }
void __ubsan_handle_out_of_bounds(UbOutOfBounds* data, uint64_t i) { index_out_of_bounds(data, i); }
void __ubsan_handle_out_of_bounds_abort(UbOutOfBounds* data, uint64_t i) { index_out_of_bounds(data, i); }
void __ubsan_handle_divrem_overflow(EmuSite* site, uint64_t, uint64_t) {
  division(site);
}
void __ubsan_handle_divrem_overflow_abort(EmuSite* site, uint64_t, uint64_t) {
  division(site);
}
}
