"""What scorers, budgets and mergers have in common: they say what they need to see beyond keys and values."""


class Stage:
    """One of the three stages of a fold.

    Keys and values reach every cache. The rest comes from the model's attention, so a cache whose stages need any of it
    has to be given the model: `MergingDynamicCache(model=model, ...)`.
    """

    needs_queries: bool = False
    """True if the stage reads `states.queries`, or a scorer's `observe` does."""
    query_window: int = 64
    """How many of the last queries `states.queries` should hold, where `needs_queries`."""
    needs_hidden_states: bool = False
    """True if `observe` reads `states.hidden_states`."""
    needs_rotary: bool = False
    """True if the stage reads `states.rotary`."""
    needs_module: bool = False
    """True if the stage reads `states.module`."""

    @property
    def needs_attention(self) -> bool:
        """Whether the stage can do with keys and values alone (False), or not."""
        return self.needs_queries or self.needs_hidden_states or self.needs_rotary or self.needs_module
