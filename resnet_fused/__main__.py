"""``python -m resnet_fused``: versions, backends, and for each missing one why, and the fix."""

import argparse
import json
import platform
import sys

import torch

from . import __version__
from .backend import all_backends
from .selfcheck import check


def report() -> str:
    lines = [
        f"resnet_fused {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        platform.platform(),
        f"CUDA of torch: {torch.version.cuda or 'none'}; GPUs: {torch.cuda.device_count()}",
        "",
        "backends, in the order in which RESNET_FUSED_BACKEND=auto prefers them:",
    ]
    for backend in all_backends():
        state = backend.detail if backend.unavailable is None else f"not available: {backend.unavailable}"
        lines.append(f"  {backend.name:6} {state}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where a check finds a mismatch."""
    parser = argparse.ArgumentParser(prog="python -m resnet_fused", description="Which backends there are, and why.")
    check_help = "run each available backend, dtype and layout against eager; exit status 1 on a mismatch"
    parser.add_argument("--check", action="store_true", help=check_help)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(arguments)
    checks = check() if options.check else []
    if options.json:
        backends = [{"name": b.name, "detail": b.detail, "unavailable": b.unavailable} for b in all_backends()]
        versions = {"resnet_fused": __version__, "torch": torch.__version__, "cuda": torch.version.cuda}
        print(json.dumps({"versions": versions, "backends": backends} | ({"checks": checks} if options.check else {})))
    else:
        print(report())
        if options.check:
            print(
                "",
                "against eager, the largest error of the largest value:" if checks else "no backend to check",
                sep="\n",
            )
        for entry in checks:
            state = f"{entry['error']:.1e} of at most {entry['limit']:.0e}"
            state += f", MISMATCH: {entry['mismatch']}" if entry["mismatch"] else ""
            print(f"  {entry['backend']:6} {entry['device']:4} {entry['dtype']:8} {entry['layout']:13} {state}")
    return int(any(entry["mismatch"] for entry in checks))


if __name__ == "__main__":
    sys.exit(main())
