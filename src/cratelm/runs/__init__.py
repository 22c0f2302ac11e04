"""The run directory: stages, how they are written, and what they are made from.

```
runs/NAME/
  manifest.json                     all finished stages, collected from the records below
  tokens/                           shards, tokenizer, documents
  model/MODEL/  activations/MODEL/  explanations/MODEL/  scores/MODEL/   one folder per model
  replacement/MODEL/  steer/MODEL/  analysis/MODEL/  seeds/MODEL/  sae/MODEL@NAME/   likewise
  tuning/MODEL/  probes/MODEL/      likewise
  report/
```
"""

from cratelm.runs.atomic import atomic_folder, atomic_path, lock, write_json, write_text
from cratelm.runs.config import (
    Options,
    Settings,
    at_least,
    at_most,
    check_resamples,
    config_dict,
    known_fields,
    not_in_identity,
    options_of,
    settings_of,
)
from cratelm.runs.identity import git_commit, hash_file, hash_json, versions
from cratelm.runs.memory import check_memory
from cratelm.runs.stage import (
    STAGES,
    Completion,
    Draft,
    Freshness,
    Inputs,
    Run,
    Stage,
    StageName,
    identity_of,
)
from cratelm.runs.verified import RECORD

__all__ = [
    "RECORD",
    "STAGES",
    "Completion",
    "Draft",
    "Freshness",
    "Inputs",
    "Options",
    "Run",
    "Settings",
    "Stage",
    "StageName",
    "at_least",
    "at_most",
    "atomic_folder",
    "atomic_path",
    "check_memory",
    "check_resamples",
    "config_dict",
    "git_commit",
    "hash_file",
    "hash_json",
    "identity_of",
    "known_fields",
    "lock",
    "not_in_identity",
    "options_of",
    "settings_of",
    "versions",
    "write_json",
    "write_text",
]
