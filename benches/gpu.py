#!/usr/bin/env python3
"""Everything that needs an NVIDIA GPU, in one run of some minutes: what is there, whether it is right, how fast it is.

    cargo build --release --features cuda,wgpu        # also where there is no GPU, and copied
    python3 benches/gpu.py --models models --output gpu.json

Each step has a limit of time, and one that fails does not stop the next. What a step found is in --output as soon as it ends: a line of
JSON each. At the end, and after Ctrl-C, a table in Markdown. Steps, in the order of what matters when time is short:

1. `devices`: driver, NVRTC, limits, peaks; `nvidia-smi`'s clocks and power.
2. `agreement`: every kernel family against the reference over random shapes (`cargo test … gpu` with CUTOVER_GPU=cuda), where cargo is.
3. `verify`: models beside which MODEL.in.npz and MODEL.out.npz lie, on cuda and wgpu.
4. `bench`: models × backends × batches × precisions, medians in ms. What a backend refuses is written down as that.
5. `torch`: the same models in PyTorch (compiled, CUDA graphs), where PyTorch and onnx2torch are installed.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TORCH = """
import json, statistics, sys, time
import onnx, torch, onnx2torch
path, batch, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model = onnx.load(path)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
names = {i.name for i in model.graph.initializer}
feed = []
for value in model.graph.input:
    if value.name in names:
        continue
    shape = [d.dim_value or (batch if at == 0 else 128) for at, d in enumerate(value.type.tensor_type.shape.dim)]
    is_float = value.type.tensor_type.elem_type in (1, 10, 16)
    feed.append(torch.rand(shape, device="cuda", dtype=dtype) if is_float else torch.ones(shape, device="cuda", dtype=torch.int64))
net = torch.compile(onnx2torch.convert(model).cuda().to(dtype).eval(), mode="reduce-overhead")
times = []
with torch.inference_mode():
    for at in range(130):
        torch.cuda.synchronize()
        start = time.perf_counter()
        net(*feed)
        torch.cuda.synchronize()
        if at >= 30:
            times.append(1000 * (time.perf_counter() - start))
print(json.dumps({"median": statistics.median(times)}))
"""


class Log:
    def __init__(self, path, budget_s):
        self.file, self.rows, self.end = open(path, "a", encoding="utf-8"), [], time.monotonic() + budget_s

    def write(self, **row):
        self.rows.append(row)
        print(json.dumps(row), file=self.file, flush=True)
        print(f"{row['step']}: {row.get('what', '')} {'ok' if row['ok'] else row.get('error', '')[:200]}", file=sys.stderr)

    def run(self, step, what, command, limit_s, environment=None, parse=None):
        """Runs `command` to its end or the limit; `parse` makes more of its output."""
        limit_s = min(limit_s, self.end - time.monotonic())
        row = {"step": step, "what": what, "command": command if len(command) < 12 else command[:4]}
        if limit_s < 2:
            return self.write(**row, ok=False, error="no time was left")
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env={**os.environ, **(environment or {})})
            row.update(ok=done.returncode == 0, seconds=round(time.monotonic() - start, 2))
            if done.returncode != 0:
                row["error"] = (done.stderr or done.stdout).strip()[-2000:]
            row.update(parse(done.stdout) if parse and done.returncode == 0 else {"output": done.stdout[-2000:]})
        except subprocess.TimeoutExpired:
            row.update(ok=False, error=f"not done within {limit_s:.0f} s")
        except (OSError, ValueError, KeyError) as error:
            row.update(ok=False, error=f"{type(error).__name__}: {error}")
        self.write(**row)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cutover", default="target/release/cutover", help="the program, built with the features cuda and wgpu")
    parser.add_argument("--models", default="models", help="a folder of .onnx files")
    parser.add_argument("--backends", default="cuda,wgpu")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--precisions", default="f32,f16")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all of it")
    parser.add_argument("--output", default="gpu.json")
    arguments = parser.parse_args()
    log = Log(arguments.output, arguments.budget)
    models = sorted(Path(arguments.models).rglob("*.onnx"))
    backends, cutover = arguments.backends.split(","), arguments.cutover
    try:
        query = "name,driver_version,clocks.sm,clocks.mem,power.draw,memory.used,memory.total"
        log.run("devices", "nvidia-smi", ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 20)
        log.run("devices", "cutover", [cutover, "devices", "--json"], 60, parse=lambda text: {"found": json.loads(text)})
        cargo = ["cargo", "test", "--release", "-p", "cutover-backend", "--features", "cuda,wgpu", "--test", "agreement", "gpu"]
        for backend in backends:
            log.run("agreement", backend, cargo, 150, {"CUTOVER_GPU": backend})
        for model in models:
            given, expected = model.with_suffix(".in.npz"), model.with_suffix(".out.npz")
            if given.exists() and expected.exists():
                for backend, precision in ((backend, precision) for backend in backends for precision in arguments.precisions.split(",")):
                    command = [cutover, "verify", str(model), "--inputs", str(given), "--expect", str(expected), "--backend", backend, "--precision", precision]
                    log.run("verify", f"{model.stem} {backend} {precision}", command, 60)
        for batch in arguments.batches.split(","):
            for model in models:
                for precision in arguments.precisions.split(","):
                    for backend in backends:
                        what = {"model": model.stem, "batch": int(batch), "precision": precision, "backend": backend}
                        command = [cutover, "bench", str(model), "--backend", backend, "--precision", precision, "--json"]
                        command += [part for name in shapes(model, batch) for part in ("--shape", name)]
                        log.run("bench", what, command, 30, parse=lambda text: {"bench": json.loads(text)["latency_ms"]})
                    what = {"model": model.stem, "batch": int(batch), "precision": precision, "backend": "torch"}
                    log.run("torch", what, [sys.executable, "-c", TORCH, str(model), batch, precision], 90, parse=lambda text: {"bench": json.loads(text.splitlines()[-1])})
    except KeyboardInterrupt:
        pass
    table(log.rows)
    sys.exit(not all(row["ok"] for row in log.rows if row["step"] in ("devices", "agreement", "verify")))


def shapes(model, batch):
    """`NAME=SHAPE` of every input whose first extent is symbolic, at this batch; other symbols at 128. Without onnx, or of a model of static shapes: none."""
    try:
        import onnx
    except ImportError:
        return []
    graph = onnx.load(str(model), load_external_data=False).graph
    weights, said = {weight.name for weight in graph.initializer}, []
    for value in graph.input:
        extents = value.type.tensor_type.shape.dim
        if value.name in weights or not any(extent.dim_param for extent in extents):
            continue
        of = [str(extent.dim_value or (batch if at == 0 else 128)) for at, extent in enumerate(extents)]
        said.append(f"{value.name}={'x'.join(of)}")
    return said


def table(rows):
    timed = [row for row in rows if row["step"] in ("bench", "torch")]
    engines = sorted({row["what"]["backend"] for row in timed})
    cells = {}
    for row in timed:
        what = row["what"]
        found = row.get("bench", {})
        cell = f"{found['median']:.3f}" if row["ok"] and "median" in found else "-"
        cells.setdefault((what["model"], what["batch"], what["precision"]), {})[what["backend"]] = cell
    print(f"| model | batch | precision | {' | '.join(f'{engine} ms' for engine in engines)} |")
    print("|---|---|---|" + "---|" * len(engines))
    for (model, batch, precision), of in sorted(cells.items()):
        print(f"| {model} | {batch} | {precision} | {' | '.join(of.get(engine, '-') for engine in engines)} |")


if __name__ == "__main__":
    main()
