"""Is this GPU right, and how fast is it? Three commands on a machine with CUDA, no network needed.

    bash scripts/gpu_check.sh --part correctness [--out correctness.json]
    bash scripts/gpu_check.sh --part speed [--out speed.json]
    bash scripts/gpu_check.sh --part hybrids [--shapes 4B] [--out hybrids.json]

Sections of the first part, each on its own, so that the failure of one loses none of the others:

    kernels    decode kernel, kernels of prompts and prefill rule against float64, random shapes; int8 states of
               prompts against torch, bit for bit
    parity     whole models against stock fla: greedy text in float32, logits in bfloat16
    texts      the server's engine: text by recorded steps, launched steps and a CPU
    grammars   answers held to JSON schemas and regular expressions, on a card
    hybrids    whole models of every hybrid family against stock transformers, as `parity`; attention, experts and
               products against float64; the engine's texts, with requests that wait for pages in between

of the second:

    bandwidth  bytes per second of the decode kernel beside a copy on the same device
    engine     tokens per second of the server's engine
    grammar_speed  tokens per second with and without a JSON schema, with 32,000 and 248,320 tokens
    server     lowkey-serve with dense and reduced variants on the card, 256 and 512 streams over HTTP, against the
               engine alone
    decode     tokens per second of 1.3 B shapes, d_k 128 and 64, prompt 512, 128 new tokens, bfloat16
    peer       the same shapes by fla and transformers' generate
    capacity   the most requests that fit
    tuning     other tiles and numbers of warps for the decode kernel
    startup    lowkey-serve until it is ready, with empty and with warm caches
    prompts    prefill with the fixed configurations of fla's kernels, and with fla's own tuning

and of the third, of Qwen3.5 shapes with random weights (`--shapes`, `--main-shape`, `--widths`):

    hybrid_speed    decode steps in graphs and prompts, beside what their bytes take
    hybrid_peer     the main shape by transformers with fla's kernels
    hybrid_experts  the 35B-A3B with as many layers as fit
    hybrid_engine   tokens per second of the server's engine with the main shape
    hybrid_server   lowkey-serve with the main shape dense and reduced: start-up, streams over HTTP beside the engine
                    alone, and how many requests fit
    pruning         lowkey-prune on the card: calibration and evaluation of the main shape, and of 27B in a stream

and of the fourth, which look for the best way of launching kernels:

    products        of few rows, by libraries and by our kernels, alone and in whole layers
    attention       decode steps and prompts over pages

Before them `warm` compiles what they need. `--only` runs some sections of either part. `--state-dtype` says in which
dtypes recurrent states are kept: each section that they matter to has rows for each.

Each section has a share of the time box. What it leaves goes to those after it; one that would need more says what it
skips, and one that hangs is cut off. A table is printed, and JSON written after every row. Exit status 1 if anything
was wrong, 2 if there is no GPU. `--device cpu --small` runs tiny shapes through Triton's interpreter, as a test.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from modeling.state_dtype import STATE_DTYPES

PARTS = {
    "correctness": {"warm": 150, "kernels": 50, "parity": 150, "texts": 60, "grammars": 30, "hybrids": 90},
    "speed": {
        "warm": 60,
        "bandwidth": 15,
        "engine": 140,
        "grammar_speed": 90,
        "server": 180,
        "decode": 60,
        "peer": 50,
        "capacity": 20,
        "tuning": 30,
        "startup": 40,
        "prompts": 10,
    },
    "hybrids": {
        "warm": 60,
        "hybrid_speed": 150,
        "hybrid_peer": 50,
        "hybrid_experts": 60,
        "hybrid_engine": 100,
        "hybrid_server": 130,
        "pruning": 150,
    },
    "launches": {"products": 100, "attention": 60},
}
"""Shares of the time box, in seconds, in the order in which they run."""
SECONDS = PARTS["correctness"] | PARTS["speed"] | PARTS["hybrids"] | PARTS["launches"]
BOX_S = 500.0
"""With the installation of wheels and the imports less than nine minutes."""
GRACE_S = 10.0
"""After its end a section is cut off, wherever it is."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--part", choices=PARTS, help="which sections (default: all of both parts)")
    parser.add_argument("--only", nargs="+", choices=SECONDS, help="these sections, of either part")
    parser.add_argument(
        "--state-dtype",
        nargs="+",
        choices=STATE_DTYPES,
        default=["float32", "int8"],
        help="dtypes of recurrent states (default: float32 int8)",
    )
    parser.add_argument("--shapes", nargs="+", default=["4B", "2B", "9B"], help="hybrids (default: 4B 2B 9B)")
    parser.add_argument("--main-shape", help="hybrid of the sections that take one (default: the first)")
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[128, 64], help="d_k of hybrids (default: 128 64)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes (to test the script on a CPU)")
    parser.add_argument("--seconds", type=float, default=BOX_S, help=f"time box (default: {BOX_S:.0f})")
    parser.add_argument("--api-processes", type=int, help="lowkey-serve's option of this name")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    sys.path += filter(None, [os.environ.get("STOCK_FLA")])  # where scripts/gpu_check.sh has put fla's models
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = (
            "1"  # counts when a kernel's module is imported, hence the imports below
        )
    import torch
    import triton
    from gpu_attention import check_attention_speed
    from gpu_bandwidth import check_bandwidth, check_tuning
    from gpu_common import Run, SkippedError
    from gpu_engine import check_engine_speed, check_engine_text
    from gpu_grammars import check_grammar_speed, check_grammars
    from gpu_hybrid_kernels import check_attention, check_experts, check_products
    from gpu_hybrid_peer import check_hybrid_peer
    from gpu_hybrid_server import check_hybrid_engine, check_hybrid_server
    from gpu_hybrid_speed import check_hybrid_experts, check_hybrid_speed
    from gpu_hybrid_texts import check_experts_alone, check_hybrid_texts, check_preemption
    from gpu_hybrids import check_hybrids
    from gpu_kernels import check_inputs, check_rule, check_step
    from gpu_models import check_capacity, check_decode, check_parity, check_peer
    from gpu_products import check_few_requests, check_layers
    from gpu_products import check_products as check_products_speed
    from gpu_pruning import check_pruning
    from gpu_server import check_server
    from gpu_startup import check_prompts, check_startup
    from gpu_states import check_prompt_states, check_rounding
    from gpu_warm import check_warm
    from rich.console import Console
    from rich.table import Table

    from lowkey.files import OutputError, found_at
    from lowkey.publishing import new_json
    from modeling.runtime.gpu.fla_kernels import use_fixed

    console = Console(width=160)
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print("gpu_check: torch finds no CUDA device here; nothing was checked")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    logging.basicConfig(format="  %(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("lowkey.modeling").setLevel(logging.INFO)
    checks = {
        "warm": (check_warm,),
        "kernels": (check_step, check_rounding, check_prompt_states, check_inputs, check_rule),
        "parity": (check_parity,),
        "texts": (check_engine_text,),
        "grammars": (check_grammars,),
        "hybrids": (
            *(check_attention, check_experts, check_products),
            *(check_hybrids, check_hybrid_texts, check_preemption, check_experts_alone),
        ),
        "bandwidth": (check_bandwidth,),
        "engine": (check_engine_speed,),
        "grammar_speed": (check_grammar_speed,),
        "server": (check_server,),
        "decode": (check_decode,),
        "peer": (check_peer,),
        "capacity": (check_capacity,),
        "tuning": (check_tuning,),
        "startup": (check_startup,),
        "prompts": (check_prompts,),
        "hybrid_speed": (check_hybrid_speed,),
        "hybrid_peer": (check_hybrid_peer,),
        "hybrid_experts": (check_hybrid_experts,),
        "hybrid_engine": (check_hybrid_engine,),
        "hybrid_server": (check_hybrid_server,),
        "pruning": (check_pruning,),
        "products": (check_products_speed, check_layers, check_few_requests),
        "attention": (check_attention_speed,),
    }
    part = SECONDS if args.part is None else PARTS[args.part]
    sections = [name for name in SECONDS if name in (args.only or part)]
    shares = {name: part.get(name, SECONDS[name]) for name in sections}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.device, args.small, began + args.seconds, Path(folder))
        run.sections, run.api_processes = sections, args.api_processes
        run.shapes, run.main_shape = tuple(args.shapes), args.main_shape
        run.widths = tuple(args.widths)
        run.state_dtypes = tuple(name for name in STATE_DTYPES if name in args.state_dtype)
        if run.cuda:
            run.own_configs = use_fixed(torch.cuda.get_device_capability())
        run.report |= {
            "device": torch.cuda.get_device_name() if run.cuda else "cpu",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": sys.version.split()[0],
        }

        def cut_off_at(when: float) -> None:
            if not run.small:
                signal.setitimer(signal.ITIMER_REAL, max(when - time.monotonic(), 0.1))

        def cut_off(number: int, frame: FrameType | None) -> None:
            run.is_cut_off = True
            raise SkippedError("cut off: its time was over")

        signal.signal(signal.SIGALRM, cut_off)

        def save() -> bool:
            """Write the report, or say why it can't be: what was found out is on the screen all the same."""
            run.report["failures"] = run.failures
            try:
                new_json(args.out, run.report, replaces=found_at(args.out))
            except OutputError as e:
                console.print(f"error: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
                return False
            return True

        table = Table("case", "", "result", title=f"{run.report['device']}, torch {torch.__version__}")
        saved = save()
        if not saved:
            return 2
        for number, section in enumerate(sections):
            later = sum(shares[name] for name in sections[number + 1 :]) * args.seconds / sum(shares.values())
            run.section_end = max(run.deadline - later, time.monotonic())
            left = run.section_end - time.monotonic()
            console.print(f"{section}, up to {left:.0f} s", style="bold", highlight=False)
            for check in checks[section]:
                started = time.monotonic()
                rows: list[list[str]] = []
                try:
                    run.is_cut_off = False
                    cut_off_at(run.section_end + GRACE_S)
                    for row in check(run):
                        rows.append(row)
                        console.print("  " + "  ".join(row))
                        save()
                except Exception as e:  # the other sections are worth having whatever went wrong in this one
                    # Where it was cut off somebody may have wrapped the error: Triton does.
                    if isinstance(e, SkippedError) or run.is_cut_off:
                        why = str(e) if isinstance(e, SkippedError) else "cut off: its time was over"
                        rows.append([check.__name__, "skipped", why])
                        run.report.setdefault("skipped", {})[check.__name__] = why
                    else:
                        console.print(traceback.format_exc())
                        run.failures.append(check.__name__)
                        rows.append([check.__name__, "FAIL", "see the traceback"])
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                took = time.monotonic() - started
                run.report.setdefault("section_seconds", {})[check.__name__] = took
                console.print(f"{check.__name__}: {took:.0f} s")
                for row in rows:
                    table.add_row(*row)
                saved = save()
    console.print(table)
    failed = run.failures
    console.print("passed" if not failed else f"FAILED: {', '.join(failed)}")
    return int(bool(failed)) if saved else 2


if __name__ == "__main__":
    raise SystemExit(main())
