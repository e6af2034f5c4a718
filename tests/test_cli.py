"""The command line: what it prints, on which stream, with which exit code, for good and bad input."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvbudget import KVCache, __version__, generate, load
from kvbudget.cli import app, show
from kvbudget.cli.methods import examples
from kvbudget.methods import registry
from tiny import VOCAB_SIZE, tiny_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </turn> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# The command's module, which the package's attribute of the same name (the command itself) hides.
run_command = importlib.import_module("kvbudget.cli.run")
RUNNER = CliRunner()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: w4 to w127, everything else is unknown."""
    special = ["<pad>", "<unk>", "<system>", "<user>", "<assistant>", "</turn>"]
    words = special + [f"w{i}" for i in range(len(special), VOCAB_SIZE)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """A tiny random model with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompt_file(tmp_path) -> str:
    """A text of 300 words that the tiny tokenizer knows."""
    draw = torch.randint(6, VOCAB_SIZE, (300,), generator=torch.Generator().manual_seed(3))
    path = tmp_path / "long.txt"
    path.write_text(" ".join(f"w{i}" for i in draw.tolist()))
    return str(path)


def invoke(*arguments: str):
    """The result of a command line that must not end in a traceback."""
    result = RUNNER.invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: str) -> str:
    """The one line on stderr of a command line that is refused."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_help_teaches_with_examples():
    bare, asked = invoke(), invoke("--help")
    assert bare.exit_code == asked.exit_code == 0
    for output in (bare.stdout, asked.stdout):
        assert "kvbudget run --model" in output
    for command in ("run", "plan", "methods", "info", "calibrate", "demo"):
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert f"$ kvbudget {command}" in result.stdout
    assert invoke("--version").stdout == f"kvbudget {__version__}\n"


def test_methods_lists_every_recipe_with_its_paper():
    output = invoke("methods").stdout
    for name, kind in registry().items():
        assert name in output
        number = re.search(r"\d{4}\.\d{5}", kind.paper)
        assert number is None or number[0] in output


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_method_explains_itself(name):
    kind = registry()[name]
    output = " ".join(invoke("methods", name).stdout.split())
    about = json.loads(invoke("methods", name, "--json").stdout)
    assert about["summary"].endswith(".")
    defaults = {field.name: field.default for field in fields(kind) if field.repr}
    assert [parameter["name"] for parameter in about["parameters"]] == list(defaults)
    for parameter in about["parameters"]:
        assert parameter["name"] in output
        assert parameter["meaning"], f"{name} does not document {parameter['name']}"
        assert repr(defaults[parameter["name"]]) in output
    assert f"--policy {name}" in output
    assert about["prefill_peak"] == kind.prefill_peak


@pytest.mark.parametrize("name", sorted(name for name, kind in registry().items() if "calibration" not in kind.needs))
def test_the_example_of_every_method_works(name):
    (line,) = (line for line in examples(registry()[name]) if "KVCache" in line)
    policy, budget = re.search(r'policy="(.*?)", budget="(.*?)"', line).groups()
    cache = KVCache(tiny_model("llama"), policy, budget)
    assert name in cache.policy.names


def test_methods_accepts_aliases_and_refuses_unknown_names():
    assert "pyramidkv" in invoke("methods", "pyramid").stdout
    assert "did you mean 'snapkv'?" in refused("methods", "snapkw")


def test_info_says_what_it_runs_on():
    facts = json.loads(invoke("info", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert facts["kernels"].split()[0] in ("native", "reference")
    plain = invoke("info").stdout
    assert all(name in plain for name in facts)


def test_plan_prices_a_model_from_its_configuration(model_folder):
    arguments = ("plan", "--model", model_folder, "--context", "4096", "--memory", "512KiB", "--budget", "25%")
    data = json.loads(invoke(*arguments, "--json").stdout)
    assert data["full_bytes"] == 2 * 2 * 2 * 16 * 4 * 4096  # layers, K and V, heads, dimensions, bytes, tokens
    assert [p["budget"] for p in data["purchases"]] == ["25%"] * 4 + ["512KiB"] * 4
    table = invoke(*arguments).stdout
    assert "1,024 (25%)" in table and "2.0 MiB" in table and "fits" in table
    alone = invoke("plan", "--model", str(Path(model_folder) / "config.json"), "--context", "4096", "--budget", "25%")
    assert "1,024 (25%)" in alone.stdout


def test_plan_says_why_a_budget_cannot_work(model_folder):
    output = invoke("plan", "--model", model_folder, "--context", "4096", "--budget", "12").stdout
    assert "give at least 33 tokens" in " ".join(output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plann",), "Did you mean 'plan'?"),
        (("plan", "--model", "{model}"), "Missing option"),
        (("plan", "--model", "{model}", "--context", "many"), "--context"),
        (("plan", "--model", "{model}", "--context", "0"), "must be from 1 to"),
        (("plan", "--model", "{model}", "--context", "9" * 20), "context 99999999999999999999 and batch 1 must be"),
        (("plan", "--model", "{model}", "--context", "9", "--tensor-parallel", "9999", "--budget", "50%"), "to 64"),
        (("plan", "--model", "{model}", "--context", "9", "--tensor-parallel", "2", "--texts", "0"), "'--texts'"),
        (("plan", "--model", "{model}", "--context", "9", "--dtype", "float23"), "did you mean 'float32'?"),
        (("plan", "--model", "{model}", "--context", "9", "--memory", "50%"), "must be bytes"),
        (("plan", "--model", "/nowhere/at/all", "--context", "9"), "no file or folder"),
        (("plan", "--model", "{broken}", "--context", "9"), "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, model_folder, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no gguf file")
    places = {"{model}": model_folder, "{broken}": str(broken)}
    assert message in refused(*(places.get(argument, argument) for argument in arguments))


def run_lines(model_folder: str, prompt_file: str, *more: str) -> tuple[str, ...]:
    return ("run", "--model", model_folder, "--prompt-file", prompt_file, "--max-new-tokens", "6", *more)


def test_run_streams_the_answer_and_ends_with_what_it_cost(model_folder, prompt_file):
    result = invoke(
        *run_lines(model_folder, prompt_file, "--policy", "snapkv", "--budget", "64", "--question", "w9 w10")
    )
    assert result.exit_code == 0
    answer, table = result.stdout.split("\n", 1)
    assert len(answer.split()) == 6
    expected = generate(
        *load(model_folder),
        Path(prompt_file).read_text(),
        policy="snapkv",
        budget=64,
        question="w9 w10",
        question_visible=True,
        max_new_tokens=6,
    )
    assert answer.split() == expected.text.split()
    for row in (
        "prompt tokens",
        "kept entries",
        "cache, steady",
        "cache, peak",
        "full cache needs",
        "prefill",
        "decode",
    ):
        assert row in table
    assert f"{expected.prompt_tokens}" in table and f"{expected.report.kept_entries:,}" in table


def test_json_is_alone_on_stdout(model_folder, prompt_file):
    result = invoke(*run_lines(model_folder, prompt_file, "--policy", "snapkv", "--budget", "32KiB", "--json"))
    data = json.loads(result.stdout)
    (run,) = data["runs"]
    assert data["interrupted"] is False
    assert run["new_tokens"] == len(run["answer"].split()) == 6
    assert run["report"]["nbytes"] <= 32 * 1024 < run["report"]["full_bytes"]
    assert run["decode_tokens_per_second"] > 0
    assert "fidelity" not in run


def test_compare_measures_the_distance_from_the_full_cache(model_folder, prompt_file):
    arguments = run_lines(model_folder, prompt_file, "--policy", "streaming_llm", "--compare", "full")
    full, cut = json.loads(invoke(*arguments, "--budget", "40", "--json").stdout)["runs"]
    assert full["policy"] == "full" and "fidelity" not in full
    assert cut["fidelity"]["tokens"] == full["new_tokens"]
    assert cut["fidelity"]["kl_mean"] > 1e-3
    _, same = json.loads(invoke(*arguments, "--budget", "1000", "--json").stdout)["runs"]
    assert same["fidelity"]["kl_mean"] < 1e-6 and same["fidelity"]["top1_agreement"] == 1.0
    assert same["answer"] == full["answer"]
    table = invoke(*arguments, "--budget", "40").stdout
    assert "top-1 agreement" in table and "mean KL" in table and f"{cut['fidelity']['kl_mean']:.4f}" in table


def test_the_question_is_seen_unless_it_is_hidden(model_folder, prompt_file):
    arguments = run_lines(
        model_folder, prompt_file, "--policy", "snapkv", "--budget", "64", "--question", "w9", "--json"
    )
    assert json.loads(invoke(*arguments).stdout)["runs"][0]["report"]["question_visible"] is True
    hidden = invoke(*arguments, "--question-hidden")
    assert json.loads(hidden.stdout)["runs"][0]["report"]["question_visible"] is False


def test_protected_spans_stay(model_folder, prompt_file, monkeypatch):
    caches = []
    original = run_command.generate
    monkeypatch.setattr(run_command, "generate", lambda *a, **k: caches.append(original(*a, **k)) or caches[-1])
    base = run_lines(model_folder, prompt_file, "--policy", "streaming_llm(sinks=0)", "--budget", "60", "--json")
    assert invoke(*base, "--protect", "100:110", "--protect", "20:22").exit_code == 0
    assert invoke(*base, "--system", "w7 w8 w9", "--protect", "system").exit_code == 0
    for generation, expected in zip(caches, ([*range(20, 22), *range(100, 110)], [0, 1, 2]), strict=True):
        for store in generation.cache.enforcer.layers:
            held = set(torch.cat([segment.positions().flatten() for segment in store.main]).tolist())
            assert held >= set(expected)
            assert 60 not in held


def test_sampling_repeats_with_its_seed(model_folder, prompt_file):
    base = run_lines(model_folder, prompt_file, "--policy", "full", "--temperature", "2", "--json")
    answers = [json.loads(invoke(*base, "--seed", seed).stdout)["runs"][0]["answer"] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


def test_a_prompt_can_come_from_stdin(model_folder):
    arguments = ("run", "--model", model_folder, "--prompt-file", "-", "--policy", "full", "-n", "3", "--json")
    result = RUNNER.invoke(app, list(arguments), input="w9 w10 w11")
    assert json.loads(result.stdout)["runs"][0]["prompt_tokens"] == 6  # with the user's turn around it


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupt_prints_what_there_is(stop_after, model_folder, prompt_file, monkeypatch):
    pieces = []

    def interrupting(text: str) -> None:
        print(text, end="")
        pieces.append(text)
        if len(pieces) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_command, "print_piece", interrupting)
    result = invoke(*run_lines(model_folder, prompt_file, "--policy", "snapkv", "--budget", "64"))
    assert result.exit_code == 130
    assert "".join(pieces) in result.stdout and "kept entries" in result.stdout
    assert result.stderr.count("\n") == 1 and "not complete" in result.stderr


def test_an_interrupted_prefill_says_how_far_it_came(model_folder, prompt_file, monkeypatch):
    def interrupting(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if done > 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(show.Prefilling, "__call__", interrupting)
    arguments = run_lines(
        model_folder, prompt_file, "--policy", "snapkv", "--budget", "64", "--chunk-size", "64", "--json"
    )
    result = invoke(*arguments)
    assert result.exit_code == 130
    assert re.search(r"interrupted in the prefill, after 1\d\d of 30\d tokens", result.stderr)
    assert json.loads(result.stdout) == {"interrupted": True, "runs": []}


def test_long_prompts_are_refused_unless_allowed(model_folder, tmp_path):
    path = tmp_path / "longer.txt"
    path.write_text("w9 " * 1100)
    arguments = run_lines(model_folder, str(path), "--policy", "streaming_llm", "--budget", "64", "--json")
    assert "exceed the model's 1024 positions" in refused(*arguments)
    result = invoke(*arguments, "--allow-long")
    assert result.exit_code == 0 and json.loads(result.stdout)["runs"][0]["prompt_tokens"] > 1100
    assert result.stderr.startswith("warning: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--policy", "snapkw", "--budget", "64"), "did you mean 'snapkv'?"),
        (("--policy", "snapkv(windo=3)", "--budget", "64"), "did you mean 'window'?"),
        (("--policy", "snapkv", "--budget", "16 mibs"), "unknown unit 'mibs'"),
        (("--policy", "snapkv", "--budget", "12"), "give at least 33 tokens"),
        (("--policy", "snapkv", "--budget", "1KiB"), "give at least"),
        (("--policy", "snapkv"), "needs a budget"),
        (("--policy", "kivi", "--budget", "64"), "add an evicting method"),
        (("--policy", "kvzip", "--budget", "64KiB"), "whole prompt"),
        (("--policy", "kvsharer"), "needs a calibration for this model; run: kvbudget calibrate kvsharer --model /"),
        (("--prompt", "both"), "either --prompt TEXT or --prompt-file FILE"),
        (("--protect", "5-9"), "neither a role"),
        (("--protect", "9:5", "--policy", "snapkv", "--budget", "64"), "start < end"),
        (("--protect", "system", "--policy", "snapkv", "--budget", "64"), "no message of this role"),
        (("--compare", "ful"), "did you mean 'full'?"),
        (("--compare", "full", "--temperature", "1", "--policy", "snapkv", "--budget", "64"), "greedy"),
        (("--max-new-tokens", "0"), "at least 1"),
        (("--dtype", "float23"), "float32, bfloat16, float16"),
        (("--chunk-size", "0", "--policy", "snapkv", "--budget", "64"), "at least 1"),
        (("--question", " "), "question is empty"),
        (("--temperature", "1e-300"), "give 0 (greedy) or at least 0.001"),
        (("--temperature", "1", "--seed", "9" * 20), "'--seed'"),
    ],
)
def test_run_refuses_bad_input_in_one_line(more, message, model_folder, prompt_file):
    assert message in refused(*run_lines(model_folder, prompt_file, *more))


def test_run_refuses_missing_and_empty_files(model_folder, tmp_path):
    empty, binary, broken = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "broken.gguf"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\xff")
    broken.write_bytes(b"GGUF junk")
    base = ("run", "--model", model_folder, "--prompt-file")
    assert "empty" in refused(*base, str(empty))
    assert "UTF-8" in refused(*base, str(binary))
    assert "No such file" in refused(*base, str(tmp_path / "none.txt"))
    assert "empty" in refused("run", "--model", model_folder, "--prompt", "")
    assert "cannot be read" in refused("run", "--model", str(broken), "--prompt", "w9")
    assert "no file or folder" in refused("run", "--model", str(tmp_path / "no" / "model"), "--prompt", "w9")
    assert "device 'gpu' cannot be used" in refused("run", "--device", "gpu", "--model", model_folder, "--prompt", "w9")
    text = ("bench", "--model", model_folder, "--task", "fidelity", "--results")
    assert "give another path" in refused(*text, str(broken / "config.json" / "r.jsonl"))
    assert "no cell could be measured: text source" in refused(*text, str(tmp_path / "r.jsonl"), "--text", "no text")


def test_files_that_hold_something_else_are_refused_and_stay_as_they_are(model_folder, tmp_path):
    path = tmp_path / "mine.jsonl"
    commands = (
        (*(f"bench --model {model_folder} --task fidelity --no-report --results".split()), str(path)),
        ("report", str(path)),
    )
    for text in (
        "hello\n",
        '{"a": 1}\n',
        '{"key": "x", "error": null}\n',
        '{"key": "x", "weights": [], "value": 1.0}\n',
    ):
        path.write_text(text)
        for command in commands:
            assert "line 1 of" in refused(*command) and path.read_text() == text
    tune = ("tune", "--model", model_folder, "--task", "fidelity", "--output")
    assert "is a folder" in refused(*tune, str(tmp_path), "--budget", "25%")
    output = str(tmp_path / "mine.yaml")
    assert "nothing to share out" in refused(*tune, output, "--budget", "25%", "--policy", "full")
    assert "nothing to share out" in refused(*tune, output, "--budget", "full")


def test_what_a_failed_cell_advises_is_for_the_model_at_hand(model_folder, prompt_file, tmp_path):
    command = (
        f"bench --no-report --task fidelity --policy razor_attention --count 1 --length 100 --model {model_folder}"
    )
    result = invoke(*command.split(), "--text", prompt_file, "--results", str(tmp_path / "r.jsonl"))
    assert f"run: kvbudget calibrate razor_attention --model {model_folder}" in result.stderr


def test_calibrate_refuses_what_it_does_not_know(model_folder):
    assert "no calibration for 'snapkw'" in refused("calibrate", "snapkw", "--model", model_folder)
    assert "snapkv needs no calibration" in refused("calibrate", "snapkv", "--model", model_folder)
    assert "count=0 must be" in refused("calibrate", "qfilters(count=0)", "--model", model_folder)
    both = ("calibrate", "qfilters+chai", "--model", model_folder, "--output", "one.safetensors")
    assert "leave out --output" in refused(*both)


def test_calibrate_reads_texts_and_the_method_finds_what_it_wrote(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{9 + i * 7 % 90}" for i in range(400)))
    fit = ("calibrate", "qfilters(count=2, length=60)", "--model", model_folder)
    result = invoke(*fit, "--text", str(text))
    assert result.exit_code == 0 and "2 texts of 60 tokens" in result.stderr
    assert Path(result.stdout.strip()).is_file()
    again = invoke(
        "calibrate", "qfilters(count=2, length=60)+chai(count=1, length=60)", *fit[2:], "--text", str(text), "--missing"
    )
    assert again.exit_code == 0 and "qfilters is there" in again.stderr and "chai" in Path(again.stdout.strip()).name
    run = ("run", "--model", model_folder, "--prompt", "w9 w12 w15", "--policy", "qfilters", "--budget", "64")
    done = invoke(*run, "--max-new-tokens", "2")
    assert done.exit_code == 0, done.stderr
    assert "has text for" in refused("calibrate", "qfilters(count=9, length=60)", *fit[2:], "--text", str(text))
    assert "reads no texts" in refused("calibrate", "razor_attention", *fit[2:], "--text", str(text))


def test_demo_compares_the_full_cache_with_budgets(model_folder, prompt_file):
    arguments = ("demo", "--model", model_folder, "--text", prompt_file, "--length", "150", "--new-tokens", "5")
    result = invoke(*arguments, "--setting", "streaming_llm@25%", "--setting", "snapkv@64KiB")
    assert result.exit_code == 0
    for row in ("streaming_llm", "64KiB", "pass key", "missed", "mean KL"):
        assert row in result.stdout
    data = json.loads(invoke(*arguments, "--setting", "streaming_llm@25%", "--json").stdout)
    assert [run["new_tokens"] for run in data["runs"]] == [5, 5]
    assert all(run["found"] == (data["key"] in run["answer"]) for run in data["runs"])
    assert "POLICY@BUDGET" in refused(*arguments, "--setting", "snapkv")


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_answers_from_a_quarter_of_its_cache():
    arguments = ("demo", "--length", "512", "--new-tokens", "8", "--setting", "snapkv(kernel=15)@25%", "--json")
    data = json.loads(invoke(*arguments, "--text", "prose").stdout)
    full, cut = data["runs"]
    assert full["found"] and cut["found"]
    assert cut["report"]["nbytes"] < 0.3 * full["report"]["nbytes"]
    assert cut["fidelity"]["kl_mean"] < 1.0


def test_a_saved_cache_answers_other_questions(model_folder, prompt_file, tmp_path):
    run = ("run", "--model", model_folder, "-f", prompt_file, "--question-hidden", "-n", "6", "--json")
    kept = str(tmp_path / "long.kv")
    plain = invoke(*run, "--question", "w9 w8", "--policy", "full")
    first = invoke(*run, "--question", "w7", "--policy", "full", "--save", kept)
    assert first.exit_code == 0 and f"bytes to {kept}" in first.stderr
    loaded = invoke(*run, "--question", "w9 w8", "--load", kept)
    assert loaded.exit_code == 0
    one, other = (json.loads(result.stdout)["runs"][0] for result in (plain, loaded))
    assert one["answer"] == other["answer"] and one["answer"]
    assert "a cache brings its own policy" in refused(*run, "--question", "w9", "--load", kept, "--budget", "50%")
    assert "not a saved cache" in refused(*run, "--question", "w9", "--load", prompt_file)
    assert "leave out --save" in refused(*run, "--question", "w9", "--load", kept, "--compare", "full")
