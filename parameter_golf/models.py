"""A trained model for other programs."""

from __future__ import annotations  # what it annotates with is imported when a model is loaded

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.hub import Loaded


class Model:
    """What `parameter_golf.load` returns."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded  # the module, the config and the statistics, for who wants to go below this

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe by section, as recipe.toml has it."""
        from formats.recipe import get_recipe

        return get_recipe(self.loaded.cfg)

    @property
    def num_params(self) -> int:
        """The number of trained weights."""
        return sum(param.numel() for param in self.loaded.model.parameters())

    def generate(
        self, prompt: str = "", max_tokens: int = 64, temperature: float = 1.0, seed: int = 0
    ) -> str:
        """Continue a prompt until the model ends the document; temperature 0 takes the likeliest tokens."""
        from eval.hub import generate
        from scoring.generate import Sampling

        return generate(self.loaded, prompt, Sampling(max_tokens, temperature, seed=seed))

    def log_likelihood(self, text: str, context: str = "") -> float:
        """Return the nats, at most 0, of a text's probability at a document's start, or after a context."""
        from eval.likelihood import Scorer

        return Scorer.of(self.loaded).score_pairs([(context, text)])[0].log_prob

    def bits_per_byte(self, text: str) -> float:
        """Return the bits that the model pays for each byte of a document, its UTF-8 bytes."""
        import math

        size = len(text.encode())
        if not size:
            raise ValueError("text: expected at least one character, found none.")
        return -self.log_likelihood(text) / math.log(2) / size

    def save(self, folder: str | Path) -> Path:
        """Write the model as a folder that `load` reads, with a model card; it may be published as it is."""
        from eval.hub import save

        return save(self.loaded, folder)
