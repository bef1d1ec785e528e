"""Writes small models whose graphs look like what exporters write, with inputs and ONNX Runtime's outputs.

    python make_models.py      needs numpy, onnx and onnxruntime; writes models/NAME.{onnx,in.npz,out.npz}

The suite compares every backend with the stored outputs, so it needs none of these packages.
"""

import os
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Builder:
    """Collects nodes and weights; every method returns the name of its result."""

    def __init__(self, opset, seed):
        self.opset, self.nodes, self.weights = opset, [], []
        self.random = np.random.default_rng(seed)

    def constant(self, value, dtype=np.int64):
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape, scale=None, shift=0.0):
        fan_in = int(np.prod(shape[1:])) or 1
        scale = fan_in**-0.5 if scale is None else scale
        return self.constant(self.random.standard_normal(shape) * scale + shift, np.float32)

    def op(self, kind, *inputs, outputs=1, **attributes):
        index = len(self.nodes)
        names = [f"{kind.lower()}_{index}"] + [f"{kind.lower()}_{index}_{i}" for i in range(1, outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"/{kind}_{index}", **attributes))
        return names[0] if outputs == 1 else names

    def conv(self, x, channels_in, channels, kernel, group=1, **attributes):
        w = self.weight(channels, channels_in // group, *([kernel] * attributes.pop("axes", 2)))
        return self.op("Conv", x, w, self.weight(channels, scale=0.1), group=group, **attributes)

    def batch_norm(self, x, channels):
        mean, scale = self.weight(channels, scale=0.2), self.weight(channels, scale=0.1, shift=1.0)
        variance = self.constant(self.random.uniform(0.5, 1.5, channels), np.float32)
        return self.op("BatchNormalization", x, scale, self.weight(channels, scale=0.1), mean, variance)

    def linear(self, x, features_in, features):
        return self.op("Add", self.weight(features, scale=0.1), self.op("MatMul", x, self.weight(features_in, features)))

    def model(self, inputs, outputs):
        shapes = lambda pairs: [helper.make_tensor_value_info(n, t, s) for n, t, s in pairs]
        graph = helper.make_graph(self.nodes, "graph", shapes(inputs), shapes(outputs), self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def mobile(seed):
    """Inverted residuals with clips, squeeze and excite, hard swish; BatchNormalization not folded. Opset 10: Clip has attributes."""
    b = Builder(10, seed)
    x = b.conv("image", 3, 16, 3, strides=[2, 2], pads=[1, 1, 1, 1])
    x = b.op("Clip", b.batch_norm(x, 16), min=0.0, max=6.0)
    y = b.op("Clip", b.batch_norm(b.conv(x, 16, 48, 1), 48), min=0.0, max=6.0)
    y = b.op("Clip", b.batch_norm(b.conv(y, 48, 48, 5, group=48, pads=[2, 2, 2, 2]), 48), min=0.0, max=6.0)
    s = b.op("Relu", b.conv(b.op("GlobalAveragePool", y), 48, 12, 1))
    y = b.op("Mul", y, b.op("Sigmoid", b.conv(s, 12, 48, 1)))
    x = b.op("Add", x, b.batch_norm(b.conv(y, 48, 16, 1), 16))
    y = b.conv(x, 16, 40, 3, group=2, strides=[2, 1], pads=[0, 1, 1, 0], dilations=[1, 2])
    gate = b.op("Clip", b.op("Add", y, b.constant(3.0, np.float32)), min=0.0, max=6.0)
    y = b.op("Div", b.op("Mul", y, gate), b.constant(6.0, np.float32))
    y = b.op("AveragePool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = b.op("ReduceMean", y, axes=[2, 3], keepdims=0)
    y = b.op("Gemm", y, b.weight(10, 40), b.weight(10, scale=0.1), transB=1)
    y = b.op("Softmax", y, axis=1)
    data = {"image": b.random.standard_normal((2, 3, 33, 29)).astype(np.float32)}
    return b.model([("image", FLOAT, ["N", 3, "H", "W"])], [(y, FLOAT, ["N", 10])]), data


def segmentation(seed):
    """A contracting and an expanding path with skips, over any height and width. Opset 13."""
    b = Builder(13, seed)
    down1 = b.op("Relu", b.conv("image", 1, 8, 3, pads=[1, 1, 1, 1]))
    x = b.op("MaxPool", down1, kernel_shape=[2, 2], strides=[2, 2])
    down2 = b.op("LeakyRelu", b.conv(x, 8, 16, 3, pads=[1, 1, 1, 1]), alpha=0.1)
    x = b.op("MaxPool", down2, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = b.op("Elu", b.conv(x, 16, 24, 3, pads=[2, 2, 2, 2], dilations=[2, 2]))
    x = b.op("ConvTranspose", x, b.weight(24, 16, 2, 2), b.weight(16, scale=0.1), strides=[2, 2])
    x = b.op("Concat", x, down2, axis=1)
    x = b.op("Relu", b.conv(x, 32, 8, 1))
    x = b.op("ConvTranspose", x, b.weight(8, 8, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    x = b.op("Concat", down1, x, axis=1)
    x = b.op("Sigmoid", b.conv(x, 16, 2, 3, pads=[1, 1, 1, 1]))
    data = {"image": b.random.standard_normal((1, 1, 24, 40)).astype(np.float32)}
    return b.model([("image", FLOAT, ["N", 1, "H", "W"])], [(x, FLOAT, ["N", 2, "H", "W"])]), data


def transformer(seed):
    """Two encoder layers as exporters write them: shapes computed by Shape, Gather, Concat; masks; Erf; LayerNormalization in parts. Opset 14."""
    b = Builder(14, seed)
    width, heads, vocabulary = 32, 4, 50
    scalar = lambda value: b.constant(value, np.float32)
    size = lambda x, axis: b.op("Gather", b.op("Shape", x), b.constant(axis), axis=0)
    unsqueeze = lambda x, axis: b.op("Unsqueeze", x, b.constant([axis]))

    def layer_norm(x):
        centred = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
        variance = b.op("ReduceMean", b.op("Pow", centred, scalar(2.0)), axes=[-1])
        x = b.op("Div", centred, b.op("Sqrt", b.op("Add", variance, scalar(1e-5))))
        return b.op("Add", b.op("Mul", x, b.weight(width, scale=0.1, shift=1.0)), b.weight(width, scale=0.1))

    def split_heads(x, batch, length):
        shape = b.op("Concat", unsqueeze(batch, 0), unsqueeze(length, 0), b.constant([heads]), b.constant([width // heads]), axis=0)
        return b.op("Reshape", x, shape)

    batch, length = size("tokens", 0), size("tokens", 1)
    positions = b.op("Range", b.constant(0), length, b.constant(1))
    x = b.op("Gather", b.weight(vocabulary, width, scale=1.0), "tokens", axis=0)
    x = layer_norm(b.op("Add", x, b.op("Gather", b.weight(64, width, scale=1.0), unsqueeze(positions, 0))))
    mask = b.op("Cast", unsqueeze(b.op("Unsqueeze", "mask", b.constant([1])), 2), to=FLOAT)
    mask = b.op("Mul", b.op("Sub", scalar(1.0), mask), scalar(-10000.0))
    for _ in range(2):
        q, k, v = (split_heads(b.linear(x, width, width), batch, length) for _ in range(3))
        q, v = (b.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        k = b.op("Transpose", k, perm=[0, 2, 3, 1])
        scores = b.op("Add", b.op("Div", b.op("MatMul", q, k), scalar((width // heads) ** 0.5)), mask)
        y = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        y = b.op("Reshape", y, b.op("Concat", unsqueeze(batch, 0), unsqueeze(length, 0), b.constant([width]), axis=0))
        x = layer_norm(b.op("Add", b.linear(y, width, width), x))
        y = b.linear(x, width, 4 * width)
        y = b.op("Mul", b.op("Mul", y, b.op("Add", b.op("Erf", b.op("Div", y, scalar(2**0.5))), scalar(1.0))), scalar(0.5))
        x = layer_norm(b.op("Add", b.linear(y, 4 * width, width), x))
    first = b.op("Tanh", b.op("Gemm", b.op("Gather", x, b.constant(0), axis=1), b.weight(width, width), b.weight(width)))
    tokens = b.random.integers(0, vocabulary, (2, 7))
    data = {"tokens": tokens.astype(np.int64), "mask": (np.arange(7) < np.array([[7], [4]])).astype(np.int64)}
    dims = ["N", "S"]
    return b.model([("tokens", INT64, dims), ("mask", INT64, dims)], [(x, FLOAT, ["N", "S", width]), (first, FLOAT, ["N", width])]), data


def recurrent(seed):
    """A 1-D convolution, a bidirectional GRU, and an LSTM whose state goes in and out. Opset 17."""
    b = Builder(17, seed)
    hidden = 12
    x = b.op("Relu", b.conv("signal", 4, 10, 5, axes=1, strides=[2], pads=[2, 2]))
    x = b.op("Transpose", x, perm=[2, 0, 1])
    weights = (b.weight(2, 3 * hidden, 10), b.weight(2, 3 * hidden, hidden), b.weight(2, 6 * hidden, scale=0.1))
    y = b.op("GRU", x, *weights, hidden_size=hidden, direction="bidirectional", linear_before_reset=1, outputs=2)[0]
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.constant([0, 0, -1]))
    weights = (b.weight(1, 4 * hidden, 2 * hidden), b.weight(1, 4 * hidden, hidden), b.weight(1, 8 * hidden, scale=0.1))
    y, h, c = b.op("LSTM", y, *weights, "", "h", "c", hidden_size=hidden, outputs=3)
    last = b.op("Slice", b.op("Squeeze", y, b.constant([1])), b.constant([-1]), b.constant([2**31 - 1]), b.constant([0]))
    score = b.op("Sigmoid", b.linear(last, hidden, 3))
    draw = lambda *shape: b.random.standard_normal(shape).astype(np.float32)
    data = {"signal": draw(2, 4, 31), "h": draw(1, 2, hidden), "c": draw(1, 2, hidden)}
    state = [1, "N", hidden]
    inputs = [("signal", FLOAT, ["N", 4, "T"]), ("h", FLOAT, state), ("c", FLOAT, state)]
    return b.model(inputs, [(score, FLOAT, [1, "N", 3]), (h, FLOAT, state), (c, FLOAT, state)]), data


class Calibration(CalibrationDataReader):
    def __init__(self, data):
        self.samples = iter([data])

    def get_next(self):
        return next(self.samples, None)


def quantized(seed):
    """8-bit branches, sums and pools in the operators of ONNX Runtime's own domain, as its optimiser writes them for a CPU. Opset 17."""
    b = Builder(17, seed)
    x = b.op("Relu", b.conv("image", 3, 16, 3, pads=[1, 1, 1, 1], strides=[2, 2]))
    y = b.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    y = b.op("LeakyRelu", b.conv(y, 16, 16, 3, pads=[1, 1, 1, 1]), alpha=0.1)
    x = b.op("Add", x, b.op("Mul", y, b.op("Sigmoid", b.conv(x, 16, 16, 1))))
    x = b.op("Concat", x, b.op("AveragePool", y, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), axis=1)
    x = b.op("Flatten", b.op("GlobalAveragePool", b.op("Relu", b.conv(x, 32, 32, 3, strides=[2, 2]))))
    x = b.op("Gemm", x, b.weight(32, 10), b.weight(10))
    data = {"image": b.random.standard_normal((2, 3, 14, 18)).astype(np.float32)}
    model = b.model([("image", FLOAT, ["N", 3, "H", "W"])], [(x, FLOAT, ["N", 10])])
    with tempfile.TemporaryDirectory() as folder:
        plain, optimised = os.path.join(folder, "plain.onnx"), os.path.join(folder, "optimised.onnx")
        # Of two unsigned factors ONNX Runtime's sums are exact on every machine.
        quantize_static(model, plain, Calibration(data), activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = optimised
        options.log_severity_level = 3
        onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
        return onnx.load(optimised), data


def traced(seed):
    """What tracing leaves: extents scaled by fractions, sizes computed in floats, a batch declared as the example's. Opset 13."""
    b = Builder(13, seed)
    scales = lambda by: b.constant([1, 1, by, by], np.float32)
    x = b.op("Resize", "image", "", scales(1.7), mode="nearest", coordinate_transformation_mode="asymmetric",
             nearest_mode="floor")
    x = b.op("Relu", b.conv(x, 3, 20, 3, strides=[2, 2], pads=[1, 1, 1, 1]))
    extents = b.op("Slice", b.op("Shape", x), b.constant([2]), b.constant([4]))
    scaled = b.op("Mul", b.op("Cast", extents, to=FLOAT), b.constant(1.3, np.float32))
    outer = b.op("Slice", b.op("Shape", x), b.constant([0]), b.constant([2]))
    sizes = b.op("Concat", outer, b.op("Cast", b.op("Floor", scaled), to=INT64), axis=0)
    y = b.op("Resize", x, "", "", sizes, mode="linear", coordinate_transformation_mode="pytorch_half_pixel")
    y = b.conv(y, 20, 4, 1)
    outer = b.op("Slice", b.op("Shape", y), b.constant([0]), b.op("Mod", b.constant([5]), b.constant([3])))
    split = b.op("Reshape", y, b.op("Concat", outer, b.constant([-1]), axis=0))
    data = {"image": b.random.standard_normal((3, 3, 10, 7)).astype(np.float32)}
    outputs = [(y, FLOAT, [1, 4, "h", "w"]), (split, FLOAT, [1, 4, 20])]
    return b.model([("image", FLOAT, ["N", 3, "H", "W"])], outputs), data


def main():
    os.makedirs(HERE, exist_ok=True)
    for seed, make in enumerate((mobile, segmentation, transformer, recurrent, quantized, traced)):
        model, inputs = make(seed)
        if make is not quantized:  # The checker knows the default domain only.
            onnx.checker.check_model(model)
        path = os.path.join(HERE, make.__name__)
        onnx.save(model, path + ".onnx")
        session = onnxruntime.InferenceSession(path + ".onnx", providers=["CPUExecutionProvider"])
        outputs = dict(zip((o.name for o in session.get_outputs()), session.run(None, inputs)))
        np.savez(path + ".in.npz", **inputs)
        np.savez(path + ".out.npz", **outputs)
        print(f"{make.__name__}: {len(model.graph.node)} nodes, {os.path.getsize(path + '.onnx')} bytes,",
              {name: value.shape for name, value in outputs.items()})


if __name__ == "__main__":
    main()
