"""asv suite: one class a subject. `asv run --python=same` from the root; see the README."""
