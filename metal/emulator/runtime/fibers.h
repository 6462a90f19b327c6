// One fiber per GPU thread: a stack of its own and a switch that saves what the ABI says a call keeps.
#pragma once
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

extern "C" void emu_switch(void** save, void* to);

#if defined(__APPLE__)
#define EMU_SYMBOL "_emu_switch"
#else
#define EMU_SYMBOL "emu_switch"
#endif
#if defined(__x86_64__)
asm(".text\n.globl " EMU_SYMBOL "\n" EMU_SYMBOL ":\n" R"(
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
// A stack that looks as if `entry` had called emu_switch: six registers, the return address.
static void* fiber_start(char* top, void (*entry)()) {
  uint64_t* sp = (uint64_t*)((uint64_t)top & ~15ull);
  *--sp = 0;  // entry's own return address: it never returns
  *--sp = (uint64_t)entry;
  for (int i = 0; i < 6; i++) *--sp = 0;
  return sp;
}
#elif defined(__aarch64__)
asm(".text\n.globl " EMU_SYMBOL "\n" EMU_SYMBOL ":\n" R"(
  sub sp, sp, #176
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
)");
static void* fiber_start(char* top, void (*entry)()) {
  uint64_t* sp = (uint64_t*)(((uint64_t)top & ~15ull) - 176);
  memset(sp, 0, 176);
  sp[11] = (uint64_t)entry;  // x30, the link register
  return sp;
}
#else
#error "fibers are written for x86-64 and arm64"
#endif

constexpr uint64_t STACK = 128 << 10;
constexpr uint64_t STACK_GUARD = 16 << 10;

// The low end is a guard: a thread that overflows its stack faults.
static char* new_stack() {
  void* p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  mprotect(p, STACK_GUARD, PROT_NONE);
  return (char*)p;
}
