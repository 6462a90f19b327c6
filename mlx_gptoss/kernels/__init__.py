"""Our Metal kernels: one stem for the file in `metal/`, the wrapper, its meaning and its test.

    launch        a .metal file as an mx.fast.metal_kernel; checks of inputs
    matrix        how a weight matrix enters a kernel
    projections, attention, experts, grouped, sampling    the wrappers
    batches       from how many rows on a step groups its experts, or takes MLX's products
    products      those products
    definitions   each kernel's meaning in plain MLX, under the same signature
    inputs        sizes, weights and random numbers
    cases         of which each kernel's inputs are made
    registry      all of it by stem
    trials        the sizes on which a kernel must agree before it runs a model
    agreement     whether it agrees with its meaning, here, on this machine
    selection     which kernels run

Nothing outside this package reads `metal/`.
"""
