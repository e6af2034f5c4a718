import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer

from kvbudget.errors import KVBudgetError
from kvbudget.eval.lm_eval import INSTALLED, KVBudgetLM
from tiny import tiny_model

needs_harness = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
TOKENIZER = byte_tokenizer()
CONTEXT = "Once upon a time there was a small town by the sea, and in that town there lived a clockmaker."


def model():
    return tiny_model("llama", vocab_size=VOCAB_SIZE)


def adapter(**options: object) -> KVBudgetLM:
    return KVBudgetLM(model(), TOKENIZER, **options)


def request(kind: str, *arguments: object):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def plain_scores(context: str, continuation: str) -> tuple[float, bool]:
    ids, wanted = TOKENIZER(context + continuation).input_ids, TOKENIZER(continuation).input_ids
    with torch.inference_mode():
        logits = model()(torch.tensor([ids[:-1]])).logits[0, -len(wanted) :]
    rows = logits.log_softmax(-1).gather(-1, torch.tensor(wanted)[:, None])
    return float(rows.sum()), logits.argmax(-1).tolist() == wanted


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_the_missing_package_is_named() -> None:
    with pytest.raises(KVBudgetError, match="pip install lm_eval"):
        adapter()


@needs_harness
def test_scores_of_the_full_cache_are_the_model_s() -> None:
    requests = [request("loglikelihood", CONTEXT, answer) for answer in (" He was old.", " no", " x")]
    for found, instance in zip(adapter().loglikelihood(requests), requests, strict=True):
        expected = plain_scores(*instance.args)
        assert found[0] == pytest.approx(expected[0], abs=1e-3)
        assert found[1] == expected[1]


@needs_harness
def test_greedy_answers_are_recognized() -> None:
    lm = adapter()
    (text,) = lm.generate_until([request("generate_until", CONTEXT, {"until": [], "max_gen_toks": 3})])
    with torch.inference_mode():
        ids = torch.tensor([TOKENIZER(CONTEXT).input_ids])
        expected = model().generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert text == TOKENIZER.decode(expected)
    (score,) = lm._loglikelihood_tokens([(("", ""), ids[0].tolist(), expected.tolist())])
    assert score[1] is True


@needs_harness
def test_the_budget_changes_the_scores() -> None:
    asked = [request("loglikelihood", CONTEXT, " He was old.")]
    full, cut = (adapter(**o).loglikelihood(asked)[0][0] for o in ({}, {"policy": "knorm", "budget": "30%"}))
    assert abs(full - cut) > 0.01


@needs_harness
def test_rolling_scores_cover_every_token() -> None:
    lm = adapter(rolling_step=7)
    (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", CONTEXT)])
    ids = [lm.prefix_token_id, *TOKENIZER(CONTEXT).input_ids]
    with torch.inference_mode():
        logits = model()(torch.tensor([ids[:-1]])).logits[0]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).sum()
    assert found == pytest.approx(float(expected), rel=1e-4)
    cut = adapter(policy="streaming_llm", budget=24, rolling_step=7)
    assert cut.loglikelihood_rolling([request("loglikelihood_rolling", CONTEXT)])[0] != pytest.approx(found, rel=1e-4)


@needs_harness
def test_long_contexts_lose_their_oldest_tokens() -> None:
    lm = adapter(max_length=32)
    (found,) = lm.loglikelihood([request("loglikelihood", CONTEXT, " old")])
    assert found[0] == pytest.approx(plain_scores(CONTEXT[-28:], " old")[0], abs=1e-3)


@needs_harness
def test_stop_texts_and_sampling() -> None:
    lm = adapter()
    (text,) = lm.generate_until([request("generate_until", CONTEXT, {"until": [], "max_gen_toks": 12})])
    stop = text[2:4]
    (cut,) = lm.generate_until([request("generate_until", CONTEXT, {"until": [stop], "max_gen_toks": 12})])
    assert cut == text[: text.index(stop)]
    with pytest.raises(KVBudgetError, match="greedily"):
        lm.generate_until([request("generate_until", CONTEXT, {"do_sample": True, "temperature": 0.7})])


@needs_harness
def test_the_harness_drives_the_adapter(tmp_path: object) -> None:
    """A multiple-choice task from a local file, through lm_eval's own evaluation loop."""
    import json

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [
        {"text": f"The {c} is", "choices": [" red", " blue", " green"], "gold": i % 3} for i, c in enumerate("abcdef")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "colors.yaml").write_text(
        "task: kvbudget_colors\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n',
        encoding="utf-8",
    )
    results = simple_evaluate(
        model=adapter(policy="knorm", budget=16),
        tasks=["kvbudget_colors"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    accuracy = results["results"]["kvbudget_colors"]["acc,none"]
    lm = adapter(policy="knorm", budget=16)
    right = 0
    for row in rows:
        scores = lm.loglikelihood([request("loglikelihood", row["text"], choice) for choice in row["choices"]])
        right += max(range(3), key=lambda i: scores[i][0]) == row["gold"]
    assert accuracy == pytest.approx(right / len(rows))
