#!/usr/bin/env python3
"""What `cutover shrink` makes of any models, by every method: whether ONNX Runtime opens it, and whether its plain run answers as ours does.

    python3 tests/reference/shrinking.py target/release/cutover model.onnx[=data.npz]... [-- method...]

The data of `model.onnx` is `model.in.npz` beside it, if none is named: inputs by name, samples along the first axis. Methods are static, dynamic, int8,
int4, f16, prune, pattern and pruned-static (all if none is given). Prints a row for each model and method:
the file's share of the original's, the signal to noise of our run against ONNX Runtime's plain run of the same file, and of ONNX Runtime's optimised run
against its plain one, in dB; or what was refused and why. Anything else (a panic, a file that ONNX Runtime refuses, runs further apart than ONNX Runtime's
own two by more than 1 dB) ends in a line that begins with FAULT, and the exit code is 1.   needs: pip install numpy onnxruntime"""
import os, subprocess, sys, tempfile

import numpy as np
import onnxruntime as ort

METHODS = {
    **{name: ["--method", name] for name in ("static", "dynamic", "int8", "int4", "f16")},
    "prune": ["--prune-channels", "0.5"],
    "pattern": ["--pattern", "2:4"],
    "pruned-static": ["--prune-operations", "0.6", "--method", "static"],
}


def answers(path, sample, level):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(None, {i.name: sample[i.name] for i in session.get_inputs()})))


def decibels(expected, actual):
    """Over all outputs of floats; infinite where nothing differs."""
    signal = noise = 0.0
    for name, x in expected.items():
        y = actual[name]
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            continue
        if x.shape != y.shape:
            return float("-inf")
        x, y = x.astype(np.float64), y.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        signal, noise = signal + (x[finite] ** 2).sum(), noise + ((x - y)[finite] ** 2).sum()
    return 10 * np.log10(signal / noise) if noise and signal else float("inf")


def judge(binary, model, data, flags, folder):
    small, given, answered = (os.path.join(folder, name) for name in ("small.onnx", "in.npz", "out.npz"))
    if os.path.exists(small):
        os.remove(small)
    done = subprocess.run([binary, "shrink", model, "--data", data, "-o", small, "--no-cache"] + flags, capture_output=True, text=True)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    if done.returncode == 2 and "panicked" not in done.stderr:
        fault = "" if said and not os.path.exists(small) else "FAULT: a file or no message: "
        return fault + "refused: " + (said[0] if said else "")
    if done.returncode not in (0, 1):
        return f"FAULT: exit {done.returncode}: {' '.join(said[-3:])}"
    with np.load(data) as file:
        sample = {name: file[name] for name in file.files if name != "labels"}
    np.savez(given, **sample)
    try:
        plain = answers(small, sample, "ORT_DISABLE_ALL")
        optimised = answers(small, sample, "ORT_ENABLE_ALL")
    except Exception as error:
        return f"FAULT: ONNX Runtime: {str(error)[:300]}"
    def run(*options):
        command = [binary, "run", small, "--inputs", given, "--outputs", answered, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-300:])
        with np.load(answered) as file:
            return {name: file[name] for name in file.files}

    try:
        ours = run()
        own, theirs = decibels(plain, ours), decibels(plain, optimised)
        # Rounding of floats alone is 60 dB and more.
        is_near = own >= min(theirs - 1, 60)
        defined = None if is_near else decibels(run("--backend", "reference"), ours)
    except RuntimeError as error:
        return f"FAULT: our run: {error}"
    share = 100 * os.path.getsize(small) / os.path.getsize(model)
    row = f"{share:.0f} %, ours {own:.1f} dB, ONNX Runtime's {theirs:.1f} dB"
    if is_near:
        return row
    # Where the processor has no VNNI, ONNX Runtime's sums of bytes saturate in its plain run, too; the definition tells who is right, give or take the bytes that fall on the other side of a tie.
    return f"{'' if defined >= 40 else 'FAULT: '}{row}; ours is {defined:.1f} dB from the operators' definition"


def main():
    arguments, methods = sys.argv[1:], list(METHODS)
    if "--" in arguments:
        at = arguments.index("--")
        arguments, methods = arguments[:at], arguments[at + 1 :]
    if len(arguments) < 2:
        sys.exit(__doc__)
    binary, faults = arguments[0], 0
    for model in arguments[1:]:
        model, _, data = model.partition("=")
        data = data or model.removesuffix(".onnx") + ".in.npz"
        for method in methods:
            with tempfile.TemporaryDirectory() as folder:
                row = judge(binary, model, data, METHODS[method], folder)
            faults += row.startswith("FAULT")
            print(f"| {os.path.basename(model)} | {method} | {row} |", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
