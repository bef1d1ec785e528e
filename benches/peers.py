#!/usr/bin/env python3
"""Latency of `cutover bench` beside ONNX Runtime and OpenVINO on one machine, as a table in Markdown.

    pip install onnxruntime openvino numpy
    cargo build --release
    python3 benches/peers.py --threads 1 model.onnx other.onnx --shape model:input=1x3x224x224

Engines take turns, so that the machine's drift falls on all alike. A figure is the median over rounds of the round's median, in ms.
Symbolic extents are 1 unless --shape says otherwise. Before a model MODEL.onnx is timed, `cutover verify` compares its answers with those
of MODEL.in.npz and MODEL.out.npz, where these are there; with ONNX Runtime's to the same inputs otherwise. Models that disagree are
named and not timed; the exit status is then 1.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime


def inputs_of(session, shapes, rng):
    """Random inputs as `cutover bench` makes them: integers below 1000, masks of ones, types of zeros."""
    feed = {}
    for node in session.get_inputs():
        shape = shapes.get(node.name) or [d if isinstance(d, int) and d > 0 else 1 for d in node.shape]
        if "float" in node.type or "double" in node.type:
            feed[node.name] = rng.random(shape).astype("f8" if "double" in node.type else "f4")
        else:
            kind = "i4" if "int32" in node.type else "i8"
            low, high = (1, 2) if "mask" in node.name else (0, 1) if "type" in node.name else (0, 1000)
            feed[node.name] = rng.integers(low, high, shape).astype(kind)
    return feed


def median_ms(run, seconds):
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def bench(cutover, model, threads, seconds, feed):
    command = [cutover, "bench", str(model), "--threads", str(threads), "--seconds", str(seconds), "--json"]
    for name, value in feed.items():
        command += ["--shape", f"{name}={'x'.join(map(str, value.shape))}"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def agrees(cutover, model, session, feed, folder):
    """Whether our answers are the stored ones, or ONNX Runtime's."""
    given, expected = model.with_suffix(".in.npz"), model.with_suffix(".out.npz")
    if not given.exists():
        given, expected = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(given, **feed)
        np.savez(expected, **dict(zip([o.name for o in session.get_outputs()], session.run(None, feed))))
    tolerance = ["--sqnr", "18"] if "int8" in model.name else ["--atol", "1e-3"]
    command = [cutover, "verify", str(model), "--inputs", str(given), "--expect", str(expected)]
    return subprocess.run(command + tolerance, capture_output=True).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--cutover", default="target/release/cutover")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5, help="per engine and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", action="append", default=[], metavar="MODEL:INPUT=1x3x224x224")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    import openvino  # After the affinity is set: it counts the cores once.

    shapes = {}
    for spelled in arguments.shape:
        (model, name), extents = spelled.split("=")[0].split(":"), spelled.split("=")[1]
        shapes.setdefault(model, {})[name] = [int(extent) for extent in extents.split("x")]

    print("| model | ONNX Runtime | OpenVINO | Cutover | ratio | first, ms | first, of ORT's | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    ratios, firsts, wrong = [], [], []
    for model in arguments.models:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = arguments.threads
        options.log_severity_level = 4
        start = time.perf_counter()
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        feed = inputs_of(session, shapes.get(model.stem, {}), np.random.default_rng(0))
        session.run(None, feed)
        first = (time.perf_counter() - start) * 1e3
        with tempfile.TemporaryDirectory() as folder:
            if not agrees(arguments.cutover, model, session, feed, folder):
                wrong.append(model.name)
                continue
        settings = {"INFERENCE_NUM_THREADS": arguments.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(model), "CPU", settings)
        request = compiled.create_infer_request()
        rounds = {"ort": [], "openvino": [], "cutover": []}
        for _ in range(arguments.rounds):
            rounds["ort"].append(median_ms(lambda: session.run(None, feed), arguments.seconds))
            rounds["openvino"].append(median_ms(lambda: request.infer(feed, share_inputs=True), arguments.seconds))
            ours = bench(arguments.cutover, model, arguments.threads, arguments.seconds, feed)
            rounds["cutover"].append(ours["latency_ms"]["median"])
        ort, peer, own = (statistics.median(rounds[engine]) for engine in ("ort", "openvino", "cutover"))
        ratios.append(own / min(ort, peer))
        own_first = ours["load_ms"] + ours["first_ms"]
        firsts.append(own_first / first)
        peak = ours["peak_rss_bytes"] / 1e6
        figures = f"{ort:.2f} | {peer:.2f} | {own:.2f} | {ratios[-1]:.2f} | {own_first:.0f} | {firsts[-1]:.2f} | {peak:.0f}"
        print(f"| {model.stem} | {figures} |", flush=True)
    if ratios:
        mean = statistics.geometric_mean
        print(f"| geometric mean | | | | {mean(ratios):.2f} | | {mean(firsts):.2f} | |")
    if wrong:
        print("answers disagree, not timed: " + ", ".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
