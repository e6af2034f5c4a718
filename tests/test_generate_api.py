"""kvbudget.generate: prompts, questions, protection, streaming, interrupts and turns on a tiny model that reads ASCII."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, TextStreamer

import kvbudget
from kvbudget.cache import KVCache
from kvbudget.errors import CacheError, KVBudgetError
from tiny import VOCAB_SIZE, tiny_model

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Control characters, which a template cannot carry unharmed, are not generated where a text is read again.
PRINTABLE = {"suppress_tokens": [*range(32), 127]}
WORDS = {"suppress_tokens": [i for i in range(VOCAB_SIZE) if chr(i) not in "abcd "]}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def tokenizer():
    """One token per ASCII character, its id the character's code."""
    tokens = Tokenizer(models.BPE({chr(i): i for i in range(VOCAB_SIZE)}, merges=[]))
    tokens.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=CHAT)


def stock(model, tokenizer, text, **options):
    model.set_attn_implementation("sdpa")
    ids = tokenizer(text, return_tensors="pt").input_ids
    return model.generate(ids, do_sample=False, **options)[0, ids.shape[1] :].tolist()


def test_a_prompt_becomes_a_users_message(model, tokenizer):
    answer = kvbudget.generate(model, tokenizer, "hello there", policy="full", max_new_tokens=20)
    expected = stock(model, tokenizer, "<user>hello there\n<assistant>", max_new_tokens=20)
    assert list(answer.token_ids) == expected
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.prompt_tokens == len("<user>hello there\n<assistant>")
    assert answer.report.seen == [answer.prompt_tokens + 19] and answer.report.policy == "full"
    assert answer.prefill_seconds > 0 and answer.decode_seconds > 0 and not answer.interrupted
    assert answer.decode_tokens_per_second == pytest.approx(19 / answer.decode_seconds)


def test_without_the_template_the_text_is_continued(model, tokenizer):
    expected = stock(model, tokenizer, "hello there", max_new_tokens=10)
    assert list(kvbudget.generate(model, tokenizer, "hello there", chat=False, max_new_tokens=10).token_ids) == expected
    tokenizer.chat_template = None
    assert list(kvbudget.generate(model, tokenizer, "hello there", max_new_tokens=10).token_ids) == expected


def test_a_prompt_of_one_token_is_left_to_the_decoding(model, tokenizer):
    for policy in ("full", "kvzip"):
        answer = kvbudget.generate(
            model, tokenizer, "a", policy=policy, budget=None if policy == "full" else 50, chat=False, max_new_tokens=5
        )
        assert list(answer.token_ids) == stock(model, tokenizer, "a", max_new_tokens=5)


CONTEXT = "the quick brown fox jumps over the lazy dog. " * 5


@pytest.mark.parametrize("prompt", [CONTEXT, [{"role": "user", "content": CONTEXT}]], ids=["text", "messages"])
def test_a_hidden_question_has_no_say_in_the_compression(model, tokenizer, prompt):
    fed = {}
    for question in ("who jumps?", "over what?"):
        log = []
        answer = kvbudget.generate(
            model, tokenizer, prompt, question=question, policy="snapkv(window=8)", budget=60, max_new_tokens=5,
            progress=lambda done, total, log=log: log.append(total),
        )  # fmt: skip
        fed[question] = log[-1]
        assert answer.report.question_visible is False
        assert answer.prompt_tokens == len(f"<user>{CONTEXT}\n\n{question}\n<assistant>")
    # The line break that follows the context in every rendering is known too.
    assert set(fed.values()) == {len(f"<user>{CONTEXT}\n")}


def test_a_visible_question_is_part_of_what_is_compressed(model, tokenizer):
    log = []
    answer = kvbudget.generate(
        model, tokenizer, CONTEXT, question="who?", question_visible=True, policy="snapkv(window=8)", budget=60,
        max_new_tokens=5, progress=lambda done, total: log.append(total),
    )  # fmt: skip
    assert answer.report.question_visible is True
    assert log[-1] == answer.prompt_tokens - 1, "the last token is left to generate()"


def test_what_was_evicted_before_the_question_came_did_not_see_it(model, tokenizer):
    """A visible question at the end of a text that is compressed chunk by chunk is honestly called hidden."""
    options = {"question": "who?", "question_visible": True, "policy": "snapkv(window=8)", "max_new_tokens": 3}
    small = kvbudget.generate(model, tokenizer, CONTEXT, budget="24KiB", chunk_size=80, **options)
    large = kvbudget.generate(model, tokenizer, CONTEXT, budget="1MiB", chunk_size=80, **options)
    assert small.report.question_visible is False and large.report.question_visible is True


def test_a_question_after_an_answer_is_a_message_of_its_own(model, tokenizer):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    answer = kvbudget.generate(model, tokenizer, messages, question="three", policy="full", max_new_tokens=8)
    expected = stock(model, tokenizer, "<user>one\n<assistant>two\n<user>three\n<assistant>", max_new_tokens=8)
    assert list(answer.token_ids) == expected


def test_auto_reconstructs_for_a_hidden_question_and_says_why(model, tokenizer, caplog):
    caplog.set_level("INFO", "kvbudget")
    answer = kvbudget.generate(model, tokenizer, CONTEXT * 2, question="who?", budget="30%", max_new_tokens=3)
    assert answer.report.policy == "kvzip" and "question is unknown" in answer.report.reason
    assert answer.report.reason in caplog.text
    assert kvbudget.generate(model, tokenizer, "hello", max_new_tokens=2).report.policy == "full"
    visible = kvbudget.generate(
        model, tokenizer, CONTEXT * 2, question="who?", question_visible=True, budget="30%", max_new_tokens=3
    )
    # Which one is a matter of measurements (`auto_table.json`); it needs no plan, and the reason names the question.
    assert visible.report.policy not in ("kvzip", "full") and "question is visible" in visible.report.reason


def test_the_system_message_is_protected(model, tokenizer):
    system = "Answer in verse!7 "
    messages = [{"role": "system", "content": system}, {"role": "user", "content": CONTEXT}]
    answer = kvbudget.generate(
        model, tokenizer, messages, protect="system", policy="knorm", budget=40, max_new_tokens=20
    )
    end = len("<system>" + system)
    for store in answer.cache.enforcer.layers:
        for row in range(store.num_kv_heads):
            held = torch.cat([segment.meta.row("position", row) for segment in store.main]).tolist()
            assert held[:end] == list(range(end)) and len(held) <= 40


@pytest.mark.parametrize("role, texts", [("assistant", ["two", "four"]), ("user", ["one", "three"])])
def test_roles_in_the_middle_are_found(model, tokenizer, role, texts):
    words = ["one", "two", "three", "four"]
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]
    answer = kvbudget.generate(model, tokenizer, messages, protect=role, policy="knorm", budget=50, max_new_tokens=1)
    rendered = "<user>one\n<assistant>two\n<user>three\n<assistant>four\n<assistant>"
    spans = [rendered[start:end] for start, end in answer.cache.enforcer.spans]
    expected = ["<user>one", "three"] if role == "user" else texts
    assert spans == expected


def test_positions_can_be_protected(model, tokenizer):
    answer = kvbudget.generate(
        model, tokenizer, CONTEXT, protect=[(50, 60)], policy="knorm", budget=40, max_new_tokens=3
    )
    assert answer.cache.enforcer.spans == [(50, 60)]


def test_streaming_gives_the_text_piece_by_piece(model, tokenizer, capsys):
    options = {"policy": "full", "max_new_tokens": 30, "do_sample": True, "temperature": 9.0, "seed": 0, **WORDS}
    pieces = []
    answer = kvbudget.generate(model, tokenizer, "hello", stream=pieces.append, **options)
    assert "".join(pieces) == answer.text and len(pieces) > 1
    kvbudget.generate(model, tokenizer, "hello", stream=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out == answer.text + "\n"


def test_an_interrupt_returns_the_answer_so_far(model, tokenizer):
    whole = kvbudget.generate(model, tokenizer, "hello", policy="snapkv", budget=60, max_new_tokens=40)
    ended = []

    class Impatient(TextStreamer):
        tokens = 0

        def put(self, value):
            self.tokens += 1
            if self.tokens == 9:  # the prompt and eight tokens
                raise KeyboardInterrupt

        def end(self):
            ended.append(True)

    answer = kvbudget.generate(
        model, tokenizer, "hello", policy="snapkv", budget=60, max_new_tokens=40, stream=Impatient(tokenizer)
    )
    assert answer.interrupted and ended == [True]
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)] and len(answer.token_ids) in (7, 8)
    assert answer.text == tokenizer.decode(answer.token_ids) and "snapkv" in str(answer.report)


def test_an_interrupt_before_the_first_token_returns_an_empty_answer(model, tokenizer):
    def stop(module, inputs, kwargs):
        if (kwargs.get("input_ids") if inputs == () else inputs[0]).shape[1] == 1:
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(stop, with_kwargs=True)
    answer = kvbudget.generate(model, tokenizer, "hello", policy="full", max_new_tokens=5)
    hook.remove()
    assert answer.interrupted and answer.token_ids == () and answer.text == ""
    assert answer.decode_tokens_per_second == 0.0


def test_a_seed_repeats_a_sample_and_leaves_the_global_state_alone(model, tokenizer):
    def sample(seed):
        return kvbudget.generate(
            model, tokenizer, "hello", policy="full", max_new_tokens=20, do_sample=True, temperature=2.0, seed=seed
        ).token_ids

    state = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(state, torch.get_rng_state())


def test_beams_equal_those_of_the_stock_cache(model, tokenizer):
    answer = kvbudget.generate(model, tokenizer, "hello there", policy="full", max_new_tokens=12, num_beams=3)
    expected = stock(model, tokenizer, "<user>hello there\n<assistant>", max_new_tokens=12, num_beams=3)
    assert list(answer.token_ids) == expected


def test_turns_go_on_from_the_same_cache(model, tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    first = kvbudget.generate(model, tokenizer, messages, policy="full", max_new_tokens=12, **PRINTABLE)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "go on"}]
    log = []
    second = kvbudget.generate(
        model, tokenizer, messages, cache=first.cache, max_new_tokens=12,
        progress=lambda done, total: log.append(total), **PRINTABLE,
    )  # fmt: skip
    assert log[-1] == 1 + len("\n<user>go on\n<assistant>") - 1
    fresh = kvbudget.generate(model, tokenizer, messages, policy="full", max_new_tokens=12, **PRINTABLE)
    assert second.token_ids == fresh.token_ids
    assert second.report.question_visible is False, "the first turn was kept before the second was known"


def test_forks_of_one_context_answer_several_questions(model, tokenizer):
    context = KVCache(model, "kvzip", "40%")
    ids = tokenizer(f"<user>{CONTEXT}\n", return_tensors="pt").input_ids
    context.prefill(model, ids, tokenizer=tokenizer)
    for question in ("who?", "where?"):
        answer = kvbudget.generate(model, tokenizer, CONTEXT, question=question, cache=context.fork(), max_new_tokens=6)
        alone = kvbudget.generate(
            model, tokenizer, CONTEXT, question=question, policy="kvzip", budget="40%", max_new_tokens=6
        )
        assert answer.token_ids == alone.token_ids
    assert context.get_seq_length() == ids.shape[1]


def test_a_cache_of_another_text_is_refused(model, tokenizer):
    first = kvbudget.generate(model, tokenizer, "hello", policy="full", max_new_tokens=4, **PRINTABLE)
    with pytest.raises(CacheError, match="at position 6"):
        kvbudget.generate(model, tokenizer, "Jello, is it me you are looking for?", cache=first.cache)
    with pytest.raises(CacheError, match="nothing is new"):
        kvbudget.generate(model, tokenizer, "h", cache=first.cache)
    changed = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "not what it said"}]
    with pytest.raises(CacheError, match="cache has seen token"):
        kvbudget.generate(model, tokenizer, changed, cache=first.cache, question="and?")


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("", {}, "prompt is empty"),
        (" \n", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([{"role": "user", "content": ""}], {}, "prompt is empty"),
        ([{"role": "user"}], {}, "needs a 'role' and a 'content'"),
        ([{"role": "user", "content": "x"}], {"chat": False}, "messages need a chat template, and chat=False"),
        ("x", {"question": " "}, "question is empty"),
        ("x", {"protect": "system"}, "no message of this role"),
        ("x" * 1000, {}, "exceed the model's 1024 positions; shorten"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("x", {"num_return_sequences": 2, "do_sample": True}, "one answer at a time"),
        ("x", {"num_beams": 2, "stream": print}, "cannot be streamed"),
        ("x", {"policy": "nosuch"}, "unknown method"),
        ("x", {"budget": "many"}, "cannot read the budget"),
    ],
)
def test_bad_input_is_refused_in_one_line(model, tokenizer, prompt, options, message):
    with pytest.raises(KVBudgetError, match=message) as error:
        kvbudget.generate(model, tokenizer, prompt, **options)
    assert "\n" not in str(error.value)


def test_a_cache_excludes_a_second_policy(model, tokenizer):
    cache = KVCache(model, "full")
    for extra in ({"policy": "snapkv"}, {"budget": 10}, {"protect": "user"}):
        with pytest.raises(KVBudgetError, match="pass either it or them"):
            kvbudget.generate(model, tokenizer, "hello", cache=cache, **extra)


def test_a_long_prompt_can_be_asked_for(tokenizer):
    model = tiny_model("llama", max_position_embeddings=50)
    with pytest.warns(UserWarning, match="exceed the model's 50 positions"):
        kvbudget.generate(model, tokenizer, "x" * 50, policy="full", max_new_tokens=2, allow_long=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvbudget.generate(model, tokenizer, "x", policy="full", max_new_tokens=2)
    with pytest.raises(KVBudgetError, match="a table that ends there"):
        kvbudget.generate(tiny_model("gpt2"), tokenizer, "x" * 2000, allow_long=True)


def test_methods_without_a_template_in_the_tokenizer_take_texts_only(model, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(KVBudgetError, match="the tokenizer has no chat template"):
        kvbudget.generate(model, tokenizer, [{"role": "user", "content": "x"}])
