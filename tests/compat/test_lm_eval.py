"""lm-evaluation-harness `local-completions`, unmodified: its perplexity is the model's own, its greedy flags right."""

import json
import math

import pytest
from checkpoints import byte_tokenizer
from harness import logprobs, run_harness

from modeling.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

TOKENIZER = byte_tokenizer()
TEXTS = [
    "Once upon a time there was an engine that remembered very little, and was quick.",
    "Sie hielt ihren Zustand in einer Schachtel fester Größe — und bat nie um mehr.",
    "x" * 200,
]
PREFIXES = ["Once upon", "An engine", "1234", "é漢", "Hello, wor", "a"]
TASKS = {
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "greedy": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
}


def write_tasks(directory, documents):
    for name, task in TASKS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        fields = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        # JSON is YAML.
        config = {
            "task": f"lowkey_{name}",
            "test_split": "test",
            **fields,
            **task,
            "metadata": {"version": 1},
        }
        (directory / f"{name}.yaml").write_text(json.dumps(config))


def test_perplexity_and_greedy_flags(server, checkpoints, clients, tmp_path):
    greedy = [server.complete(prompt=p, max_tokens=8, temperature=0)["choices"][0]["text"] for p in PREFIXES]
    others = [text[:-1] + ("#" if text[-1] != "#" else "$") for text in greedy]
    documents = {
        "text": [{"text": text} for text in TEXTS],
        "greedy": [
            {"context": prefix, "target": text}
            for prefix, text in zip(PREFIXES * 2, [*greedy, *others], strict=True)
        ],
    }
    write_tasks(tmp_path, documents)
    found, samples = run_harness(
        clients,
        tmp_path,
        ["lowkey_text", "lowkey_greedy"],
        tmp_path,
        model="dense",
        url=server.url,
        tokenizer=checkpoints["dense"],
    )
    model = open_checkpoint(checkpoints["dense"]).load()
    # It puts the end of text before a text's first token.
    total = sum(float(logprobs(model, [0, *TOKENIZER.encode(text).ids])[0].sum()) for text in TEXTS)
    expected = math.exp(-total / sum(len(text.encode()) for text in TEXTS))
    assert found["lowkey_text"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-4)

    flags = []
    for sample in samples["lowkey_greedy"]:
        logprob, flag = sample["filtered_resps"][0]
        context, target = sample["doc"]["context"], sample["doc"]["target"]
        ids = TOKENIZER.encode(context + target).ids
        skip = len(TOKENIZER.encode(context).ids) - 1
        ours, likeliest = logprobs(model, ids)
        assert float(logprob) == pytest.approx(float(ours[skip:].sum()), rel=1e-4)
        assert (str(flag) == "True") == bool(likeliest[skip:].all()), sample["doc"]
        flags.append(str(flag) == "True")
    assert flags.count(True) == len(PREFIXES) and flags.count(False) == len(PREFIXES)
