"""Looks for differences between the reference backend and ONNX Runtime, operator by operator, on random nodes.

    python tests/reference/difference.py --seed 1 --count 20

makes for every operator below, for every version of it that ONNX has had and for every element type that version admits, models of one
node with random attributes and shapes (0, 1, odd, broadcast, dilated, padded), asks both, and prints a table. What ONNX Runtime has no
kernel for is asked of the ONNX project's own evaluator. It is run by hand, needs `onnx` and `onnxruntime`, and keeps what differs in the
folder of `--keep`. Results and what was decided of them are in FINDINGS.md.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import subprocess
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

onnxruntime.set_default_logger_severity(4)

CODES = {
    "float": TensorProto.FLOAT, "double": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8, "int16": TensorProto.INT16, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16, "uint32": TensorProto.UINT32, "uint64": TensorProto.UINT64,
    "bool": TensorProto.BOOL, "string": TensorProto.STRING, "complex64": TensorProto.COMPLEX64,
    "complex128": TensorProto.COMPLEX128, "float8e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8e4m3fnuz": TensorProto.FLOAT8E4M3FNUZ, "float8e5m2": TensorProto.FLOAT8E5M2,
    "float8e5m2fnuz": TensorProto.FLOAT8E5M2FNUZ, "float8e8m0": TensorProto.FLOAT8E8M0, "float4e2m1": TensorProto.FLOAT4E2M1,
    "int4": TensorProto.INT4, "uint4": TensorProto.UINT4, "int2": TensorProto.INT2, "uint2": TensorProto.UINT2,
}
NAMES = {code: name for name, code in CODES.items()}
FLOATS = ("float", "double", "float16", "bfloat16")
# Elements that NumPy files hold; others go into the model, and come out of it cast.
PLAIN = {"float", "double", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"}
# Allowed: a relative and an absolute difference, for results of so many bits of mantissa.
TOLERANCE = {"float": (2e-4, 2e-5), "double": (1e-5, 1e-8), "float16": (2e-2, 4e-3), "bfloat16": (8e-2, 3e-2)}

GENERATORS = {}


class Node:
    """Inputs are arrays, (array, "constant") where a model has them as constants, or None where they are left out."""

    def __init__(self, inputs, outputs=1, domain="", **attributes):
        self.inputs, self.outputs, self.domain = inputs, outputs, domain
        self.attributes = {k: v for k, v in attributes.items() if v is not None}


def op(*names):
    def register(make):
        for name in names:
            GENERATORS[name] = make
        return make

    return register


class Random:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def int(self, low, high):
        """Both included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, *options):
        return options[self.int(0, len(options) - 1)]

    def maybe(self, value, chance=0.5):
        return value if self.rng.random() < chance else None

    def float(self, low=-1.0, high=1.0):
        return float(np.float32(self.rng.uniform(low, high)))

    def shape(self, low=0, high=4, extents=(0, 1, 1, 2, 3, 3, 4, 5)):
        return [self.pick(*extents) for _ in range(self.int(low, high))]

    def array(self, t, shape, low=-4.0, high=4.0, whole=False):
        shape = tuple(shape)
        if t == "bool":
            return self.rng.integers(0, 2, shape).astype(bool)
        if t == "string":
            return np.array(self.rng.choice(["a", "b", "ab", "", "ß"], shape), dtype=object).reshape(shape)
        dtype = helper.tensor_dtype_to_np_dtype(CODES[t])
        if t.startswith(("int", "uint")):
            bits = int(t.lstrip("uint"))
            most = min(high, 2 ** (bits - (t[0] != "u")) - 1)
            least = min(max(low, 0 if t[0] == "u" else -(2 ** (bits - 1))), most)
            return self.rng.integers(int(least), int(most) + 1, shape).astype(np.int64).astype(dtype)
        values = self.rng.uniform(low, high, shape)
        if whole:
            values = np.round(values)
        if t.startswith("complex"):
            return (values + 1j * self.rng.uniform(low, high, shape)).astype(dtype)
        # Quarters are exact in every type and make ties.
        values = np.where(self.rng.random(shape) < 0.3, np.round(values * 2) / 2, values)
        return values.astype(np.float32).astype(dtype)

    def broadcast(self, count, rank=4):
        shape = self.shape(0, rank)
        result = []
        for _ in range(count):
            kept = [1 if self.rng.random() < 0.25 else d for d in shape]
            result.append(kept[self.int(0, len(kept)):] if self.rng.random() < 0.3 else kept)
        return result

    def axis(self, rank, inclusive=False):
        top = rank if inclusive else rank - 1
        return self.int(-rank, top) if rank else 0


def i64(values):
    return np.array(values, dtype=np.int64)


def fixed(values):
    return (i64(values), "constant")


# Elementwise


@op("Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Reciprocal", "Exp", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Tanh", "Asinh",
    "Erf", "Relu", "Sigmoid", "Softplus", "Softsign", "HardSwish", "Mish", "BitwiseNot", "Not", "IsNaN", "Identity", "Size", "NonZero")
def unary(r, t, v, name):
    x = r.array(t, r.shape())
    if name in ("IsNaN", "Sign", "Abs", "Relu") and t in FLOATS and x.size:
        x.reshape(-1)[r.int(0, x.size - 1)] = r.pick(np.nan, np.inf, -0.0)
    return Node([x])


@op("Sqrt", "Log")
def positive(r, t, v, name):
    return Node([r.array(t, r.shape(), 0.1)])


@op("Asin", "Acos", "Atanh")
def below_one(r, t, v, name):
    return Node([r.array(t, r.shape(), -0.9, 0.9)])


@op("Acosh")
def above_one(r, t, v, name):
    return Node([r.array(t, r.shape(), 1.1, 5.0)])


@op("LeakyRelu", "Elu", "Celu", "ThresholdedRelu", "Swish")
def with_alpha(r, t, v, name):
    return Node([r.array(t, r.shape())], alpha=r.maybe(r.float(0.1, 2.0)))


@op("Selu")
def selu(r, t, v, name):
    return Node([r.array(t, r.shape())], alpha=r.maybe(r.float(0.1, 2.0)), gamma=r.maybe(r.float(0.1, 2.0)))


@op("HardSigmoid")
def hard_sigmoid(r, t, v, name):
    return Node([r.array(t, r.shape())], alpha=r.maybe(r.float(0.1, 2.0)), beta=r.maybe(r.float()))


@op("Gelu")
def gelu(r, t, v, name):
    return Node([r.array(t, r.shape())], approximate=r.pick(None, "none", "tanh"))


@op("Shrink")
def shrink(r, t, v, name):
    return Node([r.array(t, r.shape())], lambd=r.maybe(r.float(0, 2)), bias=r.maybe(r.float(0, 1)))


@op("IsInf")
def is_inf(r, t, v, name):
    x = r.array(t, r.shape())
    if x.size and t in FLOATS:
        x.reshape(-1)[r.int(0, x.size - 1)] = r.pick(np.inf, -np.inf, np.nan)
    return Node([x], detect_negative=r.pick(None, 0, 1), detect_positive=r.pick(None, 0, 1))


def old_operands(r, v, until=7):
    """Before opset 7 the second operand was broadcast only when asked to, from `axis` on."""
    if v >= until:
        a, b = r.broadcast(2)
        return a, b, {}
    a = r.shape(1, 4, (1, 2, 3))
    axis = r.int(0, len(a) - 1)
    if r.int(0, 1):
        return a, a, {}
    return a, a[axis:r.int(axis + 1, len(a))], {"broadcast": 1, "axis": axis}


@op("Add", "Sub", "Mul", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "BitwiseAnd", "BitwiseOr",
    "BitwiseXor")
def binary(r, t, v, name):
    a, b, attributes = old_operands(r, v)
    return Node([r.array(t, a), r.array(t, b)], **attributes)


@op("Div")
def division(r, t, v, name):
    a, b, attributes = old_operands(r, v)
    y = r.array(t, b, 1, 4)
    if t in FLOATS or (t[0] == "i" and r.int(0, 1)):
        y = -y if r.int(0, 1) else y
    return Node([r.array(t, a, -9, 9), y], **attributes)


@op("Pow")
def power(r, t, v, name):
    a, b, attributes = old_operands(r, v)
    exponent = t if v < 12 else r.pick(t, "float", "int64", "int32")
    return Node([r.array(t, a, 0.5, 3), r.array(exponent, b, 0, 3)], **attributes)


@op("PRelu")
def prelu(r, t, v, name):
    shape = r.shape(1, 4, (1, 2, 3))
    slope = [d if r.int(0, 1) else 1 for d in shape[r.int(0, len(shape) - 1):]] if v >= 7 else [1]
    return Node([r.array(t, shape), r.array(t, slope)])


@op("Mod")
def modulus(r, t, v, name):
    a, b = r.broadcast(2)
    y = r.array(t, b, 1, 5)
    if t[0] != "u" and r.int(0, 1):
        y = -y
    return Node([r.array(t, a, -9, 9), y], fmod=1 if t in FLOATS else r.pick(None, 0, 1))


@op("BitShift")
def bit_shift(r, t, v, name):
    a, b = r.broadcast(2)
    return Node([r.array(t, a, 0, 200), r.array(t, b, 0, 7)], direction=r.pick("LEFT", "RIGHT"))


@op("Sum", "Mean", "Min", "Max")
def variadic(r, t, v, name):
    shapes = r.broadcast(r.int(1, 4)) if v >= 8 else [r.shape(0, 3)] * 2
    if v < 8:
        shapes = [shapes[0]] * r.int(1, 3)
    return Node([r.array(t, s) for s in shapes])


@op("Where")
def where(r, t, v, name):
    shapes = r.broadcast(3)
    return Node([r.array("bool", shapes[0]), r.array(t, shapes[1]), r.array(t, shapes[2])])


@op("Clip")
def clip(r, t, v, name):
    x = r.array(t, r.shape(), -9, 9)
    if v < 11:
        return Node([x], min=r.maybe(r.float(-3, 0)), max=r.maybe(r.float(0, 3)))
    return Node([x, r.maybe(r.array(t, [], -3, 1)), r.maybe(r.array(t, [], 0, 3))])


@op("Cast")
def cast(r, t, v, name):
    x = r.array(t, r.shape(0, 3), -100, 100)
    targets = [n for n in PLAIN if t != "string"] or ["int64"]
    if t == "string":
        x = np.array([r.pick("1", "-3", "7") for _ in range(x.size)], dtype=object).reshape(x.shape)
    if v >= 13:
        targets.append("bfloat16")
    to = CODES[r.pick(*sorted(targets))]
    if v < 6:
        return Node([x], to=NAMES[to].upper())
    return Node([x], to=to)


@op("CastLike")
def cast_like(r, t, v, name):
    if t == "string":
        return None
    return Node([r.array(t, r.shape(0, 3), 0, 100), r.array(r.pick("float", "int32", "double", "uint8"), [1])])


# Shapes and movement


@op("Shape")
def shape(r, t, v, name):
    attributes = dict(start=r.maybe(r.int(-5, 5)), end=r.maybe(r.int(-5, 5))) if v >= 15 else {}
    return Node([r.array(t, r.shape(0, 4))], **attributes)


def factors(r, count):
    to, left = [], count
    while left > 1:
        f = r.pick(*[d for d in range(2, left + 1) if left % d == 0])
        to.append(f)
        left //= f
    return to + [1] * r.int(0, 1)


@op("Reshape")
def reshape(r, t, v, name):
    x = r.array(t, r.shape(0, 4, (1, 2, 3)))
    to = factors(r, x.size)
    if to and r.int(0, 1):
        to[r.int(0, len(to) - 1)] = -1
    if v < 5:
        return Node([x], shape=to)
    return Node([x, r.pick(i64(to), fixed(to))], allowzero=r.pick(None, 0, 1) if v >= 14 and 0 not in to else None)


@op("Flatten")
def flatten(r, t, v, name):
    shape = r.shape(1, 4)
    axis = r.int(0, len(shape)) if v < 11 else r.axis(len(shape), inclusive=True)
    return Node([r.array(t, shape)], axis=r.maybe(axis) if len(shape) > 1 else axis)


@op("Squeeze")
def squeeze(r, t, v, name):
    shape = r.shape(0, 3)
    axes = sorted(r.rng.choice(len(shape) + 1, min(len(shape) + 1, r.int(1, 2)), replace=False).tolist())
    for axis in axes:
        shape.insert(axis, 1)
    if v >= 11 and r.int(0, 1):
        axes = [a - len(shape) for a in axes]
    axes = axes if v < 13 or r.int(0, 3) else None
    x = r.array(t, shape)
    return Node([x], axes=axes) if v < 13 else Node([x, None if axes is None else fixed(axes)])


@op("Unsqueeze")
def unsqueeze(r, t, v, name):
    shape = r.shape(0, 3)
    count = r.int(1, 2)
    axes = r.rng.choice(len(shape) + count, count, replace=False).tolist()
    if v < 11:
        axes.sort()
    elif r.int(0, 1):
        axes = [a - len(shape) - count for a in axes]
    x = r.array(t, shape)
    return Node([x], axes=axes) if v < 13 else Node([x, fixed(axes)])


@op("Transpose")
def transpose(r, t, v, name):
    shape = r.shape(0, 4)
    return Node([r.array(t, shape)], perm=r.maybe(r.rng.permutation(len(shape)).tolist()) if shape else None)


@op("Concat")
def concat(r, t, v, name):
    shape = r.shape(1, 4)
    axis = r.int(0, len(shape) - 1)
    parts = [r.array(t, shape[:axis] + [r.int(0, 3)] + shape[axis + 1:]) for _ in range(r.int(1, 4))]
    return Node(parts, axis=axis - (len(shape) if v >= 11 and r.int(0, 1) else 0))


@op("Split")
def split(r, t, v, name):
    shape = r.shape(1, 3)
    axis = r.int(0, len(shape) - 1)
    parts = [r.int(0, 3) for _ in range(r.int(1, 3))]
    shape[axis] = sum(parts)
    x, given = r.array(t, shape), axis - (len(shape) if v >= 11 and r.int(0, 1) else 0)
    if v < 13:
        return Node([x], outputs=len(parts), axis=given, split=parts)
    if v >= 18 and r.int(0, 1) and shape[axis] > 0:
        count = r.int(1, shape[axis])
        chunk = -(-shape[axis] // count)
        if chunk * (count - 1) < shape[axis]:
            return Node([x], outputs=count, axis=given, num_outputs=count)
    return Node([x, fixed(parts)], outputs=len(parts), axis=given)


@op("Slice")
def slice_(r, t, v, name):
    shape = r.shape(1, 4)
    axes = r.rng.choice(len(shape), r.int(1, len(shape)), replace=False).tolist()
    starts, ends = [r.int(-7, 7) for _ in axes], [r.pick(r.int(-7, 7), 2**31 - 1, -(2**31)) for _ in axes]
    x = r.array(t, shape)
    if v < 10:
        return Node([x], axes=axes, starts=starts, ends=[min(e, 1000) for e in ends])
    kind = r.pick(np.int32, np.int64)
    steps = r.maybe(np.array([r.pick(1, 2, 3, -1, -2) for _ in axes], kind))
    axes = [a - len(shape) if r.int(0, 1) else a for a in axes]
    lists = [np.array(starts, kind), np.array(ends, kind), np.array(axes, kind)]
    return Node([x] + lists + ([steps] if steps is not None else []))


def indices(r, extent, shape, v, since=11):
    low = -extent if v >= since else 0
    return r.rng.integers(low, extent, tuple(shape)).astype(r.pick(np.int32, np.int64))


@op("Gather")
def gather(r, t, v, name):
    shape = r.shape(1, 3)
    axis = r.int(0, len(shape) - 1)
    shape[axis] = max(shape[axis], 1)
    return Node([r.array(t, shape), indices(r, shape[axis], r.shape(0, 3), v)], axis=r.pick(axis, axis - len(shape)))


@op("GatherElements")
def gather_elements(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3, 4))
    axis = r.int(0, len(shape) - 1)
    to = [r.int(0, d) for d in shape]
    to[axis] = r.int(0, 5)
    return Node([r.array(t, shape), indices(r, shape[axis], to, v)], axis=r.pick(axis, axis - len(shape)))


@op("GatherND")
def gather_nd(r, t, v, name):
    shape = r.shape(1, 4, (1, 2, 3))
    batch = r.int(0, len(shape) - 1) if v >= 12 else 0
    depth = r.int(1, len(shape) - batch)
    lead = shape[:batch] + r.shape(0, 2, (1, 2, 3))
    at = [r.rng.integers(-shape[batch + i] if v >= 11 else 0, shape[batch + i], lead) for i in range(depth)]
    return Node([r.array(t, shape), np.stack(at, -1).astype(np.int64)], batch_dims=batch or None)


@op("Scatter", "ScatterElements")
def scatter(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3, 4))
    axis = r.int(0, len(shape) - 1)
    to = [r.int(0, d) for d in shape]
    reduction = None
    if v >= 16 and t not in ("string", "bool") and not t.startswith("complex"):
        reduction = r.pick(None, "none", "add", "mul", *(("min", "max") if v >= 18 else ()))
    if reduction in (None, "none"):
        # What is written twice is not defined.
        at = np.argsort(r.rng.random([shape[axis] if i == axis else d for i, d in enumerate(to)]), axis=axis)
        at = np.take(at, range(to[axis]), axis=axis).astype(np.int64)
    else:
        at = indices(r, shape[axis], to, v)
    return Node([r.array(t, shape), at, r.array(t, to)], axis=r.pick(axis, axis - len(shape)) if v >= 11 else axis, reduction=reduction)


@op("ScatterND")
def scatter_nd(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3))
    depth = r.int(1, len(shape))
    count = int(np.prod(shape[:depth]))
    places = r.rng.permutation(count)[: r.int(0, count)]
    at = np.stack(np.unravel_index(places, shape[:depth]), -1).astype(np.int64)
    reduction = None
    if v >= 16 and t not in ("string", "bool") and not t.startswith("complex"):
        reduction = r.pick(None, "add", "mul", *(("min", "max") if v >= 18 else ()))
    return Node([r.array(t, shape), at, r.array(t, [len(places)] + shape[depth:])], reduction=reduction)


@op("Expand")
def expand(r, t, v, name):
    a, b = r.broadcast(2)
    return Node([r.array(t, a), r.pick(i64(b), fixed(b))])


@op("Tile")
def tile(r, t, v, name):
    shape = r.shape(0, 3) if v >= 6 else r.shape(1, 3, (1, 2, 3))
    if v < 6:
        return Node([r.array(t, shape), r.array(t, [], 1, 3), r.array(t, [], 0, len(shape) - 1)])
    return Node([r.array(t, shape), i64([r.int(0, 3) for _ in shape])])


@op("Pad")
def pad(r, t, v, name):
    shape = r.shape(1, 4, (2, 3, 4))
    mode = r.pick(None, "constant", "reflect", "edge", *(("wrap",) if v >= 19 else ()))
    low = -1 if mode in (None, "constant") else 0
    pads = [r.int(low, 1) for _ in range(2 * len(shape))]
    x = r.array(t, shape)
    if v < 2:
        return Node([x], paddings=pads, mode=mode, value=r.maybe(r.float()))
    if v < 11:
        return Node([x], pads=pads, mode=mode, value=r.maybe(r.float()))
    value = r.maybe(r.array(t, []))
    if v >= 18 and r.int(0, 1):
        axes = r.rng.choice(len(shape), r.int(1, len(shape)), replace=False).tolist()
        some = [pads[a] for a in axes] + [pads[a + len(shape)] for a in axes]
        return Node([x, i64(some), value, i64([r.pick(a, a - len(shape)) for a in axes])], mode=mode)
    return Node([x, i64(pads), value], mode=mode)


@op("EyeLike")
def eye_like(r, t, v, name):
    dtype = r.pick(None, 1, 7, 11, 10)
    return Node([r.array(t, [r.int(1, 4), r.int(1, 4)])], k=r.maybe(r.int(-4, 4)), dtype=dtype if t != "bool" or dtype else 1)


@op("Range")
def range_(r, t, v, name):
    start, count = r.int(-3, 3), r.int(0, 6)
    delta = r.pick(1, 2, -1, 3)
    return Node([r.array(t, [], 0, 0) + np.array(n).astype(helper.tensor_dtype_to_np_dtype(CODES[t])) for n in (start, start + count * delta, delta)])


@op("OneHot")
def one_hot(r, t, v, name):
    shape = r.shape(0, 3)
    kind = t if t not in ("bool", "string") else "int64"
    depth = np.array(r.int(1, 5)).astype(np.int64)
    return Node([r.array(kind, shape, -3 if kind[0] != "u" else 0, 6, whole=True), depth, r.array(r.pick("float", "int64", "int32"), [2])],
                axis=r.maybe(r.int(-len(shape) - 1, len(shape))))


@op("TopK")
def top_k(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3, 5, 7))
    axis = r.int(0, len(shape) - 1)
    k = r.int(0 if v >= 10 else 1, shape[axis])
    given = r.pick(axis, axis - len(shape))
    if v < 10:
        return Node([r.array(t, shape)], outputs=2, axis=given, k=k)
    more = dict(largest=r.pick(None, 0, 1), sorted=1) if v >= 11 else {}
    return Node([r.array(t, shape), i64([k])], outputs=2, axis=given, **more)


@op("Compress")
def compress(r, t, v, name):
    shape = r.shape(1, 3)
    axis = r.maybe(r.axis(len(shape)) if v >= 11 else r.int(0, len(shape) - 1))
    extent = int(np.prod(shape)) if axis is None else shape[axis]
    return Node([r.array(t, shape), r.array("bool", [r.int(0, extent)])], axis=axis)


@op("CumSum", "CumProd")
def cum_sum(r, t, v, name):
    shape = r.shape(1, 3)
    axis = np.array(r.axis(len(shape)), r.pick(np.int32, np.int64))
    return Node([r.array(t, shape), axis], exclusive=r.pick(None, 1), reverse=r.pick(None, 1))


@op("Trilu")
def trilu(r, t, v, name):
    shape = r.shape(2, 4)
    return Node([r.array(t, shape), r.maybe(np.array(r.int(-4, 4), np.int64))], upper=r.pick(None, 0, 1))


@op("ReverseSequence")
def reverse_sequence(r, t, v, name):
    time, batch = r.int(1, 5), r.int(1, 4)
    first = r.int(0, 1)
    shape = ([time, batch] if first else [batch, time]) + r.shape(0, 2, (1, 2))
    return Node([r.array(t, shape), r.rng.integers(1, time + 1, batch).astype(np.int64)], time_axis=0 if first else 1, batch_axis=1 if first else 0)


@op("DepthToSpace")
def depth_to_space(r, t, v, name):
    b = r.int(1, 3)
    return Node([r.array(t, [r.int(1, 2), b * b * r.int(1, 3), r.int(1, 3), r.int(1, 3)])], blocksize=b,
                mode=r.pick(None, "DCR", "CRD") if v >= 11 else None)


@op("SpaceToDepth")
def space_to_depth(r, t, v, name):
    b = r.int(1, 3)
    return Node([r.array(t, [r.int(1, 2), r.int(1, 3), b * r.int(1, 3), b * r.int(1, 3)])], blocksize=b)


@op("Unique")
def unique(r, t, v, name):
    shape = r.shape(1, 3)
    axis = r.maybe(r.axis(len(shape)))
    if axis is not None and 0 in shape:
        axis = None
    return Node([r.array(t, shape, -2, 2, whole=True)], outputs=4, axis=axis, sorted=r.pick(None, 0, 1))


@op("ConstantOfShape")
def constant_of_shape(r, t, v, name):
    value = r.maybe(numpy_helper.from_array(r.array(r.pick("float", "int32", "bool", "double"), [1])))
    return Node([i64(r.shape())], value=value)


@op("Dropout")
def dropout(r, t, v, name):
    x = r.array(t, r.shape())
    if v < 7:
        return Node([x], is_test=1, ratio=r.maybe(0.3))
    if v < 12:
        return Node([x], ratio=r.maybe(0.3))
    return Node([x, r.maybe(r.array("float", [], 0, 1))], outputs=r.int(1, 2))


# Products, sums, norms


@op("MatMul")
def matmul(r, t, v, name):
    m, k, n = r.int(1, 4), r.pick(1, 3, 5), r.int(1, 4)
    lead = r.broadcast(2, 2)
    a, b = lead[0] + [m, k], lead[1] + [k, n]
    kind = r.int(0, 5)
    a = [k] if kind == 0 else a
    b = [k] if kind == 1 else b
    return Node([r.array(t, a), r.array(t, b)])


@op("Gemm")
def gemm(r, t, v, name):
    m, k, n = r.int(1, 4), r.pick(0, 1, 3), r.int(1, 4)
    ta, tb = r.int(0, 1), r.int(0, 1)
    c = r.pick([m, n], [n], [1, n], [m, 1], [1], []) if v >= 7 else [m, n]
    inputs = [r.array(t, [k, m] if ta else [m, k]), r.array(t, [n, k] if tb else [k, n]), r.array(t, c)]
    if v >= 11 and r.int(0, 3) == 0:
        inputs.pop()
    scale = (lambda: float(r.int(1, 3))) if t not in FLOATS else (lambda: r.float(0.5, 2))
    return Node(inputs, transA=ta, transB=tb, alpha=r.maybe(scale()), beta=r.maybe(scale()))


@op("Einsum")
def einsum(r, t, v, name):
    i, j, k = r.int(1, 3), r.int(1, 3), r.int(1, 3)
    equation, shapes = r.pick(("ij,jk->ik", [[i, j], [j, k]]), ("ij->ji", [[i, j]]), ("ii->i", [[i, i]]), ("bij,bjk", [[2, i, j], [2, j, k]]),
                              ("...ij,...jk->...ik", [[2, i, j], [j, k]]), ("i,j->ij", [[i], [j]]), ("ij->", [[i, j]]))
    return Node([r.array(t, s) for s in shapes], equation=equation)


@op("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceSumSquare")
def reduce(r, t, v, name):
    shape = r.shape(0, 4, (1, 2, 3, 4) if name in ("ReduceMean", "ReduceMax", "ReduceMin") else (0, 1, 2, 3))
    axes = r.maybe(r.rng.choice(len(shape), r.int(0 if v >= 18 else 1, len(shape)), replace=False).tolist() if shape else None, 0.7)
    if axes is not None and (v >= 11) and r.int(0, 1):
        axes = [a - len(shape) for a in axes]
    low = 0.5 if name == "ReduceLogSum" else -3
    x = r.array(t, shape, low, 3)
    keep = r.pick(None, 0, 1)
    if v < 13 or (v < 18 and name != "ReduceSum"):
        return Node([x], axes=axes, keepdims=keep)
    return Node([x, None if axes is None else r.pick(i64(axes), fixed(axes))], keepdims=keep, noop_with_empty_axes=r.pick(None, 0, 1))


@op("ArgMax", "ArgMin")
def arg_reduce(r, t, v, name):
    shape = r.shape(1, 4, (1, 2, 3, 5))
    axis = r.int(0, len(shape) - 1) - (len(shape) if v >= 11 and r.int(0, 1) else 0)
    return Node([r.array(t, shape, -2, 2, whole=True)], axis=r.maybe(axis), keepdims=r.pick(None, 0, 1), select_last_index=r.pick(None, 1) if v >= 12 else None)


@op("Softmax", "LogSoftmax", "Hardmax")
def softmax(r, t, v, name):
    shape = r.shape(1, 4, (1, 2, 3, 5))
    axis = r.int(0, len(shape) - 1) - (len(shape) if v >= 11 and r.int(0, 1) else 0)
    return Node([r.array(t, shape)], axis=axis if len(shape) == 1 else r.maybe(axis, 0.8))


@op("LayerNormalization")
def layer_norm(r, t, v, name):
    shape = r.shape(1, 4, (1, 2, 3, 5))
    axis = r.axis(len(shape))
    tail = shape[axis:] if axis else shape
    return Node([r.array(t, shape), r.array(t, tail), r.maybe(r.array(t, tail))], axis=axis, epsilon=r.maybe(0.01))


@op("RMSNormalization")
def rms_norm(r, t, v, name):
    shape = r.shape(1, 4, (1, 2, 3, 5))
    axis = r.axis(len(shape))
    return Node([r.array(t, shape), r.array(t, shape[axis:] if axis else shape)], axis=axis, epsilon=r.maybe(0.01))


@op("BatchNormalization")
def batch_norm(r, t, v, name):
    c = r.int(1, 3)
    shape = [r.int(1, 3), c] + r.shape(0, 2, (1, 2, 3))
    if v < 7:
        shape = (shape + [2, 2])[:4]
    parameters = [r.array(t, [c]) for _ in range(3)] + [r.array(t, [c], 0.5, 2)]
    training = v >= 14 and r.int(0, 1)
    old = dict(is_test=1) if v < 7 else {}
    if v == 1:
        old["consumed_inputs"] = [0, 0, 0, 1, 1]
    if training:
        old["training_mode"] = 1
    return Node([r.array(t, shape)] + parameters, outputs=3 if training else 1, epsilon=r.maybe(0.01), momentum=r.maybe(0.7), **old)


@op("InstanceNormalization")
def instance_norm(r, t, v, name):
    c = r.int(1, 3)
    old = {"consumed_inputs": [0, 0, 0]} if v == 1 else {}
    return Node([r.array(t, [r.int(1, 3), c] + r.shape(1, 3, (1, 2, 3))), r.array(t, [c]), r.array(t, [c])], epsilon=r.maybe(0.01), **old)


@op("GroupNormalization")
def group_norm(r, t, v, name):
    g, per = r.int(1, 3), r.int(1, 2)
    count = g if v < 21 else g * per
    return Node([r.array(t, [r.int(1, 2), g * per] + r.shape(1, 2, (2, 3))), r.array(t, [count]), r.array(t, [count])], num_groups=g, epsilon=r.maybe(0.01))


@op("LpNormalization")
def lp_norm(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3))
    return Node([r.array(t, shape)], axis=r.axis(len(shape)), p=r.pick(None, 1, 2))


@op("MeanVarianceNormalization")
def mvn(r, t, v, name):
    return Node([r.array(t, [2, 3, 4, 5])], axes=r.pick(None, [0, 2, 3], [1], [2, 3]))


@op("LRN")
def lrn(r, t, v, name):
    return Node([r.array(t, [r.int(1, 2), r.int(1, 6), r.int(1, 3), r.int(1, 3)])], size=r.pick(1, 3, 5), alpha=r.maybe(0.1), beta=r.maybe(0.5), bias=r.maybe(2.0))


# Windows


def window(r, rank, v, extents, ceil_since=None):
    kernel = [r.int(1, 3) for _ in range(rank)]
    strides = r.maybe([r.int(1, 3) for _ in range(rank)])
    auto = r.pick(None, None, None, "SAME_UPPER", "SAME_LOWER", "VALID")
    pads = None if auto else r.maybe([r.int(0, k - 1) for k in kernel] + [r.int(0, k - 1) for k in kernel])
    return kernel, strides, auto, pads


@op("Conv")
def conv(r, t, v, name):
    rank, group = r.int(1, 3), r.pick(1, 1, 2)
    kernel, strides, auto, pads = window(r, rank, v, None)
    dilations = r.maybe([r.int(1, 2) for _ in range(rank)]) if not auto or auto == "VALID" else None
    c, m = group * r.int(1, 2), group * r.int(1, 2)
    x = r.array(t, [r.int(1, 2), c] + [r.int(5, 7) for _ in range(rank)])
    w = r.array(t, [m, c // group] + kernel)
    inputs = [x, w] + ([r.array(t, [m])] if r.int(0, 1) else [])
    return Node(inputs, strides=strides, auto_pad=auto, pads=pads, dilations=dilations, group=group, kernel_shape=r.maybe(kernel))


@op("ConvTranspose")
def conv_transpose(r, t, v, name):
    rank, group = r.int(1, 3), r.pick(1, 1, 2)
    kernel = [r.int(1, 3) for _ in range(rank)]
    strides = [r.int(1, 3) for _ in range(rank)]
    dilations = r.maybe([r.int(1, 2) for _ in range(rank)])
    auto = r.pick(None, None, "SAME_UPPER", "SAME_LOWER", "VALID")
    pads = None if auto else r.maybe([r.int(0, 1) for _ in range(2 * rank)])
    if pads and any(pads[i] + pads[i + rank] > k - 1 for i, k in enumerate(kernel)):
        pads = None
    if auto and auto != "VALID":
        # Where a kernel is smaller than its stride, implementations differ in what a same size is.
        kernel, dilations = [3] * rank, None
    extra = r.maybe([r.int(0, s - 1) for s in strides], 0.3) if not auto else None
    c, m = group * r.int(1, 2), r.int(1, 2)
    x = r.array(t, [r.int(1, 2), c] + [r.int(2, 4) for _ in range(rank)])
    inputs = [x, r.array(t, [c, m] + kernel)] + ([r.array(t, [m * group])] if r.int(0, 1) else [])
    return Node(inputs, strides=strides, auto_pad=auto, pads=pads, dilations=dilations, group=group, output_padding=extra)


@op("MaxPool")
def max_pool(r, t, v, name):
    rank = r.int(1, 3)
    kernel, strides, auto, pads = window(r, rank, v, None)
    outputs = r.int(1, 2) if v >= 8 else 1
    more = dict(storage_order=r.pick(None, 0, 1) if outputs == 2 and rank == 2 else None) if v >= 8 else {}
    if v >= 10:
        more["ceil_mode"] = r.pick(None, 0, 1) if not auto else None
        more["dilations"] = r.maybe([r.int(1, 2) for _ in range(rank)]) if not auto else None
    x = r.array(t, [r.int(1, 2), r.int(1, 2)] + [r.int(5, 7) for _ in range(rank)])
    return Node([x], outputs=outputs, kernel_shape=kernel, strides=strides, auto_pad=auto, pads=pads, **more)


@op("AveragePool", "LpPool")
def average_pool(r, t, v, name):
    rank = r.int(1, 3)
    kernel, strides, auto, pads = window(r, rank, v, None)
    more = {}
    if name == "AveragePool":
        more["count_include_pad"] = r.pick(None, 0, 1) if v >= 7 else None
        more["ceil_mode"] = r.pick(None, 0, 1) if v >= 10 and not auto else None
        more["dilations"] = r.maybe([r.int(1, 2) for _ in range(rank)]) if v >= 19 and not auto else None
    else:
        more["p"] = r.pick(None, 1, 2, 3) if v >= 2 else r.pick(None, 1.0, 2.0)
        more["ceil_mode"] = r.pick(None, 0, 1) if v >= 18 and not auto else None
        more["dilations"] = r.maybe([r.int(1, 2) for _ in range(rank)]) if v >= 18 and not auto else None
    x = r.array(t, [r.int(1, 2), r.int(1, 2)] + [r.int(5, 7) for _ in range(rank)], 0.1 if name == "LpPool" else -4)
    return Node([x], kernel_shape=kernel, strides=strides, auto_pad=auto, pads=pads, **more)


@op("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(r, t, v, name):
    p = {"p": r.pick(None, 1, 2) if v >= 2 else r.pick(None, 1.0, 2.0)} if name == "GlobalLpPool" else {}
    return Node([r.array(t, [r.int(1, 2), r.int(1, 3)] + r.shape(1, 3, (1, 2, 3)))], **p)


@op("Resize")
def resize(r, t, v, name):
    rank = r.int(1, 2)
    x = r.array(t, [1, r.int(1, 2)] + [r.int(2, 6) for _ in range(rank)])
    mode = r.pick("nearest", "linear", *(("cubic",) if rank == 2 and v >= 11 else ()))
    if v < 11:
        return Node([x, np.array([1, 1] + [r.pick(1.0, 2.0, 3.0) for _ in range(rank)], np.float32)], mode=mode if mode != "cubic" else "nearest")
    transform = r.pick("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", *(("half_pixel_symmetric",) if v >= 19 else ()))
    nearest = r.pick(None, "round_prefer_floor", "round_prefer_ceil", "floor", "ceil") if mode == "nearest" else None
    sizes = r.int(0, 1)
    to = [1, x.shape[1]] + [r.int(1, 9) for _ in range(rank)]
    scales = [1.0, 1.0] + [r.pick(0.5, 1.0, 1.5, 2.0, 0.6) for _ in range(rank)]
    given = [x, np.zeros([0], np.float32) if v < 13 else None] + ([np.zeros([0], np.float32) if v < 13 else None, i64(to)] if sizes else [np.array(scales, np.float32)])
    more = {"antialias": r.pick(None, None, 1) if v >= 18 and mode != "nearest" else None}
    return Node(given, mode=mode, coordinate_transformation_mode=transform, nearest_mode=nearest,
                cubic_coeff_a=r.maybe(-0.5) if mode == "cubic" else None, exclude_outside=r.pick(None, 1) if mode == "cubic" else None, **more)


@op("Upsample")
def upsample(r, t, v, name):
    x = r.array(t, [1, r.int(1, 2), r.int(2, 4), r.int(2, 4)])
    mode = r.pick(None, "nearest", "linear" if v >= 7 else "bilinear")
    scales = [1.0, 1.0, float(r.int(1, 3)), float(r.int(1, 3))]
    if v < 7:
        return Node([x], height_scale=scales[2], width_scale=scales[3], mode=mode)
    if v < 9:
        return Node([x], scales=scales, mode=mode)
    return Node([x, np.array(scales, np.float32)], mode=mode)


@op("GridSample")
def grid_sample(r, t, v, name):
    rank = 2 if v < 20 else r.int(2, 3)
    mode = r.pick(None, "bilinear" if v < 20 else "linear", "nearest", *(() if rank == 3 else ("bicubic" if v < 20 else "cubic",)))
    x = r.array(t, [1, r.int(1, 2)] + [r.int(2, 4) for _ in range(rank)])
    grid = r.array("float" if t not in FLOATS else t, [1] + [r.int(1, 3) for _ in range(rank)] + [rank], -1.3, 1.3)
    return Node([x, grid], mode=mode, padding_mode=r.pick(None, "zeros", "border", "reflection"), align_corners=r.pick(None, 0, 1))


@op("RoiAlign")
def roi_align(r, t, v, name):
    x, count = r.array(t, [2, 2, 6, 6]), r.int(0, 3)
    corner = r.rng.uniform(0, 3, (count, 2))
    rois = np.concatenate([corner, corner + r.rng.uniform(0.5, 3, (count, 2))], 1).astype(x.dtype)
    more = {"coordinate_transformation_mode": r.pick(None, "half_pixel", "output_half_pixel")} if v >= 16 else {}
    return Node([x, rois, r.rng.integers(0, 2, count).astype(np.int64)], mode=r.pick(None, "avg", "max"), output_height=r.int(1, 3), output_width=r.int(1, 3),
                sampling_ratio=r.pick(1, 2), spatial_scale=r.pick(1.0, 0.5), **more)


@op("LSTM", "GRU", "RNN")
def recurrent(r, t, v, name):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[name]
    direction = r.pick("forward", "reverse", "bidirectional")
    d, s, b, i, h = (2 if direction == "bidirectional" else 1), r.int(1, 3), r.int(1, 2), r.int(1, 3), r.int(1, 3)
    weights = [r.array(t, [d, gates * h, i], -1, 1), r.array(t, [d, gates * h, h], -1, 1), r.maybe(r.array(t, [d, 2 * gates * h], -1, 1))]
    lengths = r.maybe(r.rng.integers(1, s + 1, b).astype(np.int32), 0.3)
    inputs = [r.array(t, [s, b, i])] + weights + [lengths, r.maybe(r.array(t, [d, b, h], -1, 1))]
    more = {}
    if name == "LSTM":
        inputs += [r.maybe(r.array(t, [d, b, h], -1, 1)), r.maybe(r.array(t, [d, 3 * h], -1, 1))]
        more["input_forget"] = r.pick(None, 0, 1)
    if name == "GRU" and v >= 3:
        more["linear_before_reset"] = r.pick(None, 0, 1)
    return Node(inputs, outputs=3 if name == "LSTM" else 2, hidden_size=h, direction=direction, clip=r.maybe(1.5, 0.2), **more)


# Quantization, losses


@op("QuantizeLinear")
def quantize(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3, 4))
    axis = r.int(0, len(shape) - 1)
    per_axis = v >= 13 and r.int(0, 1)
    of = [shape[axis]] if per_axis else []
    target = r.pick("uint8", "int8", *(("float8e4m3fn", "float8e5m2") if v >= 19 else ()), *(("int16", "uint16", "int4", "uint4") if v >= 21 else ()))
    # Nothing is divided by 0, which is what halves may be rounded to.
    scale = r.array(t if t in ("float", "float16", "bfloat16") and v >= 19 else "float", of, 0.3, 2)
    zero = r.maybe(r.array(target, of, 0, 0 if target.startswith("float") else 7), 0.8)
    saturate = r.pick(None, 0, 1) if v >= 19 else None
    return Node([r.array(t, shape, -40, 40), scale, zero], axis=r.pick(axis, axis - len(shape)) if v >= 13 else None, saturate=saturate)


@op("DequantizeLinear")
def dequantize(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3, 4))
    axis = r.int(0, len(shape) - 1)
    of = [shape[axis]] if v >= 13 and r.int(0, 1) else []
    zero = r.maybe(r.array(t, of, 0, 0 if t in ("int32",) or t.startswith("float") else 7), 0.7)
    return Node([r.array(t, shape, -40, 40), r.array(r.pick("float", "float16") if v >= 19 else "float", of, 0.05, 2), zero],
                axis=r.pick(axis, axis - len(shape)) if v >= 13 else None)


@op("DynamicQuantizeLinear")
def dynamic_quantize(r, t, v, name):
    return Node([r.array("float", r.shape(1, 3, (1, 2, 3)), -9, 9)], outputs=3)


@op("MatMulInteger")
def matmul_integer(r, t, v, name):
    m, k, n, b = r.int(1, 3), r.int(1, 4), r.int(1, 3), r.pick("uint8", "int8")
    return Node([r.array(t, [m, k], -9, 9), r.array(b, [k, n], -9, 9), r.maybe(r.array(t, [], 0, 5)), r.maybe(r.array(b, r.pick([], [n]), 0, 5))])


@op("ConvInteger")
def conv_integer(r, t, v, name):
    kernel = [r.int(1, 3), r.int(1, 3)]
    pads = r.maybe([1, 1, 1, 1])
    w = r.pick("uint8", "int8")
    return Node([r.array(t, [1, 2, 5, 5], 0, 90), r.array(w, [2, 2] + kernel, -9, 9), r.maybe(r.array(t, [], 0, 5))], pads=pads, strides=r.maybe([2, 2]))


@op("QLinearMatMul")
def qlinear_matmul(r, t, v, name):
    m, k, n = r.int(1, 3), r.int(1, 4), r.int(1, 3)
    kind = t if t in ("uint8", "int8") else "uint8"
    scale = lambda: r.array("float", [], 0.05, 1)
    zero = lambda: r.array(kind, [], 0, 5)
    return Node([r.array(kind, [m, k], -90, 90), scale(), zero(), r.array(kind, [k, n], -90, 90), scale(), zero(), scale(), zero()])


@op("QLinearConv")
def qlinear_conv(r, t, v, name):
    scale = lambda shape=(): r.array("float", shape, 0.05, 1)
    zero = lambda shape=(): r.array(t, shape, 0, 5)
    per = r.int(0, 1)
    inputs = [r.array(t, [1, 2, 5, 5], -90, 90), scale(), zero(), r.array(t, [3, 2, 2, 2], -90, 90), scale([3] if per else []), r.array(t, [3] if per else [], 0, 0), scale(), zero()]
    return Node(inputs + ([r.array("int32", [3], -90, 90)] if r.int(0, 1) else []), pads=r.maybe([1, 1, 1, 1]), strides=r.maybe([2, 2]))


@op("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")
def loss(r, t, v, name):
    n, c, rest = r.int(1, 3), r.int(1, 4), r.shape(0, 2, (1, 2))
    target = r.rng.integers(0, c, tuple([n] + rest)).astype(r.pick(np.int32, np.int64))
    outputs = r.int(1, 2) if name[0] == "S" else 1
    return Node([r.array(t, [n, c] + rest), target, r.maybe(r.array(t, [c], 0.1, 2))], outputs=outputs, reduction=r.pick(None, "none", "sum", "mean"),
                ignore_index=r.pick(None, None, 0, -1))


@op("NonMaxSuppression")
def nms(r, t, v, name):
    boxes = r.rng.uniform(0, 4, (1, 6, 4)).astype(np.float32)
    scores = r.rng.random((1, 2, 6)).astype(np.float32)
    return Node([boxes, scores, i64([r.int(0, 4)]), r.maybe(np.array([0.4], np.float32)), r.maybe(np.array([0.3], np.float32))], center_point_box=r.pick(None, 0, 1))


# Images, signals, text


@op("AffineGrid")
def affine_grid(r, t, v, name):
    rank = r.int(2, 3)
    n = r.int(1, 2)
    size = i64([n, 1] + [r.int(1, 4) for _ in range(rank)])
    return Node([r.array(t, [n, rank, rank + 1]), size], align_corners=r.pick(None, 0, 1))


@op("HannWindow", "HammingWindow", "BlackmanWindow")
def signal_window(r, t, v, name):
    return Node([np.array(r.int(1, 12), r.pick(np.int32, np.int64))], periodic=r.pick(None, 0, 1), output_datatype=r.pick(None, 1, 11))


@op("MelWeightMatrix")
def mel(r, t, v, name):
    scalar = lambda value, kind: np.array(value, kind)
    return Node([scalar(r.int(2, 6), np.int64), scalar(r.pick(16, 32), np.int64), scalar(8000, np.int64), scalar(0.0, np.float32), scalar(3500.0, np.float32)])


@op("DFT")
def dft(r, t, v, name):
    shape = [r.int(1, 2), r.int(2, 8), r.pick(1, 2)]
    inverse = r.pick(None, 0, 1)
    one_sided = 1 if shape[2] == 1 and not inverse and r.int(0, 1) else None
    length = r.maybe(np.array(r.int(1, 9), np.int64), 0.3)
    if v < 20:
        return Node([r.array(t, shape), length], axis=1, inverse=inverse, onesided=one_sided)
    return Node([r.array(t, shape), length, np.array(r.pick(1, -2), np.int64)], inverse=inverse, onesided=one_sided)


@op("STFT")
def stft(r, t, v, name):
    length = r.int(3, 6)
    return Node([r.array(t, [r.int(1, 2), 16, 1]), np.array(r.int(1, 4), np.int64), r.array(t, [length]), np.array(length, np.int64)], onesided=r.pick(None, 0, 1))


@op("Col2Im")
def col2im(r, t, v, name):
    image, block = [r.int(4, 6), r.int(4, 6)], [r.int(1, 3), r.int(1, 3)]
    strides, pads = [r.int(1, 2)] * 2, [r.int(0, 1)] * 4
    count = [(image[i] + 2 * pads[0] - block[i]) // strides[i] + 1 for i in range(2)]
    return Node([r.array(t, [1, 2 * block[0] * block[1], count[0] * count[1]]), i64(image), i64(block)], strides=strides, pads=pads)


@op("CenterCropPad")
def center_crop_pad(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3, 4, 5))
    if r.int(0, 1):
        axes = r.rng.choice(len(shape), r.int(1, len(shape)), replace=False).tolist()
        return Node([r.array(t, shape), i64([r.int(1, 6) for _ in axes])], axes=axes)
    return Node([r.array(t, shape), i64([r.int(1, 6) for _ in shape])])


@op("Det")
def det(r, t, v, name):
    n = r.int(1, 4)
    return Node([r.array(t, r.shape(0, 2, (1, 2)) + [n, n])])


@op("DeformConv")
def deform_conv(r, t, v, name):
    k, group, groups = r.int(1, 3), r.pick(1, 2), r.pick(1, 2)
    pad = r.int(0, 1)
    out = 5 + 2 * pad - k + 1
    inputs = [r.array(t, [1, 2, 5, 5]), r.array(t, [2, 2 // group, k, k]), r.array(t, [1, groups * 2 * k * k, out, out], -1, 1)]
    inputs += [r.maybe(r.array(t, [2])), r.maybe(r.array(t, [1, groups * k * k, out, out], 0, 1))]
    return Node(inputs, kernel_shape=[k, k], pads=[pad] * 4, group=group, offset_group=groups)


@op("MaxRoiPool")
def max_roi_pool(r, t, v, name):
    rois = np.array([[0, 0, 0, r.int(1, 5), r.int(1, 5)] for _ in range(r.int(1, 2))])
    x = r.array(t, [1, 2, 6, 6])
    return Node([x, rois.astype(x.dtype)], pooled_shape=[r.int(1, 3), r.int(1, 3)], spatial_scale=r.pick(None, 0.5))


@op("MaxUnpool")
def max_unpool(r, t, v, name):
    x = r.array(t, [1, 2, 2, 2])
    at = np.stack([np.array([5, 6, 8, 10]) + 16 * c for c in range(2)]).reshape(1, 2, 2, 2).astype(np.int64)
    return Node([x, at], kernel_shape=[2, 2], strides=[2, 2])


@op("RotaryEmbedding")
def rotary(r, t, v, name):
    n, heads, length, size = r.int(1, 2), r.int(1, 2), r.int(1, 3), r.pick(2, 4)
    return Node([r.array(t, [n, heads, length, size]), r.array(t, [5, size // 2], -1, 1), r.array(t, [5, size // 2], -1, 1),
                 r.rng.integers(0, 5, (n, length)).astype(np.int64)], interleaved=r.pick(None, 0, 1))


@op("Attention")
def attention(r, t, v, name):
    n, heads, q, kv, size, out = r.int(1, 2), r.pick(2, 4), r.int(1, 3), r.int(1, 4), r.pick(2, 3), r.pick(2, 4)
    groups = r.pick(1, 2)
    past = r.maybe(r.int(1, 2), 0.3)
    total = kv + (past or 0)
    mask = r.pick(None, r.array("bool", [q, total]) | True, r.array(t, [q, total]), r.array(t, [n, 1, q, total]))
    inputs = [r.array(t, [n, heads, q, size]), r.array(t, [n, heads // groups, kv, size]), r.array(t, [n, heads // groups, kv, out]), mask]
    if past:
        inputs += [r.array(t, [n, heads // groups, past, size]), r.array(t, [n, heads // groups, past, out])]
    return Node(inputs, outputs=3 if past else 1, is_causal=r.pick(None, 0, 1) if mask is None or mask.dtype != bool else None, scale=r.maybe(0.5), softcap=r.maybe(2.0, 0.2))


@op("SwiGLU")
def swiglu(r, t, v, name):
    shape = r.shape(1, 3)
    return Node([r.array(t, shape), r.array(t, shape)], alpha=r.maybe(0.5))


@op("TensorScatter")
def tensor_scatter(r, t, v, name):
    n, length = r.int(1, 2), r.int(3, 5)
    return Node([r.array(t, [n, 2, length, 2]), r.array(t, [n, 2, 2, 2]), r.maybe(r.rng.integers(0, length - 1, n).astype(np.int64))], mode=r.pick(None, "linear", "circular"))


@op("StringConcat")
def string_concat(r, t, v, name):
    a, b = r.broadcast(2)
    return Node([r.array("string", a), r.array("string", b)])


@op("StringNormalizer")
def string_normalizer(r, t, v, name):
    words = np.array([r.pick("Ab", "monday", "ÄB", "x") for _ in range(r.int(1, 5))], dtype=object)
    return Node([words], case_change_action=r.pick(None, "NONE", "LOWER", "UPPER"), is_case_sensitive=r.pick(None, 0, 1), stopwords=r.maybe(["monday"]))


@op("StringSplit")
def string_split(r, t, v, name):
    words = np.array([r.pick("a b", "a,,b", "", " a  b ", "abc") for _ in range(r.int(1, 3))], dtype=object)
    return Node([words], outputs=2, delimiter=r.pick(None, ",", " "), maxsplit=r.maybe(r.int(1, 2)))


@op("RegexFullMatch")
def regex(r, t, v, name):
    words = np.array([r.pick("www.a.com", "b@c.org", "", "a1") for _ in range(3)], dtype=object)
    return Node([words], pattern=r.pick(r"www\.[\w.-]+\.\bcom\b", r"(\w+)@\w+\.org", r"[a-z]\d?", ""))


# com.microsoft, and classical machine learning: versions are not told apart.


def ms(inputs, outputs=1, **attributes):
    return Node(inputs, outputs, domain="com.microsoft", **attributes)


def scale(r, shape=()):
    return r.array("float", shape, 0.3, 1)


@op("com.microsoft.Gelu", "com.microsoft.QuickGelu")
def ms_unary(r, t, v, name):
    return ms([r.array("float", r.shape(1, 3, (1, 2, 3)))])


@op("com.microsoft.FastGelu", "com.microsoft.BiasGelu")
def ms_bias_gelu(r, t, v, name):
    n = r.int(1, 4)
    return ms([r.array("float", [r.int(1, 3), n]), r.array("float", [n])])


@op("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul")
def ms_matmul(r, t, v, name):
    ta, tb = r.int(0, 1), r.int(0, 1)
    a, b = ([3, 2] if ta else [2, 3]), ([4, 3] if tb else [3, 4])
    return ms([r.array("float", [2] + a), r.array("float", [2] + b)], transA=ta, transB=tb, alpha=r.maybe(0.5))


@op("com.microsoft.FusedGemm")
def ms_gemm(r, t, v, name):
    function = r.pick("Relu", "Sigmoid", "Tanh", "LeakyRelu")
    return ms([r.array("float", [2, 3]), r.array("float", [3, 4]), r.array("float", [4])], activation=function,
              activation_alpha=0.1 if function == "LeakyRelu" else None, alpha=r.maybe(0.5))


@op("com.microsoft.FusedConv")
def ms_conv(r, t, v, name):
    function = r.pick("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "HardSigmoid")
    parameters = {"LeakyRelu": [0.1], "Clip": [-1.0, 1.0], "HardSigmoid": [0.2, 0.4]}.get(function)
    return ms([r.array("float", [1, 2, 5, 5]), r.array("float", [3, 2, 3, 3]), r.maybe(r.array("float", [3]))], activation=function, activation_params=parameters, pads=r.maybe([1, 1, 1, 1]))


@op("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization")
def ms_skip(r, t, v, name):
    n = r.int(1, 5)
    shape = [r.int(1, 2), r.int(1, 3), n]
    inputs = [r.array("float", shape), r.array("float", shape), r.array("float", [n])]
    if "Simplified" not in name:
        inputs.append(r.maybe(r.array("float", [n])))
    return ms(inputs + [r.maybe(r.array("float", [n]))], epsilon=0.01)


@op("com.microsoft.QLinearAdd", "com.microsoft.QLinearMul")
def ms_qlinear_binary(r, t, v, name):
    kind = r.pick("uint8", "int8")
    a, b = r.broadcast(2, 3)
    part = lambda shape: [r.array(kind, shape, -90, 90), scale(r), r.array(kind, [], 0, 9)]
    return ms(part(a) + part(b) + [scale(r), r.array(kind, [], 0, 9)])


@op("com.microsoft.QLinearSigmoid", "com.microsoft.QLinearLeakyRelu")
def ms_qlinear_unary(r, t, v, name):
    kind = r.pick("uint8", "int8")
    return ms([r.array(kind, r.shape(1, 3, (1, 2, 3)), -90, 90), scale(r), r.array(kind, [], 0, 9), (np.float32(0.01) if "Sig" in name else scale(r)) + np.zeros([], np.float32),
               r.array(kind, [], 0, 9)], alpha=0.1 if "Leaky" in name else None)


@op("com.microsoft.QLinearGlobalAveragePool", "com.microsoft.QLinearAveragePool")
def ms_qlinear_pool(r, t, v, name):
    kind = r.pick("uint8", "int8")
    more = {} if "Global" in name else dict(kernel_shape=[2, 2], pads=r.maybe([1, 1, 0, 0]), count_include_pad=r.pick(None, 1))
    return ms([r.array(kind, [1, 2, 4, 4], -90, 90), scale(r), r.array(kind, [], 0, 9), scale(r), r.array(kind, [], 0, 9)], **more)


@op("com.microsoft.QLinearConcat")
def ms_qlinear_concat(r, t, v, name):
    kind = r.pick("uint8", "int8")
    inputs = [scale(r), r.array(kind, [], 0, 9)]
    for _ in range(2):
        inputs += [r.array(kind, [2, r.int(1, 3)], -90, 90), scale(r), r.array(kind, [], 0, 9)]
    return ms(inputs, axis=1)


@op("com.microsoft.DynamicQuantizeMatMul")
def ms_dynamic_matmul(r, t, v, name):
    kind = r.pick("uint8", "int8")
    return ms([r.array("float", [2, 3]), r.array(kind, [3, 4], -90, 90), scale(r), r.array(kind, [], 0, 0), r.maybe(r.array("float", [4]))])


@op("com.microsoft.MatMulIntegerToFloat")
def ms_matmul_to_float(r, t, v, name):
    a, b = r.pick("uint8", "int8"), r.pick("uint8", "int8")
    return ms([r.array(a, [2, 3], -90, 90), r.array(b, [3, 4], -90, 90), scale(r), scale(r), r.array(a, [], 0, 9), r.array(b, [], 0, 9), r.maybe(r.array("float", [4]))])


@op("com.microsoft.MatMulNBits")
def ms_nbits(r, t, v, name):
    k, n, block = r.pick(16, 32, 40), r.int(1, 4), 16
    blocks = -(-k // block)
    zero = r.maybe(r.rng.integers(0, 256, n * -(-blocks // 2)).astype(np.uint8))
    return ms([r.array("float", [2, k]), (r.rng.integers(0, 256, (n, blocks, block // 2)).astype(np.uint8), "constant"), (scale(r, [n * blocks]), "constant"),
               None if zero is None else (zero, "constant")], K=k, N=n, bits=4, block_size=block)


@op("com.microsoft.QuantizeLinear")
def ms_quantize(r, t, v, name):
    kind = r.pick("uint8", "int8", "uint16", "int16")
    return ms([r.array("float", [2, 3], -40, 40), scale(r), r.array(kind, [], 0, 9)])


@op("com.microsoft.DequantizeLinear")
def ms_dequantize(r, t, v, name):
    kind = r.pick("uint8", "int8", "uint16", "int16")
    return ms([r.array(kind, [2, 3], -40, 40), scale(r), r.array(kind, [], 0, 9)])


@op("com.microsoft.MultiHeadAttention")
def ms_mha(r, t, v, name):
    n, q, kv, heads, size = r.int(1, 2), r.int(1, 3), r.int(1, 4), 2, 3
    bias = r.maybe(r.array("float", [3 * heads * size]))
    mask = r.maybe(r.rng.integers(0, 2, (n, kv)).astype(np.int32) | np.array([1] + [0] * (kv - 1), np.int32))
    return ms([r.array("float", [n, q, heads * size]), r.array("float", [n, kv, heads * size]), r.array("float", [n, kv, heads * size]), bias, mask], num_heads=heads)


@op("com.microsoft.Attention")
def ms_attention(r, t, v, name):
    n, length, heads, size = r.int(1, 2), r.int(1, 4), 2, 3
    mask = r.maybe(r.rng.integers(1, length + 1, n).astype(np.int32))
    return ms([r.array("float", [n, length, 4]), r.array("float", [4, 3 * heads * size], -1, 1), r.array("float", [3 * heads * size], -1, 1), mask], num_heads=heads,
              unidirectional=r.pick(None, 0, 1))


@op("com.microsoft.RotaryEmbedding")
def ms_rotary(r, t, v, name):
    n, length, heads, size = r.int(1, 2), r.int(1, 3), 2, 4
    at = r.rng.integers(0, 5, (n, length)).astype(np.int64)
    return ms([r.array("float", [n, heads, length, size]), at, r.array("float", [8, size // 2], -1, 1), r.array("float", [8, size // 2], -1, 1)], interleaved=r.pick(None, 0, 1))


@op("ai.onnx.ml.Scaler")
def ml_scaler(r, t, v, name):
    f = r.int(1, 3)
    return Node([r.array(t, [r.int(1, 3), f])], domain="ai.onnx.ml", offset=[r.float() for _ in range(f)], scale=[r.float() for _ in range(f)])


@op("ai.onnx.ml.Normalizer")
def ml_normalizer(r, t, v, name):
    return Node([r.array(t, [r.int(1, 3), r.int(1, 4)])], domain="ai.onnx.ml", norm=r.pick("MAX", "L1", "L2"))


@op("ai.onnx.ml.Binarizer")
def ml_binarizer(r, t, v, name):
    return Node([r.array(t, [r.int(1, 3), r.int(1, 4)])], domain="ai.onnx.ml", threshold=r.maybe(0.5))


@op("ai.onnx.ml.LinearRegressor")
def ml_linear(r, t, v, name):
    f = r.int(1, 3)
    return Node([r.array(t, [r.int(1, 3), f])], domain="ai.onnx.ml", coefficients=[r.float() for _ in range(2 * f)], intercepts=r.maybe([0.5, -1.0]), targets=2,
                post_transform=r.pick(None, "NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"))


@op("ai.onnx.ml.Imputer")
def ml_imputer(r, t, v, name):
    if t == "int64":
        return Node([r.array(t, [2, 3], 0, 2)], domain="ai.onnx.ml", imputed_value_int64s=r.pick([7], [7, 8, 9]), replaced_value_int64=1)
    x = r.array(t, [2, 3], 0, 2, whole=True)
    return Node([x], domain="ai.onnx.ml", imputed_value_floats=r.pick([7.0], [7.0, 8.0, 9.0]), replaced_value_float=1.0)


@op("ai.onnx.ml.ArrayFeatureExtractor")
def ml_extractor(r, t, v, name):
    shape = r.shape(1, 3, (1, 2, 3))
    return Node([r.array(t, shape), r.rng.integers(0, shape[-1], r.int(1, 3)).astype(np.int64)], domain="ai.onnx.ml")


@op("ai.onnx.ml.OneHotEncoder")
def ml_one_hot(r, t, v, name):
    if t == "string":
        return Node([r.array(t, [2, 2])], domain="ai.onnx.ml", cats_strings=["a", "b"], zeros=1)
    return Node([r.array(t, [2, 2], 0, 3, whole=True)], domain="ai.onnx.ml", cats_int64s=[0, 1, 2], zeros=r.pick(None, 1))


@op("ai.onnx.ml.LabelEncoder")
def ml_label(r, t, v, name):
    if v < 2:
        return Node([r.array("int64", [3], 0, 3)], domain="ai.onnx.ml", classes_strings=["x", "y"], default_string="z")
    if t == "string":
        return Node([r.array(t, [4])], domain="ai.onnx.ml", keys_strings=["a", "b"], values_int64s=[5, 6], default_int64=r.maybe(9))
    if t == "int64":
        return Node([r.array(t, [4], 0, 3)], domain="ai.onnx.ml", keys_int64s=[0, 1], values_floats=[0.5, 1.5], default_float=r.maybe(2.5))
    return None


@op("ai.onnx.ml.SVMRegressor")
def ml_svm(r, t, v, name):
    kernel = r.pick("LINEAR", "RBF", "POLY", "SIGMOID")
    return Node([r.array(t, [2, 3], -1, 1)], domain="ai.onnx.ml", kernel_type=kernel, kernel_params=[0.5, 0.3, 2.0], n_supports=2, coefficients=[0.5, -1.0],
                support_vectors=[r.float() for _ in range(6)], rho=[0.2])


@op("ai.onnx.ml.TreeEnsembleRegressor")
def ml_tree(r, t, v, name):
    mode = r.pick("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GT", "BRANCH_GTE", "BRANCH_EQ", "BRANCH_NEQ")
    return Node([r.array(t, [3, 2], -2, 2, whole=True)], domain="ai.onnx.ml", nodes_treeids=[0, 0, 0], nodes_nodeids=[0, 1, 2], nodes_featureids=[r.int(0, 1), 0, 0],
                nodes_values=[float(r.int(-1, 1)), 0.0, 0.0], nodes_modes=[mode, "LEAF", "LEAF"], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0],
                target_treeids=[0, 0], target_nodeids=[1, 2], target_ids=[0, 0], target_weights=[r.float(), r.float()], n_targets=1,
                post_transform=r.pick(None, "NONE", "LOGISTIC"), base_values=r.maybe([0.5]))


# Making and asking


def split_name(name):
    domain, _, op_type = name.rpartition(".")
    return domain, op_type


def model_of(name, node, opset):
    """The model, and what is fed to it."""
    domain, op_type = split_name(name)
    inputs, feeds, constants, fed = [], {}, [], []
    for at, given in enumerate(node.inputs):
        if given is None:
            inputs.append("")
            continue
        is_constant = isinstance(given, tuple)
        value = given[0] if is_constant else given
        inputs.append(f"x{at}")
        code = TensorProto.STRING if value.dtype == object else helper.np_dtype_to_tensor_dtype(value.dtype)
        if is_constant or NAMES[code] not in PLAIN:
            if code == TensorProto.STRING:
                constants.append(helper.make_tensor(f"x{at}", code, value.shape, [s.encode() for s in value.reshape(-1)]))
            else:
                constants.append(numpy_helper.from_array(value, f"x{at}"))
        else:
            feeds[f"x{at}"] = value
            fed.append(helper.make_tensor_value_info(f"x{at}", code, value.shape))
    while inputs and not inputs[-1]:
        inputs.pop()
    outputs = [f"y{at}" for at in range(node.outputs)]
    made = helper.make_node(op_type, inputs, outputs, domain=domain, name="node")
    for attribute, value in node.attributes.items():
        made.attribute.append(helper.make_attribute(attribute, value))
    imports = [helper.make_opsetid("", opset if not domain else 17)] + ([helper.make_opsetid(domain, opset)] if domain else [])
    graph = helper.make_graph([made], "g", fed, [onnx.ValueInfoProto(name=o) for o in outputs], constants)
    model = helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 20 else 10 if opset < 24 else 12)
    # What the outputs are, and a cast of those that no NumPy file holds.
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    except Exception:
        inferred = model
    types = {o.name: o.type.tensor_type.elem_type for o in inferred.graph.output}
    del model.graph.output[:]
    kinds = []
    for output in outputs:
        kind = NAMES.get(types.get(output), None)
        kinds.append(kind)
        if kind is None or kind in PLAIN:
            model.graph.output.append(onnx.helper.make_tensor_value_info(output, CODES[kind], None) if kind else onnx.ValueInfoProto(name=output))
        elif kind == "string":
            model.graph.output.append(onnx.helper.make_tensor_value_info(output, TensorProto.STRING, None))
        else:
            to = TensorProto.FLOAT if "float" in kind else TensorProto.INT32
            model.graph.node.append(helper.make_node("Cast", [output], [output + "c"], to=to))
            model.graph.output.append(onnx.helper.make_tensor_value_info(output + "c", to, None))
    return model, feeds, kinds


def ask_oracle(model, feeds):
    names = [o.name for o in model.graph.output]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return "ort", dict(zip(names, session.run(names, feeds))), ""
    except Exception as error:
        why = str(error)
    try:
        with np.errstate(all="ignore"):
            return "onnx", dict(zip(names, ReferenceEvaluator(model).run(names, feeds))), why
    except Exception as error:
        return None, None, f"{why[:200]} / {str(error)[:200]}"


def array_of(value):
    """A tensor as the command writes it to JSON."""
    kind = {"string": object, "i64": np.int64}[value["dtype"]]
    return np.array(value["data"], dtype=kind).reshape(value["shape"])


def ask_ours(binary, folder, at, model, feeds):
    path = os.path.join(folder, f"{at}.onnx")
    onnx.save(model, path)
    np.savez(os.path.join(folder, f"{at}.npz"), **feeds)
    strings = any(o.type.tensor_type.elem_type == TensorProto.STRING for o in model.graph.output)
    results = os.path.join(folder, f"{at}.out." + ("json" if strings else "npz"))
    command = [binary, "run", path, "--inputs", os.path.join(folder, f"{at}.npz"), "--outputs", results, "--backend", BACKEND, "--no-map"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None, "took more than two minutes"
    if done.returncode != 0:
        return None, done.stderr.strip().replace("\n", " ")[:400]
    if strings:
        with open(results, encoding="utf-8") as file:
            read = json.load(file)
        os.remove(results)
        return {name: array_of(value) for name, value in read.items()}, ""
    with np.load(results) as file:
        return {name: file[name] for name in file.files}, ""


def compare(kind, ours, theirs):
    theirs = np.asarray(theirs)
    if kind == "string":
        theirs = theirs.astype(object)
    if ours.dtype != theirs.dtype:
        return f"type {ours.dtype}, expected {theirs.dtype}"
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, expected {theirs.shape}"
    if ours.dtype.kind in "fc":
        relative, absolute = TOLERANCE.get(kind, (1e-3, 1e-5))
        with np.errstate(all="ignore"):
            a, b = ours.astype(np.float64), theirs.astype(np.float64)
            near = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= absolute + relative * np.abs(b))
    else:
        near = ours == theirs
    if near.all():
        return ""
    first = np.argwhere(~near)[0].tolist()
    return f"{int((~near).sum())} of {near.size} differ; at {first} {ours[tuple(first)]!r}, expected {theirs[tuple(first)]!r}"


def versions(name, only_newest):
    """Each version of the schema, with the newest opset that has it."""
    domain, op_type = split_name(name)
    found = sorted({s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.domain == domain and s.name == op_type and not s.deprecated})
    ended = [s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.domain == domain and s.name == op_type and s.deprecated]
    if not found:
        return [(1, 1, ["float"])]
    newest = {"": NEWEST, "ai.onnx.ml": 4}.get(domain, 1)
    result = []
    for at, since in enumerate(found):
        following = ([v for v in found + ended if v > since] or [newest + 1])
        schema = onnx.defs.get_schema(op_type, since, domain)
        result.append((since, max(since, min(min(following) - 1, newest)), types_of(schema)))
    return result[-1:] if only_newest else result


def types_of(schema):
    """What the first input may be; of an operator without a type parameter there, float stands for all."""
    if not schema.inputs:
        return ["float"]
    first = "condition" == schema.inputs[0].name
    allowed = schema.inputs[1 if first else 0].types
    names = [a[len("tensor("):-1] for a in allowed if a.startswith("tensor(")]
    return sorted(n for n in names if n in CODES and not n.startswith("complex"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5, help="cases of every operator, version and type")
    parser.add_argument("--only", help="operators whose name has this in it")
    parser.add_argument("--exact", help="operators of these names, with commas between")
    parser.add_argument("--newest", action="store_true", help="the newest version of each operator only")
    parser.add_argument("--floats", action="store_true", help="f32 only, where the operator admits it")
    parser.add_argument("--binary", default="target/debug/cutover")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", help="folder for the models that differ or are refused")
    arguments = parser.parse_args()
    global BACKEND
    BACKEND = arguments.backend
    folder = tempfile.mkdtemp(prefix="difference")
    jobs = []
    for name, make in GENERATORS.items():
        if (arguments.only and arguments.only not in name) or (arguments.exact and name not in arguments.exact.split(",")):
            continue
        for since, opset, types in versions(name, arguments.newest):
            if arguments.floats and "float" in types:
                types = ["float"]
            jobs += [(name, make, since, opset, t, n) for t in types for n in range(arguments.count)]

    def work(job):
        name, make, since, opset, t, n = job
        seed = [arguments.seed, n, since, CODES[t], *name.encode()]
        try:
            node = make(Random(seed), t, since, name)
            if node is None:
                return job, "skipped", ""
            model, feeds, kinds = model_of(name, node, opset)
        except Exception as error:
            return job, "unmade", repr(error)
        oracle, theirs, why = ask_oracle(model, feeds)
        at = f"{name}-{since}-{t}-{n}"
        ours, message = ask_ours(arguments.binary, folder, at, model, feeds)
        if "overflowed" in message or "panicked" in message:
            verdict = "crashed", message
        elif theirs is None:
            verdict = ("alone", "") if ours is not None else ("neither", f"{message} / {why}")
        elif ours is None:
            verdict = "refused", f"{message} ({oracle})"
        else:
            outputs = zip(kinds, (o.name for o in model.graph.output))
            differences = [d for kind, o in outputs if (d := compare(kind, ours[o], theirs[o]))]
            verdict = ("differ", f"{differences[0]} ({oracle})") if differences else ("agree", oracle)
        if arguments.keep and verdict[0] in ("differ", "refused", "crashed"):
            os.makedirs(arguments.keep, exist_ok=True)
            onnx.save(model, os.path.join(arguments.keep, at + ".onnx"))
            np.savez(os.path.join(arguments.keep, at + ".npz"), **feeds)
        for ending in (".onnx", ".npz", ".out.npz"):
            if os.path.exists(os.path.join(folder, at + ending)):
                os.remove(os.path.join(folder, at + ending))
        return job, *verdict

    table = collections.defaultdict(collections.Counter)
    details = collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool:
        for (name, _, since, opset, t, n), verdict, detail in pool.map(work, jobs):
            table[name][verdict] += 1
            if verdict not in ("agree", "skipped", "alone"):
                details[name, verdict].append((since, t, n, detail))
    for (name, verdict), found in details.items():
        print(f"{name} {verdict}: {len(found)}")
        shown = set()
        for since, t, n, detail in found:
            if (since, t) in shown or len(shown) >= 6:
                continue
            shown.add((since, t))
            print(f"    version {since} {t} #{n}: {detail}")
    columns = ["agree", "differ", "refused", "crashed", "alone", "neither", "unmade", "skipped"]
    print(f"\n{'operator':32} {'cases':>6} " + " ".join(f"{c:>8}" for c in columns))
    for name, counts in table.items():
        print(f"{name:32} {sum(counts.values()):6} " + " ".join(f"{counts[c] or '':>8}" for c in columns))
    total = sum(table.values(), collections.Counter())
    print(f"{'all':32} {sum(total.values()):6} " + " ".join(f"{total[c]:8}" for c in columns))


BACKEND = "reference"
# The newest opset that ONNX Runtime 1.32 has kernels for.
NEWEST = 25

if __name__ == "__main__":
    main()
