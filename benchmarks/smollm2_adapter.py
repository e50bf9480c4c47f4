"""What the shipped adapter costs and keeps: loss and density on held-out text, beside a dense control.

The control was trained on the same tokens in the same way, with all gates open. Example:

    python -m benchmarks.smollm2_adapter --control runs/control --data valid.jsonl.xz --json results.json

Gates are applied as a mask in one forward pass a batch, which gives the losses that the cache gives (the invariant
that the tests check) and is much faster; `spkv eval` measures the same through the cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

import spkv
from benchmarks.losses import measure, whole_sequences
from spkv.checkpoint import load_base, resolve_model
from spkv.evals.nll import cut_sequences
from spkv.gates import HardGate, OpenGate, RandomGate, SinkGate, ThresholdGate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="default: the shipped one")
    parser.add_argument("--control", type=Path, required=True, help="LoRA of the dense control")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--limit", type=int, help="sequences; default: all")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    sequences = cut_sequences(arguments.data, tokenizer, arguments.sequence_length, limit=arguments.limit)
    held_out = whole_sequences(sequences)
    rows: list[dict[str, Any]] = []

    def add(policy: str, threshold: float | None, model: PreTrainedModel, gate: HardGate | None) -> dict[str, Any]:
        rows.append({"policy": policy, "threshold": threshold, **measure(model, held_out, gate, arguments.batch_size)})
        print(rows[-1], file=sys.stderr, flush=True)
        return rows[-1]

    base = load_base("smollm2", dtype=torch.float32).to(device).eval()
    add("base", None, base, None)
    control = PeftModel.from_pretrained(base, arguments.control).merge_and_unload().eval()
    dense_loss = add("dense_control", None, control, None)["loss"]
    del base, control
    adapted = spkv.load("smollm2", adapter=arguments.adapter, dtype=torch.float32, device=device)
    add("open", None, adapted, OpenGate())
    density = {t: add("spkv", t, adapted, ThresholdGate(t))["density"] for t in arguments.thresholds}
    add("streaming", None, adapted, SinkGate(4))
    reference = 0.5 if 0.5 in density else arguments.thresholds[0]
    add("random", None, adapted, RandomGate(density[reference]))
    for row in rows:
        row["increase"] = row["loss"] / dense_loss - 1
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "command": "python -m benchmarks.smollm2_adapter " + " ".join(Path(a).name for a in sys.argv[1:]),
        "commit": commit,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"spkv": spkv.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "sequences": sequences.shape[0],
        "sequence_length": sequences.shape[1],
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
