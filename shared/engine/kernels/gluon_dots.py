"""Rows of weights, in NVFP4 or bfloat16, times activations, in Gluon; a thread has whole units of them at a time.

An FP4 code's bits are those of an fp16, but for 2^14; `experts.Experts` says how they lie, two at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shared.engine.kernels.gluon_rows import begin_in_turn


@gluon.jit
def decode(codes):
    """uint8 [..., 16] -> the first and the second codes of `words` as fp16 [..., 16], times 2^-4."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d, larger;
        and.b32 a, $4, 0x8E008E00;
        shl.b32 b, $4, 3;
        and.b32 b, b, 0x8E008E00;
        and.b32 c, $4, 0x40384038;
        mul.lo.u32 c, c, 66;
        and.b32 c, c, 0x8E008E00;
        and.b32 d, $4, 0x20072007;
        mul.lo.u32 d, d, 516;
        and.b32 d, d, 0x8E008E00;
        mov.b32 larger, 0x64006400;
        mul.rn.f16x2 $0, a, larger;
        mul.rn.f16x2 $1, b, larger;
        mul.rn.f16x2 $2, c, larger;
        mul.rn.f16x2 $3, d, larger;
        }
        """,
        "=r,=r,=r,=r,r",
        [codes],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _times(a, b):
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _plus(a, b, c):
    """a b + c."""
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _sum(a, b):
    return gl.inline_asm_elementwise(
        "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _halves(x):
    """The first and the second half of the last dimension, of three or four."""
    if len(x.shape) == 3:
        parts = gl.permute(gl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2]), (0, 1, 3, 2))
    else:
        parts = gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], 2, x.shape[3] // 2])
        parts = gl.permute(parts, (0, 1, 2, 4, 3))
    return gl.split(parts)


@gluon.jit
def dots(codes, x, layout: gl.constexpr):
    """Sums over the last dimension, of 16, of products of codes with fp16, two at a time: to float32. `layout` is that
    of the sums."""
    codes, x = gl.broadcast(codes, x)
    c, d = _halves(codes)
    y, z = _halves(x)
    c0, c1 = _halves(c)
    y0, y1 = _halves(y)
    d0, d1 = _halves(d)
    z0, z1 = _halves(z)
    near, far = _halves(_plus(d1, z1, _plus(d0, z0, _plus(c1, y1, _times(c0, y0)))))
    total = _sum(near, far)
    return gl.convert_layout(gl.sum(total.to(gl.float32), len(codes.shape) - 1), layout)


@gluon.jit
def scale_of(bits):
    """e4m3 without a sign, as uint8, to float32: the value times 2^-8."""
    return (bits.to(gl.int16) << 7).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def packed_sums(source, weight, scale, row, K: gl.constexpr, UNITS: gl.constexpr, layout: gl.constexpr):
    """Rows `row` of packed weights times one row of x, of which a thread has units of 16 at `source`: by unit."""
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    each = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]
    place = weight + row[:, None][:, :, None] * (K // 2) + unit[:, :, None] * 16 + each
    scales = scale + row[:, None] * (K // 16) + unit
    of_sums: gl.constexpr = gl.SliceLayout(2, layout)
    sums = gl.zeros([row.shape[0], UNITS], gl.float32, of_sums)
    ahead, low_ahead, high_ahead = gl.load(place), gl.load(scales), gl.load(scales + K // 32)
    for start in gl.static_range(0, K // 32, UNITS):
        codes, low_scale, high_scale = ahead, scale_of(low_ahead), scale_of(high_ahead)
        if start + UNITS < K // 32:
            ahead = gl.load(place + (start + UNITS) * 16)
            low_ahead = gl.load(scales + (start + UNITS))
            high_ahead = gl.load(scales + (start + UNITS + K // 32))
        low, high = decode(codes)
        sums += dots(low, gl.expand_dims(gl.load(source + start * 16), 0), of_sums) * low_scale
        sums += dots(high, gl.expand_dims(gl.load(source + (start * 16 + K // 2)), 0), of_sums) * high_scale
    return sums


@gluon.jit
def plain_sums(source, weight, row, K: gl.constexpr, UNITS: gl.constexpr, layout: gl.constexpr, PDL: gl.constexpr):
    """As `_packed_sums`, of bfloat16 weights in units of 8. With PDL it waits for x itself, having begun on them."""
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    each = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]
    place = weight + row[:, None][:, :, None] * K + unit[:, :, None] * 8 + each
    sums = gl.zeros([row.shape[0], UNITS], gl.float32, gl.SliceLayout(2, layout))
    ahead = gl.load(place)
    begin_in_turn(weight, PDL)
    for start in gl.static_range(0, K // 8, UNITS):
        w = ahead.to(gl.float32)
        if start + UNITS < K // 8:
            ahead = gl.load(place + (start + UNITS) * 8)
        value = gl.load(source + start * 8).to(gl.float32)
        sums += gl.sum(w * gl.expand_dims(value, 0), 2)
    return sums


@gluon.jit
def fetch(weight, first, K: gl.constexpr, SKIP: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Ask for ROWS rows of K values from `first` on, but for the SKIP first of each, to be brought into the L2 cache;
    nobody waits for it."""
    THREADS_OF_ROW: gl.constexpr = WARPS * 32 // ROWS
    EACH: gl.constexpr = (K - SKIP) // THREADS_OF_ROW
    thread = gl.arange(0, WARPS * 32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    row = (first + thread // THREADS_OF_ROW).to(gl.int64)
    address = (weight + row * K + SKIP + (thread % THREADS_OF_ROW) * EACH).to(gl.int64)
    gl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, thread * 0 + EACH * 2],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
