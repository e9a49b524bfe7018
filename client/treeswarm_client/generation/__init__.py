"""The generation loop and what belongs to one generation: appends, answers, text, statistics."""
