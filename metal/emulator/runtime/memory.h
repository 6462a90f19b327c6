// The device heap: buffers lie far apart in address space that nobody may touch, each with its end
// close to the guard, so that even an uninstrumented kernel faults when it leaves its buffer.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "launch.h"

// A growing array of plain data; the runtime links no C++ library.
template <class T> struct Array {
  T* data = nullptr;
  uint32_t size = 0, capacity = 0;
  T& operator[](uint64_t i) { return data[i]; }
  T* begin() { return data; }
  T* end() { return data + size; }
  T& push(const T& value) {
    if (size == capacity) reserve(capacity ? capacity * 2 : 16);
    return data[size++] = value;
  }
  void reserve(uint32_t n) {
    if (n <= capacity) return;
    data = (T*)realloc((void*)data, n * sizeof(T));
    if (!data) abort();
    capacity = n;
  }
  void resize_zeroed(uint32_t n) {
    reserve(n);
    if (n > size) memset((void*)(data + size), 0, (n - size) * sizeof(T));
    size = n;
  }
  void release() {
    free((void*)data);
    data = nullptr;
    size = capacity = 0;
  }
};

constexpr uint64_t PAGE = 1 << 14;  // Apple's; a multiple of Linux's
constexpr uint64_t GUARD = 1 << 20;
constexpr uint64_t HEAP = 1ull << 36;
static uint64_t heap_base, heap_used;

static bool in_heap(uint64_t address) { return heap_base && address - heap_base < HEAP; }

// Fresh zero pages; the last byte of the buffer is less than 128 bytes away from a guard.
extern "C" void* emu_allocate(uint64_t size) {
  if (!heap_base) {
    void* p = mmap(nullptr, HEAP, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    heap_base = (uint64_t)p;
  }
  uint64_t pages = (size + PAGE) / PAGE * PAGE;
  if (heap_used + pages + 2 * GUARD > HEAP) return nullptr;
  uint64_t start = heap_base + heap_used + GUARD;
  heap_used += pages + GUARD;
  if (mprotect((void*)start, pages, PROT_READ | PROT_WRITE)) return nullptr;
  return (void*)(start + ((pages - size) & ~127ull));
}
// Gives every buffer back.
extern "C" void emu_free_all() {
  if (heap_base) munmap((void*)heap_base, HEAP);
  heap_base = heap_used = 0;
}
