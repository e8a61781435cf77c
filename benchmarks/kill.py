"""Kill a compute job with SIGKILL at random moments, resume it, and compare the file with that of a job left alone.

    python benchmarks/kill.py [--times 20]

Every trial starts afresh, is killed once at a moment drawn uniformly over the undisturbed job's run time, and is resumed.
Prints, per trial, when it was killed and whether the bytes are equal; ends with status 1 if any differ.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = """
import time, torch

def denoiser(guidance):
    def D(x, sigma):
        time.sleep(0.002)  # so that the work, and not the start of Python, is what gets killed
        s = sigma.reshape(-1, 1, 1, 1)
        return torch.tanh(x / (1 + s)) * guidance / (1 + 0.3 * s)
    return D
"""


def command(folder: Path, name: str) -> list[str]:
    """A small job with evidence, over the model above."""
    options = "--model toy:denoiser --shape 2,8,8 --sigma-min 0.05 --sigma-max 20 --guidance 1,3 --effort quick"
    options += " --samples 24 --batch 2 --device cpu --out"
    return [sys.executable, "-m", "dpm_solver_v3.ems_tools.cli.main", "compute", *options.split(), str(folder / name)]


def trial(folder: Path, name: str, kill_after: float) -> bytes:
    """The file of a job that was killed once and then resumed."""
    process = subprocess.Popen(command(folder, name), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    subprocess.run(command(folder, name), cwd=folder, check=True, capture_output=True)
    return (folder / name).read_bytes()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "toy.py").write_text(MODEL)
        began = time.monotonic()
        subprocess.run(command(folder, "alone.ems.safetensors"), cwd=folder, check=True, capture_output=True)
        seconds = time.monotonic() - began
        expected = (folder / "alone.ems.safetensors").read_bytes()
        print(f"undisturbed job: {seconds:.1f} s, {len(expected)} bytes", flush=True)
        equal = 0
        for i in range(args.times):
            after = draw.uniform(0, seconds)
            same = trial(folder, f"{i}.ems.safetensors", after) == expected
            equal += same
            print(f"killed after {after:5.2f} s: {'same file' if same else 'ANOTHER FILE'}", flush=True)
        left = [p.name for p in folder.iterdir() if p.suffix in (".partial", ".tmp")]
    print(f"{equal} of {args.times} resumed jobs ended with the same file; {len(left)} stray files left")
    return 0 if equal == args.times else 1


if __name__ == "__main__":
    sys.exit(main())
