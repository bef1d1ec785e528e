#!/usr/bin/env python3
"""Everything that needs an NVIDIA GPU, in one run of ten minutes that nobody has to watch: what is there, whether it is right, how fast it is.

    cargo xtask gpu                                   # where Rust is: a folder with this script and all that it starts
    python3 target/gpu/gpu.py --models models         # where the GPU is, with a driver and Python: neither Rust nor a compiler is needed

Each step has a limit of time, and one that fails does not stop the next. What a step found is in --output as soon as it ends: a line of
JSON each. At the end, and after Ctrl-C, there are tables in Markdown. Steps, in the order of what matters when time is short:

1. `devices`: driver, NVRTC, limits, peaks; `nvidia-smi`'s clocks and power; which libraries were found where.
2. `agreement`: every kernel family against the reference over random shapes, a sample of one in --share.
3. `verify`: models beside which MODEL.in.npz and MODEL.out.npz lie (MODEL.2.in.npz … too), on each backend in each precision, several at a time. Nothing
   is kept meanwhile, so nothing is measured either.
4. `bench`: models × backends × precisions, the processor too, for each of --batches: `cutover bench --matrix`. Compiled kernels and the tiles that were measured
   fastest stay in the folder `cache` beside --output.
5. `kernels`: how many of the kernels that a model's run launches were written by hand, or are a library's, and what takes longest.
6. `torch`: the same models in PyTorch (compiled, CUDA graphs, the same precision; `gpu_torch.py`), where PyTorch and onnx are installed.

Libraries that are no part of the driver (NVRTC, cuBLASLt) are looked for in the script's folder, and in what pip has installed (`nvidia-*`, with PyTorch).
"""
import argparse
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What answers are judged by in less than f32, and of quantized models (which round otherwise where a sum lies between two steps): dB of signal to noise. Of
# the ImageNet models mobilenet_v2 is the most sensitive: with nothing but its weights rounded to f16 it has 43.
LEAST_DB = {
    ("f32", True): 20,
    ("tf32", False): 35,
    ("tf32", True): 15,
    ("f16", False): 35,
    ("f16", True): 15,
    ("bf16", False): 18,
    ("bf16", True): 12,
}


class Log:
    def __init__(self, path, budget_s):
        self.file, self.rows, self.end = open(path, "a", encoding="utf-8"), [], time.monotonic() + budget_s

    def write(self, **row):
        self.rows.append(row)
        print(json.dumps(row), file=self.file, flush=True)
        print(f"{row['step']}: {row.get('what', '')} {'ok' if row['ok'] else row.get('error', '')[-300:]}", file=sys.stderr)

    def run(self, step, what, command, limit_s, environment=None, parse=None):
        """Runs `command` to its end or the limit; `parse` makes more of its output, also of what came before the limit."""
        limit_s = min(limit_s, self.end - time.monotonic())
        row = {"step": step, "what": what, "command": [str(part) for part in command if len(str(part)) < 400]}
        if limit_s < 2:
            return self.write(**row, ok=False, error="no time was left")
        start = time.monotonic()
        try:
            done = subprocess.run(
                [str(part) for part in command], capture_output=True, text=True, timeout=limit_s, env={**os.environ, **(environment or {})}
            )
            row.update(ok=done.returncode == 0, seconds=round(time.monotonic() - start, 2))
            if done.returncode != 0:
                row["error"] = (done.stderr or done.stdout).strip()[-2000:]
            row.update(parse(done.stdout) if parse else {"output": done.stdout[-2000:]})
        except subprocess.TimeoutExpired as late:
            row.update(ok=False, error=f"not done within {limit_s:.0f} s")
            text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
            try:
                row.update(parse(text) if parse else {})
            except (OSError, ValueError, LookupError):
                pass
        except (OSError, ValueError, LookupError) as error:
            row.update(ok=False, error=row.get("error") or f"{type(error).__name__}: {error}")
        self.write(**row)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="models", help="a folder of .onnx files, or one of them", nargs="+")
    parser.add_argument("--backends", default="cuda,wgpu", help="the first is the one that has to be right")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--precisions", default="f32,f16")
    parser.add_argument("--share", type=int, default=4, help="one of so many random cases of `agreement`")
    parser.add_argument("--steps", default="devices,agreement,verify,bench,kernels,torch")
    parser.add_argument("--seconds", type=float, default=0.6, help="that a cell of the matrix is measured, in all three rounds together")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all of it")
    parser.add_argument("--output", default="gpu.json")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.unlink(missing_ok=True)
    log = Log(output, arguments.budget)
    folders = libraries()
    os.environ["LD_LIBRARY_PATH"] = ":".join([part for part in [os.environ.get("LD_LIBRARY_PATH")] if part] + folders)
    given = [arguments.models] if isinstance(arguments.models, str) else arguments.models
    models = [path for one in map(Path, given) for path in (sorted(one.rglob("*.onnx")) if one.is_dir() else [one])]
    steps, precisions = arguments.steps.split(","), arguments.precisions.split(",")
    try:
        backends = found(log, arguments.backends.split(","), folders, "devices" in steps)
        if "agreement" in steps:
            agreement(log, backends, arguments.share)
        if "verify" in steps:
            verify(log, models, backends, precisions)
        for at, batch in enumerate(arguments.batches.split(",")):
            if "bench" in steps:
                bench(log, models, backends, precisions, batch, arguments.seconds, output)
            if "kernels" in steps and at == 0:
                kernels(log, models, backends[0], precisions, output)
            if "torch" in steps and has_torch(log):
                torch(log, models, precisions, batch)
    except KeyboardInterrupt:
        pass
    table(log.rows)
    must = [row for row in log.rows if row["step"] in ("agreement", "verify") and arguments.backends.split(",")[0] in str(row["what"])]
    sys.exit(not all(row["ok"] for row in must))


def libraries():
    """Folders that hold NVIDIA's libraries, of this folder and of Python's packages."""
    places = [HERE / "lib"]
    for root in map(Path, sys.path):
        places += sorted((root / "nvidia").glob("*/lib")) if root.is_dir() else []
    return [str(place) for place in places if place.is_dir() and any(place.glob("*.so*"))]


def program(name):
    """A program of the folder, or what a checkout has built."""
    return next((path for path in (HERE / "bin" / name, HERE.parent / "target/release" / name) if path.exists()), Path(name))


def found(log, backends, folders, is_told):
    """Those of `backends` that the machine has; the first is always asked."""
    if is_told:
        query = "name,driver_version,clocks.sm,clocks.mem,power.draw,memory.used,memory.total"
        log.run("devices", "nvidia-smi", ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 20)
        log.write(step="devices", what="libraries", ok=True, output=folders)
    log.run("devices", "cutover", [program("cutover"), "devices", "--json"], 60, parse=lambda text: {"found": json.loads(text)})
    told = json.dumps(log.rows[-1].get("found", ""))
    return backends[:1] + [backend for backend in backends[1:] if f'"backend": "{backend}"' in told]


def agreement(log, backends, share):
    tests = program("agreement")
    command = [tests, "gpu"] if tests.exists() else None
    cargo = ["cargo", "test", "--release", "-p", "cutover-backend", "--features", "cuda,wgpu", "--test", "agreement", "gpu"]
    for backend in backends:
        log.run("agreement", backend, command or cargo, 180, {"CUTOVER_GPU": backend, "CUTOVER_SAMPLE": str(share)})


def verify(log, models, backends, precisions):
    """Several at a time: what is compared is not timed, and compiling takes one core."""
    jobs = []
    for model in models:
        for given in sorted(model.parent.glob(f"{model.stem}*.in.npz")):
            which = given.name[len(model.stem) : -len(".in.npz")]
            expected = given.with_name(f"{model.stem}{which}.out.npz")
            # Of MODEL.onnx, not of MODEL.int8.onnx; and another model's name may begin with this one's.
            if not expected.exists() or (which and not which[1:].isdigit()):
                continue
            for backend in backends:
                for precision in precisions:
                    what = f"{model.stem}{which} {backend} {precision}"
                    command = [program("cutover"), "verify", model, "--inputs", given, "--expect", expected, "--backend", backend, "--precision", precision]
                    least = LEAST_DB.get((precision, ".int8" in model.name))
                    jobs.append((what, command + (["--sqnr", str(least)] if least else [])))
    environment = {"XDG_CACHE_HOME": "/dev/null"}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        list(pool.map(lambda job: log.run("verify", job[0], job[1], 150, environment), jobs))


def kernels(log, models, backend, precisions, output):
    """Kernel by kernel, by the device's clock: how many are written by hand or a library's, and what takes longest."""

    def counts(text):
        told = json.loads(text)["profile"]["ops"]
        by_hand = sum(row["nodes"] for row in told if "by hand" in row["kernel"] or "cuBLASLt" in row["kernel"])
        longest = [{key: row[key] for key in ("op", "kernel", "nodes", "ms", "of_peak")} for row in told[:8]]
        return {"by_hand": by_hand, "all": sum(row["nodes"] for row in told), "longest": longest}

    for model in models:
        for precision in precisions:
            what = {"model": model.stem, "precision": precision, "backend": backend}
            command = [program("cutover"), "bench", model, "--backend", backend, "--precision", precision, "--seconds", "0.2", "--profile", "--json"]
            log.run("kernels", what, command, 60, {"XDG_CACHE_HOME": cache(output)}, counts)


def cache(output):
    """Where compiled kernels and what was measured of them are kept."""
    folder = output.resolve().parent / "cache"
    folder.mkdir(exist_ok=True)
    return str(folder)


def bench(log, models, backends, precisions, batch, seconds, output):
    for model in models:
        told = output.with_name(f"bench-{model.stem}-{batch}.json")
        what = {"model": model.stem, "batch": int(batch)}
        command = [program("cutover"), "bench", "--matrix", model, "--backend", ",".join(["cpu", *backends]), "--precision", ",".join(precisions)]
        command += ["--batch", batch, "--rounds", "3", "--seconds", str(seconds), "--timeout", "90", f"--json={told}", "--markdown", told.with_suffix(".md")]
        log.run("bench", what, command, 240, {"XDG_CACHE_HOME": cache(output)}, lambda _: {"cells": cells(told)})


def cells(path):
    """What a matrix measured: by backend and precision, medians in ms, or why there is none."""
    rows = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        figures = cell.get("figures") or {}
        row = {"backend": cell["backend"], "precision": cell["precision"], "gap": cell.get("gap"), "notes": cell.get("notes")}
        row.update(median=(figures.get("latency_ms") or {}).get("median"), phases=figures.get("phases"), work=figures.get("work"))
        rows.append({**row, "gpu_energy_j_per_item": figures.get("gpu_energy_j_per_item"), "elsewhere": figures.get("nodes_elsewhere")})
    return rows


def has_torch(log):
    if not any(row["step"] == "torch" and row["what"] == "installed" for row in log.rows):
        check = "import torch, onnx; assert torch.cuda.is_available(); print(torch.__version__, torch.version.cuda)"
        log.run("torch", "installed", [sys.executable, "-c", check], 60)
    return next(row["ok"] for row in log.rows if row["step"] == "torch" and row["what"] == "installed")


def torch(log, models, precisions, batch):
    parse = lambda text: {"cells": [json.loads(line) for line in text.splitlines() if line.startswith("{")]}
    for model in models:
        what = {"model": model.stem, "batch": int(batch)}
        log.run("torch", what, [sys.executable, HERE / "gpu_torch.py", model, batch, ",".join(precisions)], 150, parse=parse)


def table(rows):
    engines, measured = [], {}
    for row in rows:
        if row["step"] not in ("bench", "torch") or not isinstance(row["what"], dict):
            continue
        for cell in row.get("cells", []):
            engine = cell.get("backend", "torch")
            engines += [engine] if engine not in engines else []
            measured.setdefault((row["what"]["model"], row["what"]["batch"], cell["precision"]), {})[engine] = cell
    print("\n| | steps that hold | of |\n|---|---|---|")
    for step in ("agreement", "verify"):
        of = [row for row in rows if row["step"] == step]
        print(f"| {step} | {sum(row['ok'] for row in of)} | {len(of)} |")
    print("\n| model | precision | kernels by hand or a library's | of |\n|---|---|---|---|")
    for row in rows:
        if row["step"] == "kernels" and "all" in row:
            print(f"| {row['what']['model']} | {row['what']['precision']} | {row['by_hand']} | {row['all']} |")
    heads = [f"{engine} ms" for engine in engines] + ["cuda's kernels ms", "cuda / torch"]
    print(f"\n| model | batch | precision | {' | '.join(heads)} |\n|---|---|---|{'---|' * len(heads)}")
    ratios = []
    for (model, batch, precision), of in sorted(measured.items()):
        median = lambda engine: of.get(engine, {}).get("median")
        texts = [f"{median(engine):.3f}" if median(engine) else "-" for engine in engines]
        kernels_ms = ((of.get("cuda") or {}).get("phases") or {}).get("kernels_ms")
        ratio = median("cuda") / median("torch") if median("cuda") and median("torch") else None
        ratios += [ratio] if ratio else []
        texts += [f"{kernels_ms:.3f}" if kernels_ms else "-", f"{ratio:.2f}" if ratio else "-"]
        print(f"| {model} | {batch} | {precision} | {' | '.join(texts)} |")
    for (model, batch, precision), of in sorted(measured.items()):
        for engine, cell in of.items():
            if cell.get("elsewhere"):
                print(f"\n{model}, batch {batch}, {precision}: {cell['elsewhere']} nodes that {engine} leaves to the processor")
    if ratios:
        print(f"\nGeometric mean of cuda / torch over {len(ratios)}: {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}")
    for row in rows:
        if not row["ok"]:
            print(f"\n{row['step']} {row['what']}: {row.get('error', '').strip()[-300:]}")


if __name__ == "__main__":
    main()
