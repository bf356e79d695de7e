"""Vectors of `LANES` floats as a numba type, for kernels that handle a block of pixels at once.

numba vectorises simple loops by itself, but not loops with early exits and masks like those of splatting;
with these types they run some ten times faster. A vector is an LLVM `<LANES x float>`, which LLVM maps to
whatever registers the processor has, so nothing here is for one machine only.

In a compiled function, `lanes(x)` puts a float32 into every lane; `+ - * /` work lane by lane, and a float32
operand is spread; `< <= > >=` give masks and `&` combines them; the functions below do the rest.
"""

from __future__ import annotations

import math
import operator

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model

# The pixels of a block: lane i is pixel (i % BLOCK_WIDTH, i // BLOCK_WIDTH). As many as keep the registers
# full.
BLOCK_WIDTH = 4
BLOCK_HEIGHT = 4 if get_host_cpu_features().get("avx512f") else 2
LANES = BLOCK_WIDTH * BLOCK_HEIGHT

FLOAT, INT = ir.FloatType(), ir.IntType(32)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
BITS = ir.VectorType(ir.IntType(1), LANES)
EXP2 = (0.0013333558, 0.009618129, 0.05550357, 0.2402264923, 0.6931471806, 1.0)  # 2^r, highest power first
FAST = ("contract", "reassoc", "nsz", "arcp", "afn")  # fast, but NaN and infinity keep their meaning


class FloatLanes(types.Type):
    def __init__(self):
        super().__init__(f"float32x{LANES}")


class MaskLanes(types.Type):
    def __init__(self):
        super().__init__(f"mask{LANES}")


float_lanes, mask_lanes = FloatLanes(), MaskLanes()


@register_model(FloatLanes)
class _FloatLanesModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, FLOATS)


@register_model(MaskLanes)
class _MaskLanesModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, BITS)


def _constant(values) -> ir.Constant:
    return ir.Constant(FLOATS, [float(v) for v in values])


def _spread(builder, scalar):
    vector = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.Constant(INT, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(INTS, [0] * LANES))


@lower_cast(types.float32, float_lanes)
def _cast(context, builder, from_type, to_type, value):
    return _spread(builder, value)


def _define_operator(op, result_type, emit) -> None:
    """Teaches numba `op` on two vectors, or on a vector and a float32."""

    class Template(AbstractTemplate):
        key = op

        def generic(self, args, kws):
            if float_lanes in args and all(a in (float_lanes, types.float32) for a in args):
                return signature(result_type, float_lanes, float_lanes)

    infer_global(op)(Template)
    lower_builtin(op, float_lanes, float_lanes)(lambda context, builder, sig, args: emit(builder, *args))


_define_operator(operator.add, float_lanes, lambda builder, x, y: builder.fadd(x, y, flags=FAST))
_define_operator(operator.sub, float_lanes, lambda builder, x, y: builder.fsub(x, y, flags=FAST))
_define_operator(operator.mul, float_lanes, lambda builder, x, y: builder.fmul(x, y, flags=FAST))
_define_operator(operator.truediv, float_lanes, lambda builder, x, y: builder.fdiv(x, y, flags=FAST))
_define_operator(operator.lt, mask_lanes, lambda builder, x, y: builder.fcmp_ordered("<", x, y))
_define_operator(operator.le, mask_lanes, lambda builder, x, y: builder.fcmp_ordered("<=", x, y))
_define_operator(operator.gt, mask_lanes, lambda builder, x, y: builder.fcmp_ordered(">", x, y))
_define_operator(operator.ge, mask_lanes, lambda builder, x, y: builder.fcmp_ordered(">=", x, y))


@infer_global(operator.and_)
class _And(AbstractTemplate):
    def generic(self, args, kws):
        if args == (mask_lanes, mask_lanes):
            return signature(mask_lanes, mask_lanes, mask_lanes)


@lower_builtin(operator.and_, mask_lanes, mask_lanes)
def _and(context, builder, sig, args):
    return builder.and_(*args)


@intrinsic
def lanes(typing, x):
    """The float32 `x` in every lane."""
    return float_lanes(types.float32), lambda context, builder, sig, args: _spread(builder, args[0])


@intrinsic
def lane_x(typing):
    """Each lane's column in its block: 0 1 2 3 0 1 ..."""
    values = [i % BLOCK_WIDTH for i in range(LANES)]
    return float_lanes(), lambda context, builder, sig, args: _constant(values)


@intrinsic
def lane_y(typing):
    """Each lane's row in its block: 0 0 0 0 1 1 ..."""
    values = [i // BLOCK_WIDTH for i in range(LANES)]
    return float_lanes(), lambda context, builder, sig, args: _constant(values)


@intrinsic
def select(typing, mask, x, y):
    """x where the mask is set, y elsewhere."""
    return (
        float_lanes(mask_lanes, float_lanes, float_lanes),
        lambda context, builder, sig, args: builder.select(*args),
    )


@intrinsic
def smaller(typing, x, y):
    """The lesser of x and y in each lane."""

    def emit(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return float_lanes(float_lanes, float_lanes), emit


@intrinsic
def any_lane(typing, mask):
    """Whether any lane of the mask is set."""

    def emit(context, builder, sig, args):
        bits = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(mask_lanes), emit


@intrinsic
def lane_sum(typing, x):
    """The sum over the lanes, in an order that never changes."""

    def emit(context, builder, sig, args):
        total, step = args[0], LANES // 2
        while step:
            rotation = ir.Constant(INTS, [(i + step) % LANES for i in range(LANES)])
            total = builder.fadd(total, builder.shuffle_vector(total, total, rotation), flags=FAST)
            step //= 2
        return builder.extract_element(total, ir.Constant(INT, 0))

    return types.float32(float_lanes), emit


def _address(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), FLOATS.as_pointer())


@intrinsic
def load(typing, array, index):
    """LANES floats of a contiguous 1D float32 array, starting at `index`; not checked."""

    def emit(context, builder, sig, args):
        value = builder.load(_address(context, builder, sig.args[0], *args))
        value.align = 4
        return value

    return float_lanes(array, types.int64), emit


@intrinsic
def store(typing, array, index, value):
    """Writes LANES floats to a contiguous 1D float32 array, starting at `index`; not checked."""

    def emit(context, builder, sig, args):
        builder.store(args[2], _address(context, builder, sig.args[0], *args[:2])).align = 4
        return context.get_dummy_value()

    return types.void(array, types.int64, float_lanes), emit


@intrinsic
def exp(typing, x):
    """e^x for x <= 0 to about 2e-7 relative: 2^n p(r), x = (n + r) ln 2, |r| <= 1/2. Under -83 it is nearly
    0."""

    def emit(context, builder, sig, args):
        z = builder.fmul(args[0], _constant([1 / math.log(2)] * LANES), flags=FAST)
        lowest = _constant([-120.0] * LANES)  # keeps 2^n a normal number
        z = builder.select(builder.fcmp_ordered(">", z, lowest), z, lowest)
        n = builder.fptosi(builder.fsub(z, _constant([0.5] * LANES)), INTS)  # rounds z <= 0, as it truncates
        r = builder.fsub(z, builder.sitofp(n, FLOATS))
        p = _constant([EXP2[0]] * LANES)
        for c in EXP2[1:]:
            p = builder.fadd(builder.fmul(p, r, flags=FAST), _constant([c] * LANES), flags=FAST)
        biased = builder.add(n, ir.Constant(INTS, [127] * LANES))  # a float32 is its exponent + 127, shifted by 23
        power = builder.bitcast(builder.shl(biased, ir.Constant(INTS, [23] * LANES)), FLOATS)
        return builder.fmul(power, p, flags=FAST)

    return float_lanes(float_lanes), emit
