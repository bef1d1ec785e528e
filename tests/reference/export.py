"""Writes models out again, and asks ONNX Runtime and Cutover for what they give.

    python tests/reference/export.py --binary target/release/cutover model.onnx [model.onnx ...] [--inputs in.npz] [--keep folder]

Each model is converted to a package and unpacked: a model file at Cutover's own opset, whose weights lie in a safetensors file beside it. ONNX Runtime,
unoptimised, must open that and give what it gives for the original; and Cutover's import of it must give what its import of the original
gives. Where no inputs are given, `NAME.in.npz` beside `NAME.onnx` is taken (for `NAME.more.onnx` too), or else made up, as the package's
golden vectors are. Outputs are compared by their signal-to-quantization-noise ratio, at least `--sqnr` decibels. It is run by hand, and needs
`onnxruntime`. A model with operators that ONNX Runtime has no kernel for is compared only in Cutover.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import onnxruntime

onnxruntime.set_default_logger_severity(4)


def beside(model):
    """The inputs that lie beside a model: those of the longest stem that has some."""
    folder, name = os.path.split(model)
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        path = os.path.join(folder, ".".join(parts[:count]) + ".in.npz")
        if os.path.exists(path):
            return path
    return None


def by_onnx_runtime(model, inputs):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = dict(np.load(inputs, allow_pickle=False))
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, given)))


def sqnr(actual, expected):
    """In decibels, of the output that agrees least."""
    worst = float("inf")
    for name, wanted in expected.items():
        got = actual.get(name)
        if got is None or np.shape(got) != np.shape(wanted) or np.asarray(got).dtype != np.asarray(wanted).dtype:
            return float("-inf")
        if not isinstance(wanted, np.ndarray) or wanted.dtype.kind not in "fiub":
            worst = worst if np.array_equal(got, wanted) else float("-inf")
            continue
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
        noise = np.sum(np.where(same, 0.0, got - wanted) ** 2)
        if noise != 0:
            signal = np.sum(np.where(np.isfinite(wanted), wanted, 0.0) ** 2)
            worst = min(worst, 10 * np.log10(max(signal, 1e-300) / noise))
    return worst


def check(model, arguments, folder):
    def cutover(*command):
        done = subprocess.run([arguments.binary, *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stderr.strip()[-400:]}")

    def run(path, to):
        cutover("run", path, "--inputs", inputs, "--outputs", to, "--backend", arguments.backend)
        return dict(np.load(to, allow_pickle=False))

    inputs = arguments.inputs or beside(model)
    package, unpacked = os.path.join(folder, "model.cutover"), os.path.join(folder, "unpacked")
    cutover("convert", model, "-o", package, *(["--golden", inputs] if inputs else []))
    cutover("unpack", package, "-o", unpacked)
    written = os.path.join(unpacked, "model.onnx")
    if inputs is None:
        return "no inputs"
    ours = sqnr(run(written, os.path.join(folder, "b.npz")), run(model, os.path.join(folder, "a.npz")))
    try:
        theirs = sqnr(by_onnx_runtime(written, inputs), by_onnx_runtime(model, inputs))
    except Exception as error:  # Whatever ONNX Runtime raises.
        theirs = error
    enough = ours >= arguments.sqnr and (not isinstance(theirs, float) or theirs >= arguments.sqnr)
    shown = f"{theirs:6.1f} dB" if isinstance(theirs, float) else f"refuses: {str(theirs).strip()[-300:]}"
    return f"{'ok' if enough else 'DIFFERS'}: Cutover {ours:6.1f} dB, ONNX Runtime {shown}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--binary", default="target/release/cutover")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--inputs")
    parser.add_argument("--sqnr", type=float, default=100.0, help="quantized models may need less: fusion flips steps")
    parser.add_argument("--keep", help="a folder for what is written; one of a time if left out")
    arguments = parser.parse_args()
    failed = False
    for model in arguments.models:
        folder = tempfile.mkdtemp(dir=arguments.keep)
        try:
            result = check(model, arguments, folder)
        except RuntimeError as error:
            result = f"FAILS: {error}"
        if arguments.keep is None:
            shutil.rmtree(folder)
        failed |= not result.startswith(("ok", "no inputs"))
        print(f"{os.path.basename(model):40} {result}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
