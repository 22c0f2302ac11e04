"""Language models that explain, simulate and judge: requests, ledger, budget, backends, prompts."""
