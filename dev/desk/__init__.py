"""The experiment desk's shared leaf modules: what runs left, optional packages, charts."""
