"""Does vLLM with the plugin compute what stock transformers does? One command on a machine with a GPU and vLLM.

    PYTHONPATH=VLLM:. python scripts/gpu_vllm.py check DENSE REDUCED --out vllm.jsonl

Every checkpoint is run by stock transformers (in float32 and bfloat16, without flash-linear-attention) and by vLLM (in
bfloat16, with the plugin) on the same prompts. Their log-probabilities of the prompts and their greedy text are
compared: vLLM may be no further from float32 than transformers' own bfloat16 is, times a factor, and its text may
leave float32's only where the two tokens are as close as that noise. A checkpoint that vLLM does not run without the
plugin is started without it, too, and must fail as pruning/loaders.py says.

The package need not be installed: the plugin's entry point is written into a temporary folder. Every run is a process
of its own, and all of them share the card, so that the whole takes as long as the slowest start. A JSON line for every
comparison goes to --out. Exit status 1 if anything was not as it should be.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modeling.families import family_of
from pruning.loaders import loaders

TEXT = Path(__file__).resolve().parents[1] / "modeling" / "vllm_plugin.py"
"""What the prompts are cut from."""
LENGTHS = (2, 17, 64, 65, 100, 130, 257, 300)
"""Tokens of the prompts; the rule works on chunks of 64."""
TOP = 5
"""Most likely tokens that are kept for each new one."""
FACTOR = 2.0
"""vLLM's distance from float32 may be so many times that of transformers' bfloat16."""
CACHE_BYTES = 2 << 30
REFUSED = "Mismatched type for mask_2d"
"""Triton's message for the kernel that the plugin replaces."""
Rows = dict[str, Any]
"""For each prompt: "prompt" has the log-probabilities of its tokens but the first, "tokens" the greedy text, and "top"
`[token, log-probability]` of the most likely ones before each of its tokens."""


def described(checkpoint: Path) -> tuple[int, int, bool]:
    """d_k, d_v, and whether vLLM runs it without the plugin."""
    config = json.loads((checkpoint / "config.json").read_text())
    spec = family_of(config).spec(config)
    alone = next(v for v in loaders(config, spec) if v.loader.name == "vLLM")
    mixer = next(iter(spec.deltas.values()))
    return mixer.d_k, mixer.d_v, alone.runs


def run_transformers(checkpoint: Path, prompts: list[list[int]], new: int, device: str) -> dict[str, Rows]:
    """Rows by dtype, from stock transformers with its plain torch operations."""
    for name in ("fla", "causal_conv1d"):
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cudnn.allow_tf32 = False
    rows: dict[str, Rows] = {}
    for dtype in ("float32", "bfloat16"):
        model = (
            AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to(device).eval()
        )
        row = rows[dtype] = {"prompt": [], "tokens": [], "top": []}
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            with torch.inference_mode():
                scores = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            values, indices = torch.cat(made.logits).float().log_softmax(-1).topk(TOP)
            row["prompt"].append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
            row["tokens"].append(made.sequences[0, len(prompt) :].tolist())
            row["top"].append(torch.stack([indices.double(), values.double()], -1).tolist())
        print(f"transformers {dtype} {checkpoint.name}: done", flush=True)
    return rows


def run_vllm(checkpoint: Path, prompts: list[list[int]], new: int, *, graphs: bool, gdn: str) -> Rows:
    """Rows of vLLM in bfloat16; `gdn` names its GDN prefill, or nothing for vLLM's choice."""
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    llm = LLM(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        language_model_only=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=len(prompts),
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=CACHE_BYTES,  # memory that the other runs take or give back is not taken for this one's
        enable_prefix_caching=False,
        enforce_eager=not graphs,
        kernel_config={"enable_flashinfer_autotune": False},
        additional_config={"gdn_prefill_backend": gdn} if gdn else {},
        disable_log_stats=True,
        seed=0,
    )
    start_s = time.monotonic() - began
    print(f"vLLM {checkpoint.name}: started in {start_s:.0f} s", flush=True)
    params = SamplingParams(
        temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, prompt_logprobs=1
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return {
        "start_s": start_s,
        "prompt": [
            [place[token].logprob for place, token in zip(o.prompt_logprobs[1:], prompt[1:], strict=True)]
            for o, prompt in zip(outputs, prompts, strict=True)
        ],
        "tokens": [[*o.outputs[0].token_ids] for o in outputs],
    }


def distances(a: Rows, b: Rows) -> list[float]:
    """Absolute differences of the prompts' log-probabilities, over all prompts."""
    pairs = zip(a["prompt"], b["prompt"], strict=True)
    return [abs(x - y) for left, right in pairs for x, y in zip(left, right, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def gap(exact: Rows, prompt: int, tokens: list[int]) -> float:
    """How much less likely the text's first other token is than the best one, in float32: 0 for an equal text,
    infinite where it is not even among the most likely."""
    for token, theirs, top in zip(tokens, exact["tokens"][prompt], exact["top"][prompt], strict=True):
        if token != theirs:
            return top[0][1] - dict(map(tuple, top)).get(token, float("-inf"))
    return 0.0


def compare(stock: dict[str, Rows], served: Rows) -> dict[str, Any]:
    """What vLLM's results are beside those of transformers, and whether that is "ok"."""
    exact, rounded = stock["float32"], stock["bfloat16"]
    noise, ours = distances(rounded, exact), distances(served, exact)
    gaps = [gap(exact, i, tokens) for i, tokens in enumerate(served["tokens"])]
    tie = FACTOR * max(noise)
    return {
        "prompt_tokens": len(ours),
        "vllm_from_float32": {"mean": mean(ours), "max": max(ours)},
        "transformers_bfloat16_from_float32": {"mean": mean(noise), "max": max(noise)},
        "vllm_from_transformers_bfloat16": {
            "mean": mean(distances(served, rounded)),
            "max": max(distances(served, rounded)),
        },
        "texts": len(gaps),
        "texts_equal": gaps.count(0.0),
        "texts_equal_to_transformers_bfloat16": sum(
            a == b for a, b in zip(served["tokens"], rounded["tokens"], strict=True)
        ),
        "largest_gap": max(gaps),
        "tie": tie,
        "ok": mean(ours) <= FACTOR * mean(noise) and max(gaps) <= tie,
    }


def refusal(log: str) -> str:
    """The line of a failed start that says why, or its last one."""
    lines = log.splitlines() or [""]
    return next((line.strip() for line in lines if REFUSED in line), lines[-1].strip())[-400:]


def install_plugin(folder: Path) -> None:
    """Metadata of an installed package that has the plugin's entry point, and nothing else."""
    info = folder / "lowkey-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lowkey\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nlowkey = modeling.vllm_plugin:register\n")


class Steps:
    """Runs of this file as processes of their own, each with a log and a result."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.deadline = folder, time.monotonic() + limit
        install_plugin(folder / "site")

    def run(self, label: str, *arguments: str, plugin: bool = True) -> tuple[dict[str, Any] | None, str]:
        """The result, or None if it failed, and the log."""
        out, log = self.folder / f"{label}.json", self.folder / f"{label}.log"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), os.environ["PYTHONPATH"]]),
            "VLLM_PLUGINS": "lowkey" if plugin else "",
        }
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, __file__, *arguments, "--out", str(out)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(max(self.deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                file.write("\ncut off: its time was up")
            finally:
                # An engine's process may outlive the one that started it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        print(f"{label}: ended with {process.returncode}", flush=True)
        return json.loads(out.read_text()) if out.exists() else None, log.read_text(errors="replace")


def check(options: argparse.Namespace) -> int:
    from tokenizers import Tokenizer

    folder = Path(tempfile.mkdtemp(prefix="gpu_vllm-"))
    print(f"logs in {folder}", flush=True)
    steps = Steps(folder, options.limit)
    ids = Tokenizer.from_file(str(options.checkpoints[0] / "tokenizer.json")).encode(TEXT.read_text()).ids
    prompts = [ids[(start := 300 * i) : start + length] for i, length in enumerate(LENGTHS)]
    if [*map(len, prompts)] != [*LENGTHS]:
        sys.exit(f"{TEXT.name} has {len(ids)} tokens only")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    shared = ["--prompts", str(folder / "prompts.json"), "--new", str(options.new)]
    graphs = ["--graphs"] if options.graphs else []
    with ThreadPoolExecutor(16) as pool:
        runs = []
        for number, checkpoint in enumerate(options.checkpoints):
            d_k, d_v, runs_alone = described(checkpoint)
            served = ["vllm", str(checkpoint), *shared, *graphs]
            # Without the plugin, and at 128, where the plugin changes nothing, vLLM would choose FlashInfer on Hopper.
            triton = ["--gdn", "triton"]
            jobs = {
                "transformers": pool.submit(
                    *(steps.run, f"{number}-transformers", "transformers", str(checkpoint), *shared),
                    *("--device", options.device),
                ),
                "vllm": pool.submit(
                    steps.run, f"{number}-vllm", *served, *(triton if d_k == d_v == 128 else [])
                ),
            }
            if not runs_alone:
                jobs["alone"] = pool.submit(steps.run, f"{number}-alone", *served, *triton, plugin=False)
            runs.append(({"checkpoint": checkpoint.name, "d_k": d_k, "d_v": d_v}, jobs))
        rows = [row for about, jobs in runs for row in judge(about, {k: j.result() for k, j in jobs.items()})]
    with options.out.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return 0 if all(row["ok"] for row in rows) else 1


def judge(
    about: dict[str, Any], results: dict[str, tuple[dict[str, Any] | None, str]]
) -> list[dict[str, Any]]:
    """One row for the comparison, and one for the start without the plugin where there was one."""
    (stock, stock_log), (served, served_log) = results["transformers"], results["vllm"]
    row = about | {"plugin": True, "ok": False}
    if stock is None or served is None:
        row["error"] = refusal(stock_log if stock is None else served_log)
        print(stock_log[-3000:] if stock is None else served_log[-6000:], flush=True)
    else:
        row |= {"start_s": round(served["start_s"], 1), **compare(stock, served)}
        row["said"] = sorted(
            {line[line.index("Lowkey: ") :] for line in served_log.splitlines() if "Lowkey: " in line}
        )
    rows = [row]
    if "alone" in results:
        result, log = results["alone"]
        rows.append(about | {"plugin": False, "error": refusal(log), "ok": result is None and REFUSED in log})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("check", help="everything")
    whole.add_argument("checkpoints", nargs="+", type=Path)
    whole.add_argument("--limit", type=float, default=300, help="seconds for all of it")
    parts = [commands.add_parser(name, help="a step of it") for name in ("transformers", "vllm")]
    for part in parts:
        part.add_argument("checkpoint", type=Path)
        part.add_argument("--prompts", type=Path, required=True, help="JSON, lists of tokens")
    parts[1].add_argument("--gdn", default="", help="GDN prefill of vLLM")
    for command in (whole, parts[0]):
        command.add_argument("--device", default="cuda", help="of transformers")
    for command in (whole, parts[1]):
        command.add_argument(
            "--graphs", action="store_true", help="torch.compile and CUDA graphs, a longer start"
        )
    for command in (whole, *parts):
        command.add_argument("--new", type=int, default=64, help="new tokens of each prompt")
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "check":
        return check(options)
    prompts = json.loads(options.prompts.read_text())
    if options.command == "transformers":
        result = run_transformers(options.checkpoint, prompts, options.new, options.device)
    else:
        result = run_vllm(options.checkpoint, prompts, options.new, graphs=options.graphs, gdn=options.gdn)
    options.out.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
