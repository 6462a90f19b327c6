// How an entry point binds a kernel's parameters, and how it describes them to Python.
#pragma once
#include "msl_abi.h"

template <class F> struct emu_signature;
template <class... A> struct emu_types {};
template <class R, class... A> struct emu_signature<R(A...)> {
  using types = emu_types<A...>;
};
template <int I, class L> struct emu_type_at;
template <int I, class H, class... T>
struct emu_type_at<I, emu_types<H, T...>> : emu_type_at<I - 1, emu_types<T...>> {};
template <class H, class... T> struct emu_type_at<0, emu_types<H, T...>> { using type = H; };

// The argument for a parameter of type T: a value that describes the thread, or a buffer.
template <class T> struct emu_bind {
  static T value(uint32_t u) { return T(u); }
  static T value(EmuUint3 u) {
    using E = typename emu_vector<T>::element;
    if constexpr (emu_vector<T>::lanes == 0) return T(u.x);
    else if constexpr (emu_vector<T>::lanes == 2) return T{E(u.x), E(u.y)};
    else return T{E(u.x), E(u.y), E(u.z)};
  }
};
template <class T> struct emu_bind<T*> {
  static T* pointer(void* p) { return (T*)p; }
};
template <class T> struct emu_bind<T&> {
  static T& pointer(void* p) { return *(T*)p; }
};

template <class T> constexpr const char* emu_dtype() {
  using E = typename emu_vector<metal::remove_cv_t<T>>::element;
  if (metal::is_same_v<E, bool>) return "bool";
  if (metal::is_same_v<E, float>) return "float32";
  if (metal::is_same_v<E, half>) return "float16";
  if (metal::is_same_v<E, bfloat>) return "bfloat16";
  if constexpr (metal::is_integral_v<E>) {
    constexpr bool has_sign = metal::is_signed_v<E>;
    constexpr int bytes = sizeof(E);
    return bytes == 1   ? (has_sign ? "int8" : "uint8")
           : bytes == 2 ? (has_sign ? "int16" : "uint16")
           : bytes == 4 ? (has_sign ? "int32" : "uint32")
                        : (has_sign ? "int64" : "uint64");
  }
  return "";  // a struct, or void: any bytes
}
struct EmuParameter {
  const char* dtype;
  uint32_t size, read_only, reference;
};
template <class T> struct emu_describe {
  static constexpr EmuParameter value{"", 0, 1, 0};
};
template <class T> struct emu_describe<T*> {
  static constexpr EmuParameter value{emu_dtype<T>(), sizeof(T), __is_const(T), 0};
};
template <> struct emu_describe<void*> {
  static constexpr EmuParameter value{"", 1, 0, 0};
};
template <> struct emu_describe<const void*> {
  static constexpr EmuParameter value{"", 1, 1, 0};
};
template <class T> struct emu_describe<T&> {
  static constexpr EmuParameter value{emu_dtype<T>(), sizeof(T), __is_const(T), 1};
};
