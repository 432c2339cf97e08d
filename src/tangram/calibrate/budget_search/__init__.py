"""From statistics to measured budgets: candidates, moves, and the engine that tells."""
