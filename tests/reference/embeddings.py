#!/usr/bin/env python3
"""How far the sentence embeddings of small models are from the original's, each run by `cutover run`.

    python3 tests/reference/embeddings.py target/release/cutover original.onnx tokens.npz small.onnx...

`tokens.npz` holds `input_ids` and `attention_mask` (and whatever else the models read), sentences along the first axis. An embedding is the mean of the first
output over the tokens of the mask, of length 1. Prints the mean cosine with the original's, and Spearman's correlation of the similarities of all pairs of
sentences.   needs: pip install numpy scipy"""
import os, subprocess, sys, tempfile

import numpy as np
from scipy.stats import spearmanr

TOGETHER = 20


def embeddings(binary, model, tokens, folder):
    given, answered = os.path.join(folder, "in.npz"), os.path.join(folder, "out.npz")
    parts = []
    for first in range(0, len(tokens["input_ids"]), TOGETHER):
        part = {name: values[first : first + TOGETHER] for name, values in tokens.items()}
        np.savez(given, **part)
        subprocess.run([binary, "run", model, "--inputs", given, "--outputs", answered], check=True, stdout=subprocess.DEVNULL)
        with np.load(answered) as file:
            states = file[file.files[0]]
        mask = part["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(parts)


def main():
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    binary, original, data, *small = sys.argv[1:]
    with np.load(data) as file:
        tokens = {name: file[name] for name in file.files}
    with tempfile.TemporaryDirectory() as folder:
        of_original = embeddings(binary, original, tokens, folder)
        pairs = np.triu_indices(len(of_original), 1)
        for model in small:
            own = embeddings(binary, model, tokens, folder)
            cosine = (of_original * own).sum(1).mean()
            similar = spearmanr((of_original @ of_original.T)[pairs], (own @ own.T)[pairs])[0]
            share = 100 * os.path.getsize(model) / os.path.getsize(original)
            print(f"| {os.path.basename(model)} | {len(own)} | {cosine:.4f} | {similar:.4f} | {share:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
