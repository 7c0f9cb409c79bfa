"""Makes the documentation site; not part of the distribution."""
