"""The browser's live page: activations of a typed text, and steering."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import reseal
from viewer_runs import NEURONS

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.open_harvest import open_harvested
from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.models.open import encoder_of
from cratelm.models.sites import capture, hooked
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.replace import replace
from cratelm.replace.simulators import read_simulators
from cratelm.replace.text import BatchText
from cratelm.results.replacement import read_stored_explainer
from cratelm.runs import Run
from cratelm.steer.config import SteerConfig
from cratelm.steer.edits import Edit
from cratelm.steer.steer import steer
from cratelm.text.claim import claim
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train
from cratelm.viewer.run_reader import Library

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")


from cratelm.viewer.live import LONGEST_TEXT, Busy, Live
from cratelm.viewer.live_explanations import LiveExplanations


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
        assert s.explanation == claim(texts[NEURONS * s.layer + s.index])
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


# ---- the model on its explanations ----------------------------------------------------------------


@pytest.fixture(scope="module")
def explanations(live) -> LiveExplanations:
    return LiveExplanations(live)


class OnExplanations:
    """The same with hooks on the whole model, from the stored explanations: log-probabilities [1 + T, V]."""

    def __init__(self, run: Path, model: str, text: str):
        self.held = open_harvested(Run(run), model)
        encoder = encoder_of(self.held.subject, Run(run))
        self.ids = torch.tensor([[encoder.start, *encoder.encode(text).tolist()]])
        document = np.zeros(tuple(self.ids.shape), int)
        document[:, 0] = -1
        explainer = read_stored_explainer(Run(run), model)
        strings = self.held.store.token_strings
        stored = read_simulators(run / "replacement" / model, explainer, strings)
        of_text = BatchText(self.ids.numpy(), document)
        self.predicted = [torch.from_numpy(of.predict(of_text))[None] for of in stored]
        self.true = capture(self.held.subject.model, self.held.site, self.ids)

    def run(self, codes: list[torch.Tensor]) -> torch.Tensor:
        subject = self.held.subject.model
        with torch.no_grad(), hooked(subject, self.held.site, lambda place, _: codes[place]):
            return subject(input_ids=self.ids).logits[0].log_softmax(-1)


@pytest.mark.parametrize("model", ["crate-2l", "gpt2-2l"])
def test_both_predictions_of_each_token(run, explanations, model):
    by_hand = OnExplanations(run, model, TEXT)
    plain, replaced = by_hand.run(by_hand.true), by_hand.run(by_hand.predicted)
    found = explanations.read("run", model, TEXT)
    following = by_hand.ids[0, 1:]
    assert found.explainer in ("lookup", "trie")
    assert found.cut == 0
    assert len(found.tokens) == len(following) + 1
    assert "".join(t.token for t in found.tokens).startswith("the river")
    for of, rows in (("model", plain), ("explained", replaced)):
        predictions = [getattr(t, of) for t in found.tokens]
        losses = [p.loss for p in predictions]
        expected = -rows[:-1].gather(1, following[:, None])[:, 0]
        assert losses[-1] is None
        assert losses[:-1] == pytest.approx(expected.tolist(), abs=1e-4)
        best = rows.max(-1)
        assert [p.probability for p in predictions] == pytest.approx(best.values.exp().tolist(), abs=1e-5)  # fmt: skip
        assert {"model": found.loss, "explained": found.loss_explained}[of] == pytest.approx(expected.mean().item(), abs=1e-5)  # fmt: skip
    kl = (plain.exp() * (plain - replaced)).sum(-1)
    assert [t.kl for t in found.tokens] == pytest.approx(kl.tolist(), abs=1e-5)
    assert kl.max() > 1e-4  # the two do differ


@pytest.mark.parametrize("model", ["crate-2l", "gpt2-2l"])
@pytest.mark.parametrize("place", ["inside", "first", "end"])
def test_what_explanations_cost_at_a_token(run, explanations, model, place):
    by_hand = OnExplanations(run, model, TEXT)
    plain, replaced = by_hand.run(by_hand.true), by_hand.run(by_hand.predicted)
    last = by_hand.ids.shape[1] - 1
    position = {"inside": last // 2, "first": 0, "end": last}[place]
    found = explanations.predict("run", model, TEXT, position)
    p, q = plain[position], replaced[position]
    target = int(p.argmax()) if place == "end" else int(by_hand.ids[0, position + 1])
    assert (found.loss, found.loss_explained) == pytest.approx((-p[target].item(), -q[target].item()), abs=1e-4)  # fmt: skip
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-5)
    total = sum(n.cost for n in found.neurons) + found.others
    assert total == pytest.approx(found.loss_explained - found.loss, abs=1e-3)
    assert found.dropped == 0
    assert found.layers == ((1,) if model == "crate-2l" else (0, 1))
    costs = [n.cost for n in found.neurons]
    assert costs == sorted(costs, reverse=True)
    assert all(c > 0 for c in costs)
    texts = explanations.live.library.table("run", model).explanations
    text = explanations.read("run", model, TEXT)
    for n in found.neurons:
        row = n.position + 1  # the first is the start token
        assert row <= position
        if model == "crate-2l":  # only the codes at the last token reach the prediction
            assert row == position
        assert n.true == pytest.approx(by_hand.true[n.layer][0, row, n.index].item(), abs=1e-5)
        assert n.predicted == pytest.approx(by_hand.predicted[n.layer][0, row, n.index].item(), abs=1e-6)  # fmt: skip
        if n.position >= 0:
            before = "".join(t.token for t in text.tokens[:row])
            assert before.endswith("".join(n.context))
            assert text.tokens[n.position].token == n.context[-1]
            assert len(n.context) <= 4
        assert n.explanation == claim(texts[NEURONS * n.layer + n.index])
    actual = [t for t in found.tokens if t.is_actual]
    assert [t.token for t in actual] == ([] if place == "end" else [found.target])
    assert {found.target} <= {t.token for t in found.tokens}
    top = [sum(t.model for t in found.tokens), sum(t.explained for t in found.tokens)]
    assert all(0 < of <= 1 for of in top)


def test_the_neuron_named_first_is_the_one_whose_explanation_is_spoiled(run, live, explanations):
    """One neuron of the last layer is predicted to be 50 times its maximum: nothing costs more."""
    explanations.predict("run", "gpt2-2l", TEXT, 5)
    _, explained, predictors = explanations._explained("run", "gpt2-2l")

    class Spoiled:
        def predict(self, text):
            predicted = predictors[1].predict(text).copy()
            predicted[:, 11] = 50 * max(1e-3, live.library.table("run", "gpt2-2l").maximum.max())
            return predicted

        def context_length(self, *_):
            return 1

    name = live.beside["explained"][0]
    live.beside["explained"] = name, explained, [predictors[0], Spoiled()]
    costs = []
    for position in range(2, 9):
        table = live.library.table("run", "gpt2-2l")
        found = explanations._predict("run", "gpt2-2l", TEXT, position, table)
        neurons = {(n.layer, n.index): n for n in found.neurons}
        if found.loss_explained - found.loss > 0.1:
            assert max(neurons, key=lambda n: neurons[n].cost) == (1, 11)
            costs.append(neurons[1, 11].cost)
    assert costs
    del live.beside["explained"]


def test_explanations_of_another_model_are_not_held(live, explanations):
    explanations.read("run", "crate-2l", "a stone")
    assert live.beside["explained"][1].model is live._model[1].subject.model
    live.activations("run", "gpt2-2l", "a stone, another model", 0, 0)
    assert live.beside == {}
    explanations.read("run", "gpt2-2l", "a stone")
    assert live.beside["explained"][1].model is live._model[1].subject.model
    model = live._model[1].subject.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_answers_are_those_of_the_explanations_of_now(copy):
    live = Live(Library([copy]))
    explanations = LiveExplanations(live)
    before = explanations.read("copy", "gpt2-2l", TEXT)
    assert explanations.read("copy", "gpt2-2l", TEXT) is before
    replace(ReplaceConfig(run=copy, model="gpt2-2l", explainers=("lookup:1",), tokens=300, neuron_tokens=0, curve_tokens=0, resamples=20, quiet=True, force=True))  # fmt: skip
    after = explanations.read("copy", "gpt2-2l", TEXT)
    assert after.explainer == "lookup:1"
    assert after.loss == pytest.approx(before.loss)
    assert after.loss_explained != pytest.approx(before.loss_explained)
    harvest(HarvestConfig(run=copy, model="gpt2-2l", tokens=2600, pilot_tokens=256, device="cpu", force=True))  # fmt: skip
    with pytest.raises(InputError, match=r"replacement/gpt2-2l is out of date, .*cratelm replace"):
        explanations.read("copy", "gpt2-2l", TEXT)
    shutil.rmtree(copy / "replacement" / "crate-2l")
    with pytest.raises(InputError, match=r"crate-2l is missing .* type `cratelm replace --run .* --model crate-2l` first"):  # fmt: skip
        explanations.predict("copy", "crate-2l", TEXT, 1)
    assert set(live.library.not_explained("copy", ("crate-2l", "gpt2-2l"))) == {"crate-2l", "gpt2-2l"}  # fmt: skip
    live.close()


def test_the_explainer_is_the_stored_one_that_loses_least(copy):
    folder = copy / "replacement" / "crate-2l"
    summary = json.loads((folder / "summary.json").read_text())
    losses = {row["explainer"]: row["loss_replaced"]["value"] for row in summary["rows"] if (row["layers"], row["control"]) == ("all", "none")}  # fmt: skip
    best, other = sorted(losses, key=lambda name: losses[name])
    assert read_stored_explainer(Run(copy), "crate-2l") == best
    for simulators, expected in (([other], other), ([], None)):
        (folder / "summary.json").write_text(json.dumps(summary | {"simulators": simulators}))
        reseal(folder)
        if expected:
            assert read_stored_explainer(Run(copy), "crate-2l") == expected
        else:
            with pytest.raises(InputError, match=r"no stored explanations .* --model crate-2l --force`"):  # fmt: skip
                read_stored_explainer(Run(copy), "crate-2l")


def test_explanations_over_http(client):
    def ask(kind, **body):
        question = {"model": "crate-2l", "text": TEXT} | body
        return client.post(f"/api/r/run/live/{kind}", json=question, headers={"origin": "http://127.0.0.1"})  # fmt: skip

    text = ask("explained").json()
    assert text["tokens"][-1]["model"]["loss"] is None
    n = len(text["tokens"]) - 1
    assert ask("predicted", position=n).json()["neurons"]
    for kind, body, problem in (
        ("predicted", {"position": n + 1}, f"token {n + 1}: the text has tokens 0 to {n - 1}, and {n} is the one that follows"),
        ("predicted", {"position": -1}, "position: "),
        ("explained", {"text": "x" * (LONGEST_TEXT + 1)}, "text: "),
        ("explained", {"model": "crate-2l-init"}, "cratelm replace --run"),
        ("explained", {"model": "x"}, "no harvest of x"),
    ):  # fmt: skip
        answer = ask(kind, **body)
        assert answer.status_code in (400, 404)
        assert problem in answer.json()["error"]
    page = client.get("/r/run/live").text
    missing = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["missing"]
    assert list(missing) == ["crate-2l-init"]
    assert "type `cratelm replace --run" in missing["crate-2l-init"]


def test_hostile_text_runs_on_explanations(explanations):
    for text in ("\x00", "\ud800", "\u202e\x1b[31m", "\n" * 50, "word " * 700):
        found = explanations.read("run", "gpt2-2l", text)
        assert len(found.tokens) <= 64
        explanations.predict("run", "gpt2-2l", text, len(found.tokens) - 1)
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
