"""What each parameter of a request may be, and what it does: one table, from which the page of parameters is made."""
