"""Networks of fewer parts: what can be taken out of them, what that costs, and taking it out."""
