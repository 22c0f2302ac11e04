"""The page of a study: claims of the paper beside what was measured, the frontier, seeds, and what the budget cannot tell."""
