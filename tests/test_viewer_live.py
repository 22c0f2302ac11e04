"""The browser's live page: activations of a typed text, and steering."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from viewer_runs import NEURONS

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.open_harvest import open_harvested
from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.models.open import encoder_of
from cratelm.models.sites import capture
from cratelm.runs import Run
from cratelm.steer.config import SteerConfig
from cratelm.steer.edits import Edit
from cratelm.steer.steer import steer
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train
from cratelm.viewer.run_reader import Library

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")


from cratelm.viewer.live import LONGEST_TEXT, Busy, Live


@pytest.fixture
def run(viewer_run) -> Path:
    return viewer_run


@pytest.fixture
def copy(viewer_run, tmp_path) -> Path:
    shutil.copytree(viewer_run, tmp_path / "copy")
    return tmp_path / "copy"


TEXT = "the river <script>alert('corpus')</script> import stone 🙂\n\t  x"


@pytest.mark.parametrize("model", ["crate-2l", "gpt2-2l"])
def test_activations_are_the_models(run, live, model):
    held = open_harvested(Run(run), model)
    encoder = encoder_of(held.subject, Run(run))
    ids = torch.tensor([[encoder.start, *encoder.encode(TEXT).tolist()]])
    wanted = capture(held.subject.model, held.site, ids)[1][0, 1:, 7]
    found = live.activations("run", model, TEXT, 1, 7)
    assert found.values == pytest.approx(wanted.tolist())
    assert "".join(found.tokens).startswith("the river")
    assert found.cut == 0
    assert found.maximum == next(s.maximum for s in read_summaries(run / "activations" / model, "held_out") if (s.neuron.layer, s.neuron.index) == (1, 7))  # fmt: skip


def test_the_strongest_neurons_at_a_token(run, live):
    maxima = {(s.neuron.layer, s.neuron.index): s.maximum for s in read_summaries(run / "activations" / "crate-2l", "held_out")}  # fmt: skip
    found = live.strongest("run", "crate-2l", TEXT, 2)
    shares = {}
    for (layer, index), maximum in maxima.items():
        if maximum > 0:
            value = live.activations("run", "crate-2l", TEXT, layer, index).values[2]
            shares[layer, index] = value / maximum
    best = sorted(shares.values(), reverse=True)[: len(found)]
    assert [s.share for s in found] == pytest.approx([b for b in best if b > 0], rel=1e-5)
    assert all(shares[s.layer, s.index] == pytest.approx(s.share, rel=1e-5) for s in found)
    with pytest.raises(InputError, match="token 4000: the text has tokens 0 to"):
        live.strongest("run", "crate-2l", TEXT, 4000)


@pytest.mark.parametrize("operation", ["set", "add", "scale", "zero"])
def test_steering_is_that_of_the_verb(run, live, operation):
    value = True if operation == "zero" else 3.0
    edit = Edit(1, 7, **{operation: value})
    found = live.steer("run", "crate-2l", TEXT, edit, 5)
    wanted = steer(SteerConfig(run=run, model="crate-2l", neurons=("1:7",), text=TEXT, generate=5, **{operation: value}))  # fmt: skip
    assert found.kl == pytest.approx(wanted.next_token.kl, abs=1e-6)
    assert (found.plain, found.steered) == (wanted.continuation, wanted.steered_continuation)
    chances = {t.token: (t.before, t.after) for t in found.chances}
    for c in wanted.next_token.gains[:3]:
        assert chances[c.token] == pytest.approx((c.before, c.after), abs=1e-6)
    plain = live.steer("run", "crate-2l", TEXT, Edit(1, 7, add=0.0), 5)
    assert plain.kl == 0
    assert plain.plain == plain.steered == found.plain


def test_answers_are_those_of_the_harvest_and_explanations_of_now(copy):
    live = Live(Library([copy]))
    edit = Edit(1, 7, add=3.0)

    def asked():
        return (
            live.activations("copy", "gpt2-2l", TEXT, 1, 7),
            live.strongest("copy", "gpt2-2l", TEXT, 2),
            live.steer("copy", "gpt2-2l", TEXT, edit, 2),
        )

    before = asked()
    assert all(a is b for a, b in zip(before, asked(), strict=True))  # remembered
    explain(ExplainConfig(run=copy, model="gpt2-2l", neurons=40, quiet=True, explainers=("trie",), max_entries=1, force=True))  # fmt: skip
    texts = live.library.table("copy", "gpt2-2l").explanations
    for s in live.strongest("copy", "gpt2-2l", TEXT, 2):
        assert s.explanation == texts[NEURONS * s.layer + s.index]
    train(TrainConfig(run=copy, model="gpt2-2l", name="gpt2-2l", steps=2, seed=1, quiet=True, tensorboard=False, force=True, validate_every=2, model_overrides=("hidden_size=16", "num_attention_heads=2"), sequence_length=64, validation_sequences=8, batch_size=4))  # fmt: skip
    harvest(HarvestConfig(run=copy, model="gpt2-2l", tokens=2500, pilot_tokens=256, device="cpu", force=True))  # fmt: skip
    other = Live(Library([copy]))  # which remembers nothing
    after = asked()
    assert after[0] == other.activations("copy", "gpt2-2l", TEXT, 1, 7)
    assert after[1] == other.strongest("copy", "gpt2-2l", TEXT, 2)
    assert after[2] == other.steer("copy", "gpt2-2l", TEXT, edit, 2)
    assert all(a != b for a, b in zip(before, after, strict=True))
    live.close()
    other.close()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda model: shutil.rmtree(model), "cratelm train"),
        (lambda model: (model / "model.safetensors").unlink(), r"model\.safetensors is damaged"),
        (lambda model: (model / "model.safetensors").write_bytes(b"cut"), r"model\.safetensors is damaged"),
        (lambda model: (model / "config.json").write_text("{"), r"config\.json is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_told_at_once(copy, monkeypatch, damage, told):
    def asked(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", asked)
    damage(copy / "model" / "gpt2-2l")
    live = Live(Library([copy]))
    with pytest.raises(InputError, match=told) as error:
        live.activations("copy", "gpt2-2l", "stone", 1, 7)
    assert "\n" not in str(error.value)
    assert live.activations("copy", "crate-2l", "stone", 1, 7).values
    live.close()


def test_a_folder_that_was_harvested_and_is_gone_is_told_at_once(copy, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    done = copy / "activations" / "gpt2-2l" / "completed.json"
    told = json.loads(done.read_text())
    done.write_text(
        json.dumps(told | {"checksum": "", "config": told["config"] | {"model": "models/mine"}})
    )
    with pytest.raises(InputError, match="models/mine does not exist"):
        open_harvested(Run(copy), "gpt2-2l")


def test_texts_that_the_model_is_not_asked_about(live):
    for text, told in (("x" * (LONGEST_TEXT + 1), "4,001 characters, but at most 4,000"), ("", "empty")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            live.activations("run", "crate-2l", text, 1, 7)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"text": ""}, "text: "),
        ({"text": "x" * (LONGEST_TEXT + 1)}, "text: "),
        ({"neuron": 64}, "crate-2l has no neuron 64 in layer 1"),
        ({"layer": 3}, "has no neuron 7 in layer 3"),
        ({"model": "../x"}, "no harvest of ../x"),
        ({"value": 1e99}, "value: "),
        ({"operation": "explode"}, "operation: "),
        ({"tokens": 65}, "tokens: "),
        ({"more": 1}, "more: "),
    ],
)
def test_bad_questions_are_told(client, asked, told):
    body = {"model": "crate-2l", "text": TEXT, "layer": 1, "neuron": 7, "operation": "set", "value": 1.0}  # fmt: skip
    answer = client.post("/api/r/run/live/steer", json=body | asked, headers={"origin": "http://127.0.0.1"})  # fmt: skip
    assert answer.status_code in (400, 404)
    assert told in answer.json()["error"]


def test_hostile_text_is_read(live):
    for text in ("\x00", "\ud800", "\u202e\x1b[31m", "\n" * 50, "word " * 700):
        found = live.activations("run", "crate-2l", text, 0, 0)
        assert len(found.tokens) == len(found.values) <= 63
    assert found.cut > 0


def test_ten_clients_at_once(run, library):
    live = Live(library)
    problems, done = [], []

    def client(number):
        try:
            for turn in range(4):
                text = f"client {number} river turn {turn}"
                found = live.activations("run", ("crate-2l", "gpt2-2l")[number % 2], text, 1, 3)
                assert "".join(found.tokens) == text
                done.append(found)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live.close()
    assert problems == []
    assert len(done) == 40


def test_a_long_line_is_told_instead_of_waited_for(library, monkeypatch):
    monkeypatch.setattr("cratelm.viewer.live._PATIENCE", 0.3)
    live = Live(library)
    gate = threading.Event()
    live._worker.submit(gate.wait)
    with pytest.raises(Busy, match="did not answer within"):
        live.activations("run", "crate-2l", "a", 0, 0)
    held = [live._waiting.acquire(blocking=False) for _ in range(100)]
    with pytest.raises(Busy, match="too many requests"):
        live.activations("run", "crate-2l", "b", 0, 0)
    for _ in range(sum(held)):
        live._waiting.release()
    gate.set()
    assert live.activations("run", "crate-2l", "c", 0, 0).tokens
    live.close()


def test_one_model_is_held_at_a_time(live):
    live.activations("run", "crate-2l", "a stone", 0, 0)
    live.activations("run", "gpt2-2l", "a stone", 0, 0)
    assert live._model[0][1] == "gpt2-2l"
    model = live._model[1].subject.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
