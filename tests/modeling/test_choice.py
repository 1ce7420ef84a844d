"""What a model's runtime needs is imported beside other work."""

import sys
import threading
import types

import torch

from modeling.runtime import prepare

RULE = "modeling.runtime.gpu.fla_rule"


def test_what_a_gpu_needs_is_imported_in_a_thread(monkeypatch):
    begun = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: begun.append(thread))
    prepare(torch.device("cpu"))
    assert not begun
    prepare(torch.device("cuda"))
    (thread,) = begun
    monkeypatch.setitem(sys.modules, RULE, types.ModuleType(RULE))
    thread.run()


def test_where_it_is_missing_whoever_compiles_the_model_says_so(monkeypatch):
    begun = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: begun.append(thread))
    prepare(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, RULE, None)
    begun[0].run()  # raises nothing
