"""The comparison with the peers: its protocol, its verdicts and its table, without the peers' environment."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer

from kvbudget.errors import KVBudgetError
from kvbudget.eval.tasks import parse
from kvbudget.files import insert
from tiny import tiny_model

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "peers" / "compare.py"
STUB = """
import json, sys
import numpy as np
for line in sys.stdin:
    request = json.loads(line)
    if "open" in request:
        answer = {"versions": {"stub": "1"}}
    elif "context" in request:
        answer, size = {}, len(request["context"])
    elif request["ratio"] > 0.9:
        answer = {"error": "ValueError: nothing is left"}
    else:
        rows = sum(len(answer) - skip for _, answer, skip in request["probes"])
        np.zeros((rows, VOCAB), np.float32).tofile(request["file"])
        answer = {"kept_share": 1 - request["ratio"], "nbytes": size, "seconds": 0.1}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers_compare", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_both_sides_are_scored_on_the_same_probes(peers, tmp_path):
    (tmp_path / "worker.py").write_text(STUB.replace("VOCAB", str(VOCAB_SIZE)))
    peer = peers.Peer(sys.executable, "nowhere", tmp_path / "worker.py")
    assert peer.versions == {"stub": "1"}
    task = parse("fidelity(length=120, tokens=12, text='prose')")
    (example,) = task.examples(byte_tokenizer(), 1)
    context = peers.Context(tiny_model("llama", vocab_size=VOCAB_SIZE), byte_tokenizer(), task, example, peer)
    found = context.run(peers.PAIRS["knorm"], "25%")
    assert found["ours"]["kept_share"] == pytest.approx(0.25, abs=0.01)
    assert found["theirs"]["kept_share"] == pytest.approx(0.75 - 0.5, abs=0.01) and found["theirs"]["nbytes"] == 120
    # The stub knows nothing, so its distribution is uniform and its distance from the full cache that of a uniform one.
    rows = torch.cat([reading.logits for reading in context.full]).log_softmax(-1)
    expected = (rows.exp() * rows).sum(-1).view(2, -1).mean(1) + torch.tensor(float(VOCAB_SIZE)).log()
    assert found["theirs"]["kl_mean"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert context.run(peers.PAIRS["full"], "full")["ours"]["kl_mean"] <= 1e-6
    with pytest.raises(RuntimeError, match="nothing is left"):
        context.run(peers.PAIRS["knorm"], "5%")
    peer.process.stdin.close()
    peer.process.wait(timeout=30)
    peer.process.stdout.close()


def test_verdicts(peers):
    assert peers._verdict([0.1, 0.2, 0.3], [0.1001, 0.2, 0.3], "lower") == "the same"
    assert peers._verdict([0.1, 0.2, 0.3], [0.5, 0.7, 0.6], "lower") == "better"
    assert peers._verdict([0.1, 0.2, 0.3], [0.5, 0.7, 0.6], "higher") == "worse"
    assert peers._verdict([0.1, 0.9, 0.3], [0.5, 0.2, 0.6], "lower") == "cannot tell"


def test_the_table_goes_between_the_marks(peers, tmp_path):
    side = {"log_kl": -2.302585, "kept_share": 0.25, "nbytes": 2**20}
    lines = [
        {"task": "fidelity", "example": n, "method": "snapkv", "budget": "25%", "ours": side, "theirs": side}
        | {"versions": {"kvpress": "0.5"}}
        for n in range(3)
    ]
    text = peers.table(lines, "the command")
    assert "| snapkv | 25% | 0.1 [0.1, 0.1] | 0.1 [0.1, 0.1] | the same | 25.0% / 25.0% | 1.0 MiB / 1.0 MiB |" in text
    assert "3 contexts" in text and "Measured by `the command`; peers: kvpress 0.5." in text
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peers -->\nold\n<!-- /peers -->\nafter\n")
    insert(page, "peers", text)
    assert page.read_text() == f"before\n<!-- peers -->\n{text}\n<!-- /peers -->\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(KVBudgetError, match="has no <!-- peers -->"):
        insert(page, "peers", text)
