#!/usr/bin/env python3
"""What structured pruning leaves of models: channels, parameters, operations, latency; and whether ONNX Runtime answers as we do.

    python3 tests/reference/pruning.py target/release/cutover model.onnx data.npz [share of channels that goes]... [-- flags of cutover shrink]

Prints a row of a table for each share (0.25 0.5 0.75 if none is given). Latency is the processor's time for a run of one thread, the middle of three
in turns: on a machine where others work too, the wall clock tells of them. `agree` is the largest difference between ONNX Runtime's answer and ours
to the first sample of the pruned model, over the largest element.   needs: pip install numpy onnxruntime"""
import json, os, resource, subprocess, sys, tempfile

import numpy as np
import onnxruntime as ort


def milliseconds(binary, paths, sample):
    """Processor time of a run of one thread: what a longer `cutover bench` takes more than a shorter, over the runs it does more."""
    shapes = [f"--shape={name}={'x'.join(map(str, array.shape))}" for name, array in sample.items()]

    def bench(path, seconds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        command = [binary, "bench", path, "--threads", "1", "--seconds", str(seconds), "--json"] + shapes
        runs = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["runs"]
        return runs, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    def one(path):
        (few, short), (many, long) = bench(path, 1), bench(path, 3)
        return 1e3 * (long - short) / max(many - few, 1)

    rounds = [[one(path) for path in paths] for _ in range(3)]
    return [sorted(times)[1] for times in zip(*rounds)]


def main():
    arguments, flags = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, flags = arguments[:at], arguments[at + 1 :]
    if len(arguments) < 3:
        sys.exit(__doc__)
    binary, model, data = arguments[:3]
    with np.load(data) as file:
        sample = {name: file[name][:1] for name in file.files if name != "labels"}
    for share in arguments[3:] or ["0.25", "0.5", "0.75"]:
        with tempfile.TemporaryDirectory() as folder:
            small, given, answered = (os.path.join(folder, name) for name in ("small.onnx", "in.npz", "out.npz"))
            np.savez(given, **sample)
            shrink = [binary, "shrink", model, "--data", data, "--prune-channels", share, "-o", small, "--no-cache", "--json"]
            done = subprocess.run(shrink + flags, capture_output=True, text=True)
            if done.returncode == 2:
                print(f"| {os.path.basename(model)} | {share} | {done.stderr.strip()} |")
                continue
            report = json.loads(done.stdout)
            subprocess.run([binary, "run", small, "--inputs", given, "--outputs", answered], check=True, stdout=subprocess.DEVNULL)
            session = ort.InferenceSession(small, providers=["CPUExecutionProvider"])
            theirs = session.run(None, {i.name: sample[i.name] for i in session.get_inputs()})
            with np.load(answered) as file:
                pairs = [(file[o.name], y) for o, y in zip(session.get_outputs(), theirs)]
            agree = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in pairs)
            groups = report["steps"][0]["groups"]
            before, after = (sum(group[when] for group in groups) for when in ("before", "after"))
            part = lambda what: f"{report[what + '_after'] / report[what + '_before']:.2f}"
            slow, fast = milliseconds(binary, [model, small], sample)
            cells = [os.path.basename(model), share, f"{before} → {after}", part("parameters"), part("operations")]
            cells += [f"{slow:.1f} → {fast:.1f}", f"{fast / slow:.2f}", f"{agree:.0e}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
