"""Write `notebooks/steer_a_neuron.ipynb`, executed, from the cells below.

    python scripts/write_notebook.py

The test of the notebook runs the same cells. They take about a minute on two cores, in a folder that is removed.
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PATH = Path(__file__).parent.parent / "notebooks" / "steer_a_neuron.ipynb"
CELLS = (
    (
        "# From a text to a steered neuron\n\n"
        "A small CRATE model comes with cratelm. Its neurons are found, explained and scored on Python source files, and one"
        " of them is turned up while the model writes. Nothing is downloaded.",
        'import cratelm\n\nRUN = "runs/notebook"\nmodel = cratelm.load("mini:crate-2l").float()\nsite = cratelm.site_of(model)\nprint(site.name, "-", model.config.num_hidden_layers, "layers of", model.config.num_neurons, "neurons")',
    ),
    (
        "A run is a folder. The first stage turns a corpus into tokens, and its documents into three splits: `fit`, from"
        " which neurons are explained, `held_out`, on which explanations are scored, and `train`.",
        'tokens = cratelm.api.tokenize(\n    run=RUN, corpus="builtin", tokenizer="mini:crate-2l", sequence_length=256, fit=0.15, held_out=0.15, quiet=True\n)\nprint(tokens.tokens)',
    ),
    (
        "The harvest collects, for every neuron, the excerpts on which it fires most, random ones, and statistics.",
        'harvested = cratelm.api.harvest(run=RUN, model="mini:crate-2l", tokens=40_000, sequence_length=256, quiet=True)\nprint("dead:", harvested.dead, " neurons:", harvested.neurons)',
    ),
    (
        "Explanations are made from the split `fit`, here by programs: a look-up of the last token, and a trie of contexts.",
        'cratelm.api.explain(run=RUN, model="crate-2l", neurons=48, explainers=("lookup", "trie"), quiet=True)',
    ),
    (
        "An explanation is scored by how well it predicts the neuron on documents that it was not made from, next to the"
        " explanation of another neuron.",
        'cratelm.api.score(run=RUN, model="crate-2l", resamples=500, quiet=True);',
    ),
    (
        "Scores are files; here are the neurons whose strongest tokens the explanation finds best, with the average precision"
        " over all held-out tokens.",
        'from cratelm.explain.store import read_explanations\nfrom cratelm.score.store import read_whole_scores\n\nscores = {\n    s.neuron: s.precision_top\n    for s in read_whole_scores(f"{RUN}/scores/crate-2l")\n    if s.explainer == "trie" and s.control == "none" and s.precision_top is not None and s.neuron.layer == 1\n}\nbest = sorted(scores, key=scores.get, reverse=True)[:8]\nsentences = {e.neuron: e.text for e in read_explanations(f"{RUN}/explanations/crate-2l") if e.explainer == "trie"}\nfor neuron in best:\n    print(f"{neuron.index:4d}  {scores[neuron]:.2f}  {sentences[neuron].splitlines()[0][:110]}")',
    ),
    (
        "Two held-out excerpts of the first of them. The token at the peak is between « ».",
        'from cratelm.activations.store import read_records\nfrom cratelm.tokens.shards import TokenStore\n\nneuron = best[0]\ntokenizer = TokenStore(f"{RUN}/tokens").tokenizer\n(record,) = read_records(f"{RUN}/activations/crate-2l", "held_out", layers=[1], indices=[neuron.index])\nfor excerpt in record.of_kind("top")[:2]:\n    ids, peak = list(excerpt.token_ids), int(excerpt.activations.argmax())\n    before, token, after = (tokenizer.decode(part) for part in (ids[:peak], ids[peak : peak + 1], ids[peak + 1 :]))\n    print(f"{excerpt.activations.max():.2f}  {before[-60:]!r} «{token}» {after[:30]!r}")',
    ),
    (
        "What does the neuron write? Its atom in the dictionary, through the final norm and the unembedding, raises the"
        " logits of these tokens.",
        'import pandas as pd\n\neffects = cratelm.api.effects(run=RUN, model="crate-2l", neurons=48, tokens=512, positions=4, quiet=True)\ntable = pd.read_parquet(effects.path / "logit_effects.parquet")\nrow = table[(table.layer == 1) & (table["index"] == neuron.index) & (table.kind == "exact")].iloc[0]\nprint("promoted:", list(row.promoted)[:8])',
    ),
    (
        "Now the neuron is turned up while the model writes. In CRATE nothing passes round the code, so that the edit is exact:"
        " no reconstruction is between the neuron and the output.",
        'import torch\nfrom cratelm import Edit\n\nprompt = "def read(self, path):\\n    "\nids = torch.tensor([tokenizer.encode(prompt).ids])\npeak = float(record.summary.maximum)\nfor strength in (0, 1, 3):\n    edits = [Edit(layer=1, neurons=neuron.index, set=strength * peak)] if strength else []\n    with cratelm.steering(model, *edits):\n        out = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)\n    print(f"x {strength}:", repr(tokenizer.decode(out[0, ids.shape[1] :].tolist())))',
    ),
    (
        "The share of the next-token probability that the promoted tokens have, over the strength of the edit.",
        'import matplotlib.pyplot as plt\n\nwanted = [tokenizer.token_to_id(t) for t in tokenizer.get_vocab() if tokenizer.decode([tokenizer.token_to_id(t)]) in set(row.promoted)]\nstrengths, shares = [0, 0.5, 1, 2, 3, 4], []\nfor strength in strengths:\n    edits = [Edit(layer=1, neurons=neuron.index, set=strength * peak)] if strength else []\n    with torch.no_grad(), cratelm.steering(model, *edits):\n        shares.append(float(model(ids).logits[0, -1].softmax(-1)[wanted].sum()))\nfigure, axes = plt.subplots(figsize=(4.5, 2.6))\naxes.plot(strengths, shares, marker="o")\naxes.set(xlabel="activation / maximum on held-out text", ylabel="probability of promoted tokens")\nfigure.tight_layout()\nprint([round(s, 3) for s in shares])',
    ),
)
"""a sentence or two, and code, of each of the ten steps"""


def notebook() -> nbformat.NotebookNode:
    """Return the notebook without outputs."""
    cells = [
        cell for words, code in CELLS for cell in (new_markdown_cell(words), new_code_cell(code))
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # otherwise random
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=cells, metadata=kernel)


def executed(folder: str | Path) -> nbformat.NotebookNode:
    """Return the notebook with its outputs, executed in a folder. Raises an error if a cell does."""
    made = notebook()
    NotebookClient(made, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in made.cells:
        cell.metadata = {}  # times
        cell["outputs"] = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"] if cell.cell_type == "code" else cell.get("outputs")  # fmt: skip
        if cell["outputs"] is None:
            del cell["outputs"]
    made.metadata.pop("language_info", None)
    return made


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        done = executed(folder)
    PATH.parent.mkdir(exist_ok=True)
    nbformat.write(done, PATH)
    print(PATH)
