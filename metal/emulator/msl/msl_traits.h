// <metal_type_traits> and <metal_limits>.
#pragma once
namespace metal {
using ::as_type;
template <class T, T Value> struct integral_constant {
  static constexpr T value = Value;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return Value; }
  constexpr T operator()() const { return Value; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <class T, class... Ts> constexpr bool emu_any_of = (is_same_v<T, Ts> || ...);

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> struct remove_volatile { using type = T; };
template <class T> struct remove_volatile<volatile T> { using type = T; };
template <class T> struct remove_cv : remove_volatile<typename remove_const<T>::type> {};
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T&> { using type = T; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> struct remove_pointer { using type = T; };
template <class T> struct remove_pointer<T*> { using type = T; };
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;
template <class T> using remove_addrspace_t = remove_cv_t<T>;

template <class T>
constexpr bool is_integral_v = emu_any_of<remove_cv_t<T>, bool, char, signed char, uchar, short,
                                          ushort, int, uint, long, ulong, long long,
                                          unsigned long long>;
template <class T> constexpr bool is_floating_point_v = emu_any_of<remove_cv_t<T>, float, half, bfloat>;
template <class T> constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> constexpr bool is_void_v = is_same_v<remove_cv_t<T>, void>;
template <class T> constexpr bool is_unsigned_v = T(-1) > T(0);
template <class T> constexpr bool is_signed_v = T(-1) < T(0);
template <class A, class B> constexpr bool is_convertible_v = __is_convertible_to(A, B);
template <class T> constexpr bool is_pointer_v = __is_pointer(T);
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class A, class B> struct is_convertible : bool_constant<is_convertible_v<A, B>> {};

// <metal_uniform>: a value that all threads share; nothing to gain from it here.
template <class T> using uniform = T;
template <class T> EMU_INLINE constexpr T make_uniform(T x) { return x; }

template <class T> struct numeric_limits {
  static constexpr bool is_signed = is_signed_v<T>;
  static constexpr int digits = int(sizeof(T)) * 8 - is_signed;
  static constexpr T max() { return is_signed ? T((1ull << (sizeof(T) * 8 - 1)) - 1) : T(-1); }
  static constexpr T min() { return is_signed ? T(1ull << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T lowest() { return min(); }
};
template <class T> struct emu_float_limits {
  static constexpr bool is_signed = true;
  static constexpr T lowest() { return -numeric_limits<T>::max(); }
  static constexpr T infinity() { return T(__builtin_inff()); }
  static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }
};
template <> struct numeric_limits<float> : emu_float_limits<float> {
  static constexpr float max() { return 3.402823466e+38f; }
  static constexpr float min() { return 1.17549435e-38f; }
  static constexpr float epsilon() { return 1.1920929e-7f; }
};
template <> struct numeric_limits<half> : emu_float_limits<half> {
  static constexpr half max() { return half(65504.0f); }
  static constexpr half min() { return half(6.103515625e-5f); }
  static constexpr half epsilon() { return half(9.765625e-4f); }
};
template <> struct numeric_limits<bfloat> : emu_float_limits<bfloat> {
  static constexpr bfloat max() { return bfloat(3.38953139e38f); }
  static constexpr bfloat min() { return bfloat(1.17549435e-38f); }
  static constexpr bfloat epsilon() { return bfloat(7.8125e-3f); }
};
}  // namespace metal
