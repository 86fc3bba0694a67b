"""Everything that a card must show, in one command, from a plain checkout.

python benchmarks/card --output DIR [--only PART ...] [--items ITEM ...] [--tiny]

Every part runs in processes of its own with a time limit, writes its figures to DIR/<part>.json as it has them, and
goes on without what fails. The last thing printed is a short table.

--tiny runs every branch on a CPU. --cpu THREADS measures what a CPU can tell: whole steps, the host, exactness.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from processes import Child
from record import Record
from summary import as_text, collected
from wheels import unpacked

Parts = dict[str, tuple[str, dict[str, int]]]
"""By part: the module, and its items with the seconds that each may take."""

# In the order of their worth.
PARTS: Parts = {
    "card": ("facts", {"card": 20}),
    "tests": ("gpu_tests", {"tests": 100, "large": 20}),
    "steps": (
        "step_times",
        {"bert": 30, "mistral": 30, "gpt2": 30, "vit": 25, "lora": 30, "clip": 25, "convnext": 25, "openclip": 25},
    ),
    "planner": ("planned_batches", {"bert": 40, "gpt2": 40}),
    "kernels": ("kernel_times", {"alone": 25}),
    "fused": ("fused_times", {"masks": 20, "gated": 15, "norms": 25}),
    "exact": ("exact_gradients", {"bert": 15, "llama": 15, "gpt2": 15, "t5 gated": 15}),
    "host": ("host_times", {"gelu": 10, "tensors": 10, "narrow": 20, "bert": 30}),
    "compiled": (
        "compiled_times",
        {"bert": 100, "mistral": 100, "gpt2": 100, "vit": 100, "lora": 100, "clip": 100, "convnext": 100},
    ),
}
ON_REQUEST = {"compiled": ("gpt2", "vit", "lora", "clip", "convnext")}  # only where --items names them
SECONDS = 400
AHEAD = 2  # so many processes build and plan while one measures: on a card's host that takes as long as measuring

PARTS_ON_A_CPU: Parts = {
    "card": ("facts", {"card": 60}),
    "steps": ("step_times", {"bert-cpu": 900, "llama-cpu": 600}),
    "host": ("host_times", {"tensors": 120, "narrow": 300}),
    "exact": ("exact_gradients", {"bert": 120, "llama": 120, "gpt2": 120, "t5 gated": 120}),
}

# The planner counts what is allocated, and fragments were what it missed on one H200; see `planned_batches`.
ENVIRONMENT = {"planner": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}}


def main() -> None:
    arguments = _arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    work = _work(arguments)
    start = time.perf_counter()
    seconds = arguments.seconds
    if seconds is None:
        seconds = sum(child.limit for child in work) if arguments.cpu else SECONDS
    for number, child in enumerate(work):
        child.start()
        # They would take from a CPU's few cores what this one measures, and from the host where that is measured.
        if not arguments.cpu and child.module != "host_times":
            for later in work[number + 1 : number + 1 + AHEAD]:
                later.start()
        child.measure(seconds - (time.perf_counter() - start))
        Record(arguments.output / "card.json")["seconds"] = time.perf_counter() - start
        if arguments.collect:
            arguments.collect.write_text(json.dumps(collected(arguments.output), indent=1) + "\n")
    print(as_text(arguments.output))


def _work(arguments: argparse.Namespace) -> list[Child]:
    """The processes, in turn; what an earlier run left of their parts is deleted, if not only some items are asked for.

    Each item has its own, so that one without memory ends none; where memory is no matter, there is one for all.
    """
    environment, parts = _environment(arguments), PARTS_ON_A_CPU if arguments.cpu else PARTS
    work = []
    for part in ["card", *(part for part in arguments.only or parts if part != "card")]:
        module, items = parts[part]
        chosen = [item for item in items if part == "card" or _is_asked_for(part, item, arguments.items)]
        record = Record(arguments.output / f"{part}.json")
        if arguments.items is None:
            record.path.unlink(missing_ok=True)
        groups = [chosen] if arguments.tiny or part == "exact" else [[item] for item in chosen]
        for group in filter(None, groups):
            own = environment | ENVIRONMENT.get(part, {})
            work.append(Child(module, group, record, sum(items[item] for item in group), arguments.tiny, own))
    return work


def _is_asked_for(part: str, item: str, named: list[str] | None) -> bool:
    return item not in ON_REQUEST.get(part, ()) if named is None else item in named


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Of the processes that measure."""
    found = dict(os.environ)
    if arguments.wheels:
        site = unpacked(arguments.wheels, arguments.output / "wheels").resolve()
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), found.get("PYTHONPATH")]))
    if arguments.cpu:
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(arguments.cpu)}
    elif arguments.tiny:
        found["OMP_NUM_THREADS"] = "1"  # a test shares its cores
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--items", nargs="+", metavar="ITEM", help="of the parts, such as bert and gpt2; adds to DIR")
    parser.add_argument(
        "--collect",
        type=Path,
        metavar="FILE",
        help="put everything that stands in DIR into one file as well, such as docs/results/h100.json",
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="of pure Python packages: open_clip_torch, liger-kernel and so on"
    )
    parser.add_argument("--cpu", type=int, metavar="THREADS", help="measure steps, host and exact on the CPU")
    parser.add_argument("--tiny", action="store_true", help="as small as it runs, to see that it runs")
    parser.add_argument("--seconds", type=float, help=f"for everything together; on a card {SECONDS}")
    arguments = parser.parse_args()
    parts = PARTS_ON_A_CPU if arguments.cpu else PARTS
    if not set(arguments.only or ()) <= parts.keys():
        parser.error(f"--cpu measures {', '.join(parts)} alone.")
    known = {item for part in arguments.only or parts for item in parts[part][1]}
    if unknown := set(arguments.items or ()) - known:
        parser.error(f"There is no item {', '.join(sorted(unknown))} in these parts, but {', '.join(sorted(known))}.")
    return arguments


if __name__ == "__main__":
    main()
