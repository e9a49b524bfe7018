"""The generation loop: draft, ship, walk, commit."""
