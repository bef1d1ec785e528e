#!/usr/bin/env python3
"""Our quantizer against ONNX Runtime's: the same model, the same data, the same scheme (u8 activations, i8 weights per channel, min-max).

    python3 tests/reference/quantizers.py target/release/cutover model.onnx calib.npz [static|dynamic] [-- flags of cutover shrink]

Prints a row of a table: how far each quantized model is from the float one (signal to quantization noise in dB over the data, both run by ONNX
Runtime with its optimisations off), how far ONNX Runtime's optimised run of our file is from its plain run, and how far our engine is from that
plain run.   needs: pip install numpy onnx onnxruntime"""
import json, os, subprocess, sys, tempfile

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


def outputs(path, samples, level="ORT_DISABLE_ALL"):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [session.run(None, sample)[0] for sample in samples]


def ours(binary, path, samples, folder):
    given, answered = os.path.join(folder, "in.npz"), os.path.join(folder, "out.npz")
    results = []
    for sample in samples:
        np.savez(given, **sample)
        run = [binary, "run", path, "--inputs", given, "--outputs", answered]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        with np.load(answered) as file:
            results.append(file[file.files[0]])
    return results


def sqnr(expected, actual):
    signal = sum((x.astype(np.float64) ** 2).sum() for x in expected)
    noise = sum(((x.astype(np.float64) - y) ** 2).sum() for x, y in zip(expected, actual))
    return 10 * np.log10(signal / noise) if noise else float("inf")


class Reader(CalibrationDataReader):
    def __init__(self, samples):
        self.samples = iter(samples)

    def get_next(self):
        return next(self.samples, None)


def main():
    arguments, flags = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, flags = arguments[:at], arguments[at + 1 :]
    if len(arguments) not in (3, 4):
        sys.exit(__doc__)
    binary, model, data = arguments[:3]
    method = arguments[3] if len(arguments) == 4 else "static"
    with np.load(data) as file:
        arrays = {name: file[name] for name in file.files if name != "labels"}
    count = min(16, len(next(iter(arrays.values()))))
    samples = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        theirs, small = os.path.join(folder, "theirs.onnx"), os.path.join(folder, "ours.onnx")
        if method == "static":
            prepared = os.path.join(folder, "prepared.onnx")
            quant_pre_process(model, prepared, skip_symbolic_shape=True)
            types = dict(activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
            quantize_static(prepared, theirs, Reader(samples), quant_format=QuantFormat.QDQ, per_channel=True, **types)
        else:
            quantize_dynamic(model, theirs, per_channel=True, weight_type=QuantType.QInt8)
        shrink = [binary, "shrink", model, "--data", data, "--samples", str(count), "--method", method, "-o", small]
        report = json.loads(subprocess.run(shrink + ["--json"] + flags, check=True, capture_output=True).stdout)
        float_, plain, their_plain = outputs(model, samples), outputs(small, samples), outputs(theirs, samples)
        optimised, engine = outputs(small, samples, "ORT_ENABLE_ALL"), ours(binary, small, samples[:4], folder)
        row = [
            os.path.basename(model),
            " ".join([method] + flags),
            f"{sqnr(float_, their_plain):.1f}",
            f"{sqnr(float_, plain):.1f}",
            f"{sqnr(plain, optimised):.1f}",
            f"{sqnr(plain[:4], engine):.1f}",
            f"{100 * os.path.getsize(small) / os.path.getsize(model):.1f} %",
            f"{report['latency_ratio']:.2f}",
        ]
    print("| model | method | ORT's quantizer, dB | ours, dB | ours: ORT optimised against plain | our engine against that plain | file | latency |")
    print("|---|---|---|---|---|---|---|---|")
    print("| " + " | ".join(row) + " |")


main()
