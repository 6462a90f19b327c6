"""What is read of PTX: operands, source lines, and what Apple's instruction set makes needless."""

from mlx_gptoss.metal.emulator.ptx_code import free_on_apple, instructions

KERNEL = """
.visible .func kernel(
\t.param .b64 kernel_param_0
)
{
\t.reg .b32 \t%r<9>;
$L__BB0_1:                              //   Parent Loop BB0_3 Depth=1
                                        // =>  This Inner Loop Header: Depth=2
\t.loc\t2 27 69                         // row.metal:27:69 @[ kernel (source):2:1 ]
\tmul.wide.u32 \t%rd2, %r1, 16;
\tadd.s64 \t%rd3, %rd1, %rd2;
\tld.v2.b32 \t{%r2, %r3}, [%rd3];
\t.loc\t4 54 31                         // half.h:54:31 @[ half.h:63:3 @[ row.metal:52:29 ] ]
\tmov.b32 \t{%rs1, %rs2}, %r2;
\tcvt.f32.f16 \t%r4, %rs1;
\tfma.rn.f32 \t%r5, %r4, %r6, %r7;
\t.loc\t2 0 69                          // row.metal:0:69
\t@%p1 bra \t$L__BB0_1;
MORE\tst.b32 \t[%rd9], %r5;
\tret;
}
.visible .entry emu_entry() {
\tret;
}
"""
NEEDLESS = ["mul.wide.u32", "add.s64", "mov.b32", "cvt.f32.f16"]


def needless(more: str) -> list[str]:
    code = instructions(KERNEL.replace("MORE", more))
    return [code[at].opcode for at in sorted(free_on_apple(code))]


def test_operands_and_lines() -> None:
    code = instructions(KERNEL.replace("MORE", ""))
    assert [one.opcode for one in code] == [
        *NEEDLESS[:2], "ld.v2.b32", *NEEDLESS[2:], "fma.rn.f32", "bra", "st.b32", "ret"
    ]  # fmt: skip
    load, widen, store = code[2], code[4], code[7]
    assert (load.writes, load.reads, load.address) == (("%r2", "%r3"), (), ("%rd3",))
    assert (store.writes, store.reads, store.address) == ((), ("%r5",), ("%rd9",))
    assert load.places == (("row.metal", 27), ("(source)", 2))
    assert widen.places == (("half.h", 54), ("half.h", 63), ("row.metal", 52))
    assert store.places == (("row.metal", 0),)
    assert {one.depth for one in code} == {2}


def test_what_apple_does_by_itself() -> None:
    assert needless("") == NEEDLESS


def test_what_is_used_otherwise_is_not_free() -> None:
    assert needless("\tst.b32 \t[%rd9], %r4;\n") == NEEDLESS[:3]  # the widened half is stored
    assert needless("\tld.b32 \t%r8, [%rd3+64];\n") == NEEDLESS[2:]  # base, index and a constant
    assert needless("\tst.b64 \t[%rd9], %rd2;\n") == NEEDLESS[1:]  # the index is a value, too
    assert needless("\tst.b64 \t[%rd9], %rd3;\n") == NEEDLESS[2:]  # so is the address
