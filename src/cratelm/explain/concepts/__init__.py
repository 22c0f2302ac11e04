"""Concepts: named predicates over token, word, line and context, and short formulas of them that explain a neuron.

lexing.py     the lexical type of each token, from the text up to it (pygments)
texts.py      tokens as text: words, previous words, lines, brackets
library.py    predicates as data (TOML) or functions; a user's own
functions.py  predicates that no regular expression expresses
features.py   which predicates hold at which tokens
formula.py    the search for the formula of a neuron, and its payload
predict.py    predictions of many payloads at once
sentence.py   a formula in words
"""
