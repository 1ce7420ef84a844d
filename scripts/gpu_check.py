"""Is this GPU right, and how fast is it? One command on a machine with CUDA, no network needed.

    bash scripts/gpu_check.sh [--out gpu_check.json] [--only kernels bandwidth ...]

Sections, each on its own, so that the failure of one loses none of the others:

    kernels    decode kernel and prefill rule against float64, random shapes
    parity     whole models against stock fla: greedy text in float32, logits in bfloat16
    bandwidth  bytes per second of the decode kernel beside a copy on the same device
    decode     tokens per second of 1.3 B shapes, d_k 128 and 64, prompt 512, 128 new tokens, bfloat16
    peer       the same shapes by fla and transformers' generate
    capacity   the most requests that fit

Ends within its time box, prints one table and writes JSON after every row. Exit status 1 if anything was wrong, 2 if
there is no GPU. `--device cpu --small` runs tiny shapes through Triton's interpreter, to test the script.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

SECTIONS = ("kernels", "parity", "bandwidth", "decode", "peer", "capacity")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes (to test the script on a CPU)")
    parser.add_argument("--seconds", type=float, default=480, help="time box (default: 480)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = (
            "1"  # counts when a kernel's module is imported, hence the imports below
        )
    import torch
    import triton
    from gpu_common import Run, SkippedError
    from gpu_kernels import check_bandwidth, check_rule, check_step
    from gpu_models import check_capacity, check_decode, check_parity, check_peer
    from rich.console import Console
    from rich.table import Table

    console = Console(width=160)
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print("gpu_check: torch finds no CUDA device here; nothing was checked")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = {
        "kernels": (check_step, check_rule),
        "parity": (check_parity,),
        "bandwidth": (check_bandwidth,),
        "decode": (check_decode,),
        "peer": (check_peer,),
        "capacity": (check_capacity,),
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.device, args.small, began + args.seconds, Path(folder))
        run.report |= {
            "device": torch.cuda.get_device_name() if run.cuda else "cpu",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": sys.version.split()[0],
        }

        def save() -> None:
            run.report["failures"] = run.failures
            temporary = args.out.with_name(f".{args.out.name}")
            temporary.write_text(json.dumps(run.report, indent=2) + "\n")
            temporary.rename(args.out)

        table = Table("case", "", "result", title=f"{run.report['device']}, torch {torch.__version__}")
        for section in args.only:
            for check in checks[section]:
                started = time.monotonic()
                rows: list[list[str]] = []
                try:
                    for row in check(run):
                        rows.append(row)
                        console.print("  " + "  ".join(row))
                        save()
                except SkippedError as e:
                    rows.append([check.__name__, "skipped", str(e)])
                    run.report.setdefault("skipped", {})[check.__name__] = str(e)
                except Exception:  # the other sections are worth having whatever went wrong in this one
                    console.print(traceback.format_exc())
                    run.failures.append(check.__name__)
                    rows.append([check.__name__, "FAIL", "see the traceback"])
                took = time.monotonic() - started
                run.report.setdefault("section_seconds", {})[check.__name__] = took
                console.print(f"{check.__name__}: {took:.0f} s")
                for row in rows:
                    table.add_row(*row)
                save()
    console.print(table)
    failed = run.failures
    console.print("passed" if not failed else f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
