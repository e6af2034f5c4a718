import json

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer

from kvbudget import KVCache
from kvbudget.errors import KVBudgetError
from kvbudget.eval import metrics
from kvbudget.eval.external import LONGBENCH, Item, LongBench, LongBenchV2, Ruler, without_middle
from kvbudget.eval.generation import generate
from tiny import tiny_model

TOKENIZER = byte_tokenizer()
QA_ROW = {
    "context": "Passage 1: Rome is old.",
    "input": "Is Rome old?",
    "answers": ["yes", "it is"],
    "all_classes": None,
}


def test_qa_f1_counts_shared_words() -> None:
    assert metrics.qa_f1("The Eiffel Tower!", "eiffel tower") == 1.0
    assert metrics.qa_f1("red red blue", "red green") == pytest.approx(2 * 1 / 5)
    assert metrics.qa_f1("", "Rome") == 0.0


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # "a b d e" of "a b c d e" (5 words) and "a x b d e" (5 words)
    assert metrics.rouge_l("a b c d e", "a x b d e") == pytest.approx(2 * 4 / 10)
    assert metrics.rouge_l("c b a", "a b c") == pytest.approx(2 * 1 / 6)
    assert metrics.rouge_l("", "a") == 0.0


def test_classification_ignores_parts_of_the_right_name() -> None:
    classes = ["Number", "Number of people", "City"]
    assert metrics.classification("Number of people", "Number of people", classes) == 1.0
    assert metrics.classification("City", "Number", classes) == 0.0
    assert metrics.classification("City or Number", "Number", classes) == 0.5


def test_numbers_are_graded_by_share() -> None:
    assert metrics.retrieval("Paragraph 7", "Paragraph 7") == 1.0
    assert metrics.retrieval("Paragraph 17", "Paragraph 7") == 0.0
    assert metrics.count("5 or 6", "5") == 0.5
    assert metrics.count("none", "5") == 0.0


def test_code_is_compared_by_its_first_line() -> None:
    assert metrics.code_similarity("```python\n    return 1\nfoo()", "    return 1") == 1.0
    assert metrics.code_similarity("", "return 1") == 0.0
    assert 0.5 < metrics.code_similarity("return a + b", "return a - b") < 1.0


def test_choices_are_read_from_the_sentence() -> None:
    right = "The correct answer is (D)"
    assert metrics.choice("**The correct answer is (D)** because", right) == 1.0
    assert metrics.choice("The correct answer is D", right) == 1.0
    assert metrics.choice("The correct answer is Done", right) == 0.0
    assert metrics.choice("The correct answer is (C)", right) == 0.0
    assert metrics.choice("D", right) == 0.0


def test_every_part_of_longbench_names_a_metric() -> None:
    for part in LONGBENCH.values():
        assert callable(getattr(metrics, part.metric))
        assert part.ask.format(input="x")


def test_a_longbench_row_becomes_an_example() -> None:
    task = LongBench("hotpotqa")
    item = task.item(QA_ROW)
    example = task.example(TOKENIZER, item)
    assert QA_ROW["context"] in TOKENIZER.decode(example.context)
    question = TOKENIZER.decode(example.probes[0].question)
    assert "Is Rome old?" in question and question.rstrip().endswith("Answer:")
    assert "Is Rome old?" not in TOKENIZER.decode(example.context)
    assert TOKENIZER.decode(example.probes[0].answer) == "yes"
    assert item.grade("It is.") == 1.0  # the best of the references
    assert item.grade("no") == 0.0


def test_few_shot_parts_grade_the_first_line_only() -> None:
    row = {
        "context": "Question: a\nType: City",
        "input": "Question: b\nType:",
        "answers": ["City"],
        "all_classes": ["City", "Food"],
    }
    item = LongBench("trec").item(row)
    assert item.grade("\n City\nQuestion: c\nType: Food") == 1.0
    assert item.grade("Food\nCity") == 0.0


def test_a_longbench_v2_row_becomes_an_example() -> None:
    row = {"context": "A text.", "question": " Which? ", "answer": "C"} | {f"choice_{c}": f"{c}-text" for c in "ABCD"}
    item = LongBenchV2().item(row)
    assert all(f"({c}) {c}-text" in item.question for c in "ABCD")
    assert item.grade("The correct answer is (C)") == 1.0
    assert item.grade("The correct answer is (A)") == 0.0


def test_a_ruler_row_becomes_an_example() -> None:
    row = {
        "context": "Hay. One number is 123. Hay.",
        "question": "Which number?",
        "answer_prefix": " The number is",
        "answer": ["123", "456"],
        "task": "niah_multivalue",
        "max_new_tokens": 64,
    }
    item = Ruler("niah_multivalue").item(row)
    example = Ruler("niah_multivalue").example(TOKENIZER, item)
    assert TOKENIZER.decode(example.context) == row["context"]
    assert TOKENIZER.decode(example.probes[0].question).strip() == "Which number? The number is"
    assert item.grade("123, and no other") == 0.5
    assert Ruler("qa_1").item(row | {"task": "qa_1"}).grade("123, and no other") == 1.0


def test_long_contexts_lose_their_middle() -> None:
    assert without_middle(torch.arange(10), 5).tolist() == [0, 1, 7, 8, 9]
    assert without_middle(torch.arange(4), 5).tolist() == [0, 1, 2, 3]
    task = LongBench("lcc", length=64)
    example = task.example(TOKENIZER, Item("x" * 500, "Next line of code:\n", ["return"], "code_similarity", 8))
    assert len(example.context) == 64


def test_rows_are_read_from_a_file_and_answered(tmp_path: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(QA_ROW | {"context": f"Passage {i}."}) + "\n" for i in range(5)), encoding="utf-8"
    )
    task = LongBench("hotpotqa", rows=str(path))
    examples = task.examples(TOKENIZER, 3, seed=1)
    assert [e.context.tolist() for e in examples] == [e.context.tolist() for e in task.examples(TOKENIZER, 3, seed=1)]
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    cache = KVCache(model)
    with torch.inference_mode():
        model(examples[0].context[None], past_key_values=cache)
    outcome = task.ask(model, TOKENIZER, cache, examples[0].probes[0])
    assert 0.0 <= outcome.scores["grade"] <= 1.0
    assert cache.get_seq_length() == len(examples[0].context)
    with pytest.raises(KVBudgetError, match="5 rows, 6"):
        task.examples(TOKENIZER, 6)


def test_generation_equals_transformers_greedy() -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    ids = torch.randint(1, 256, (1, 40), generator=torch.Generator().manual_seed(2))
    cache = KVCache(model)
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 40:]
        model(ids[:, :35], past_key_values=cache)
    text = generate(model, TOKENIZER, cache, ids[0, 35:], 12)
    assert text == TOKENIZER.decode(expected, skip_special_tokens=True)
    assert len(text) > 4
    assert generate(model, TOKENIZER, cache, ids[0, 35:], 12, stop=(text[3],)) == text[: text.index(text[3])]


def test_unknown_subsets_and_missing_packages_are_named() -> None:
    with pytest.raises(KVBudgetError, match="did you mean 'hotpotqa'"):
        LongBench("hotpot").item(QA_ROW)
