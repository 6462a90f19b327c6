"""Our Metal kernels: one stem for the file in `metal/`, the wrapper, its meaning and its test.

    launch        a .metal file as an mx.fast.metal_kernel; checks of inputs
    matrix        how a weight matrix enters a kernel
    projections, attention, experts, grouped, sampling    the wrappers
    batches       from how many rows on a step groups its experts
    definitions   each kernel's meaning in plain MLX, under the same signature
    cases         random inputs for each kernel
    registry      all of it by stem
    agreement     whether a kernel agrees with its meaning, here, on this machine

Nothing outside this package reads `metal/`.
"""
