"""A model of ours in PyTorch: an ONNX graph of the operators below as a list of PyTorch's calls, for shapes that are known.

    python3 gpu_torch.py MODEL.onnx BATCHES PRECISIONS             # times it on the GPU, compiled with CUDA graphs: a line of JSON each
    python3 gpu_torch.py MODEL.onnx --check IN.npz OUT.npz         # on the processor, not compiled: how far its answers are from these

What follows from constants and shapes is computed while the list is made, as any exporter's graph would be folded; what is left runs as PyTorch's own
models do: its convolutions, products, attention's softmax and recurrences, with weights in the precision asked for. Needs PyTorch and onnx.
"""
import json
import statistics
import sys
import time

import onnx
import torch
from onnx import numpy_helper
from torch.nn import functional as F

DTYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}


def windows(of):
    """Padding by axis from the front, as `F.conv2d` takes it, and what `F.pad` has to do before where it differs at the end."""
    pads = of.get("pads", [0, 0, 0, 0])
    half = len(pads) // 2
    begin, end = pads[:half], pads[half:]
    if begin == end:
        return begin, None
    return [0] * half, [pad for axis in reversed(range(half)) for pad in (begin[axis], end[axis])]


def conv(of, c):
    pad, before = windows(of)
    strides, dilations, group = of.get("strides", 1), of.get("dilations", 1), of.get("group", 1)

    def run(x, w, b=None):
        x = F.pad(x, before) if before else x
        of_rank = {3: F.conv1d, 4: F.conv2d}[x.dim()]
        return of_rank(x, w, b, strides, pad[: x.dim() - 2], dilations, group)

    return run


def conv_transpose(of, c):
    strides, pads = of.get("strides", 1), of.get("pads", [0, 0, 0, 0])
    return lambda x, w, b=None: F.conv_transpose2d(x, w, b, strides, pads[:2], of.get("output_padding", 0), of.get("group", 1))


def max_pool(of, c):
    pad, before = windows(of)
    kernel, strides = of["kernel_shape"], of.get("strides")
    ceil = bool(of.get("ceil_mode", 0))
    return lambda x: F.max_pool2d(F.pad(x, before, value=float("-inf")) if before else x, kernel, strides, pad, 1, ceil)


def gemm(of, c):
    alpha, beta = of.get("alpha", 1.0), of.get("beta", 1.0)

    def run(a, b, bias=None):
        a, b = (a.T if of.get("transA") else a), (b.T if of.get("transB") else b)
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha) if bias is not None else alpha * (a @ b)

    return run


def reshape(of, c):
    shape = c(1).tolist()

    def run(x, _):
        return torch.reshape(x, tuple(x.shape[at] if extent == 0 else extent for at, extent in enumerate(shape)))

    return run


def sliced(of, c):
    starts, ends = c(1).tolist(), c(2).tolist()
    axes = c(3).tolist() if c(3) is not None else list(range(len(starts)))
    steps = c(4).tolist() if c(4) is not None else [1] * len(starts)

    def run(x, *_):
        for start, end, axis, step in zip(starts, ends, axes, steps):
            assert step > 0, "steps backwards"
            index = [slice(None)] * x.dim()
            index[axis] = slice(start, end, step)
            x = x[tuple(index)]
        return x

    return run


def gather(of, c):
    axis = of.get("axis", 0)

    def run(x, i):
        i = torch.where(i < 0, i + x.shape[axis], i)
        if axis == 0 and x.dim() == 2 and x.is_floating_point():
            return F.embedding(i, x)
        return torch.reshape(torch.index_select(x, axis, i.reshape(-1)), (*x.shape[:axis], *i.shape, *x.shape[axis + 1 :]))

    return run


def unsqueeze(of, c):
    axes = sorted(c(1).tolist())

    def run(x, _):
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return run


def recurrence(of, c, kind):
    """One of PyTorch's own, whose gates come in another order: r, z, n after ONNX's z, r, n; i, f, g, o after i, o, f, g."""
    order, gates = ([1, 0, 2], 3) if kind is torch.nn.GRU else ([0, 2, 3, 1], 4)
    hidden, two = of["hidden_size"], of.get("direction", b"forward") == b"bidirectional"
    assert kind is torch.nn.LSTM or of.get("linear_before_reset", 0) == 1, "PyTorch's GRU is linear before its reset"
    assert of.get("direction", b"forward") in (b"forward", b"bidirectional")
    w, r, b = c(1), c(2), c(3)
    net = kind(w.shape[2], hidden, bidirectional=two).to(w.dtype)

    def reordered(x):
        return torch.cat([x[at * hidden : (at + 1) * hidden] for at in order])

    with torch.no_grad():
        for at, suffix in enumerate(["", "_reverse"][: 1 + two]):
            getattr(net, f"weight_ih_l0{suffix}").copy_(reordered(w[at]))
            getattr(net, f"weight_hh_l0{suffix}").copy_(reordered(r[at]))
            getattr(net, f"bias_ih_l0{suffix}").copy_(reordered(b[at][: gates * hidden]) if b is not None else 0)
            getattr(net, f"bias_hh_l0{suffix}").copy_(reordered(b[at][gates * hidden :]) if b is not None else 0)

    def run(x, _w, _r, _b=None, lengths=None, h=None, cell=None, *_):
        state = None if h is None else (h if kind is torch.nn.GRU else (h, torch.zeros_like(h) if cell is None else cell))
        y, last = net(x, state)
        steps, batch = y.shape[:2]
        y = y.reshape(steps, batch, 1 + two, hidden).transpose(1, 2)
        return (y, last) if kind is torch.nn.GRU else (y, *last)

    run.module = net
    return run


def expand(of, c):
    shape = c(1).tolist()
    return lambda x, _: x.expand(torch.broadcast_shapes(x.shape, shape))


def squeeze(of, c):
    axes = tuple(c(1).tolist())
    return lambda x, _: x.squeeze(axes)


def plain(function):
    return lambda of, c: function


MAKE = {
    "Add": plain(torch.add),
    "And": plain(torch.logical_and),
    "Cast": lambda of, c: lambda x: x.to(of["dtype"]),
    "Clip": lambda of, c: lambda x, low=None, high=None: torch.clamp(x, low, high),
    "Concat": lambda of, c: lambda *x: torch.cat(x, of["axis"]),
    "ConstantOfShape": lambda of, c: lambda shape: torch.full(c(0).tolist(), of["value"].item(), dtype=of["value"].dtype),
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": lambda of, c: lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "Equal": plain(torch.eq),
    "Erf": plain(torch.erf),
    "Expand": expand,
    "Flatten": lambda of, c: lambda x: x.reshape(x.shape[: of.get("axis", 1)].numel(), -1),
    "GRU": lambda of, c: recurrence(of, c, torch.nn.GRU),
    "Gather": gather,
    "Gemm": gemm,
    "GlobalAveragePool": lambda of, c: lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "GreaterOrEqual": plain(torch.ge),
    "Identity": lambda of, c: lambda x: x,
    "LSTM": lambda of, c: recurrence(of, c, torch.nn.LSTM),
    "LayerNormalization": lambda of, c: lambda x, w, b=None: F.layer_norm(x, w.shape, w, b, of.get("epsilon", 1e-5)),
    "MatMul": plain(torch.matmul),
    "MaxPool": max_pool,
    "Mul": plain(torch.mul),
    "Range": lambda of, c: lambda *_: torch.arange(c(0).item(), c(1).item(), c(2).item()),
    "Relu": plain(F.relu),
    "Reshape": reshape,
    "Shape": lambda of, c: lambda x: torch.tensor(x.shape),
    "Sigmoid": plain(torch.sigmoid),
    "Slice": sliced,
    "Softmax": lambda of, c: lambda x: F.softmax(x, of.get("axis", -1)),
    "Squeeze": squeeze,
    "Sub": plain(torch.sub),
    "Transpose": lambda of, c: lambda x: x.permute(of["perm"]),
    "Unsqueeze": unsqueeze,
    "Where": plain(torch.where),
}


class Net(torch.nn.Module):
    """The graph of `model` for inputs of the shapes and types of `feed`, by name; its values are those of `feed` only where it is made."""

    def __init__(self, model, feed, dtype):
        super().__init__()
        self.names, self.outputs = list(feed), [value.name for value in model.graph.output]
        self.steps, self.modules_of = [], torch.nn.ModuleList()
        known = {one.name: self.held(numpy_helper.to_array(one), dtype) for one in model.graph.initializer}
        values = {**known, **feed}
        for node in model.graph.node:
            of = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            if "value" in of:
                of["value"] = self.held(numpy_helper.to_array(of["value"]), dtype)
            if "to" in of:
                of["dtype"] = dtype if DTYPES[of["to"]] == torch.float32 else DTYPES[of["to"]]
            if node.op_type == "Constant":
                known[node.output[0]] = values[node.output[0]] = of["value"]
                continue
            inputs = [name or None for name in node.input]
            constant = lambda at, inputs=inputs: None if at >= len(inputs) or inputs[at] is None else known[inputs[at]]
            run = MAKE[node.op_type](of, constant)
            results = run(*[None if name is None else values[name] for name in inputs])
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(node.output, results))
            if node.op_type == "Shape" or all(name is None or name in known for name in inputs):
                known.update(zip(node.output, results))
                continue
            if hasattr(run, "module"):
                self.modules_of.append(run.module)
            # What is known is no argument that a compiler would have to look at.
            arguments = [(name, None) if name is not None and name not in known else (None, known.get(name)) for name in inputs]
            for at, (name, tensor) in enumerate(arguments):
                if tensor is not None:
                    buffer = f"c{len(self.steps)}_{at}"
                    self.register_buffer(buffer, tensor)
                    arguments[at] = (None, buffer)
            self.steps.append((run, arguments, [name for name in node.output if name]))
        missing = [name for name in self.outputs if name in known]
        assert not missing, f"{missing} follow from shapes alone"

    @staticmethod
    def held(array, dtype):
        tensor = torch.from_numpy(array.copy())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def forward(self, *inputs):
        values = dict(zip(self.names, inputs))
        for run, arguments, outputs in self.steps:
            given = [values[name] if name is not None else None if buffer is None else getattr(self, buffer) for name, buffer in arguments]
            results = run(*given)
            values.update(zip(outputs, results if isinstance(results, tuple) else (results,)))
        return tuple(values[name] for name in self.outputs)


def made_up(model, batch, dtype):
    weights, feed = {one.name for one in model.graph.initializer}, {}
    for value in model.graph.input:
        of = value.type.tensor_type
        if value.name in weights:
            continue
        extents = of.shape.dim
        # The batch is what comes first where that is open; other open extents are pixels where there are four, else steps.
        other = 224 if len(extents) == 4 else 512 if value.name == "audio" else 128
        shape = [extent.dim_value or (batch if at == 0 else other) for at, extent in enumerate(extents)]
        feed[value.name] = torch.rand(shape).to(dtype) if of.elem_type in (1, 10, 16) else torch.ones(shape, dtype=torch.int64)
    return feed


def timed(model, batch, precision):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    torch._dynamo.reset()
    # Recurrences too are part of what is recorded.
    torch._dynamo.config.allow_rnn = True
    feed = made_up(model, batch, dtype)
    with torch.inference_mode():
        net = Net(model, feed, dtype).eval().cuda().to(dtype)
        compiled = torch.compile(net, mode="reduce-overhead")
        inputs, times = [tensor.cuda() for tensor in feed.values()], []
        for at in range(130):
            torch.cuda.synchronize()
            start = time.perf_counter()
            compiled(*inputs)
            torch.cuda.synchronize()
            if at >= 30:
                times.append(1000 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "p99": sorted(times)[98]}


def check(model, given, expected):
    import numpy as np

    given, expected = np.load(given), np.load(expected)
    feed = {name: torch.from_numpy(given[name]) for name in given.files}
    with torch.inference_mode():
        net = Net(model, feed, torch.float32).eval()
        actual = net(*feed.values())
    for name, tensor in zip(net.outputs, actual):
        print(f"{name}: off by {np.abs(tensor.numpy() - expected[name]).max():.1e} at most, of {np.abs(expected[name]).max():.1e}")


def main():
    model = onnx.load(sys.argv[1])
    if sys.argv[2] == "--check":
        return check(model, *sys.argv[3:5])
    for batch in map(int, sys.argv[2].split(",")):
        for precision in sys.argv[3].split(","):
            row = {"batch": batch, "precision": precision}
            try:
                row.update(timed(model, batch, precision))
            except Exception as error:  # the next one may do
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
