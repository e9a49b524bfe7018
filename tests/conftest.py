"""For all tests: examples have no deadline, since a busy machine is no failure; programs under test obey Ctrl-C."""

import signal

from hypothesis import settings

# Whatever else hypothesis chose for this place (in CI: the same examples every time) stays.
settings.register_profile("treeswarm", settings(deadline=None))
settings.load_profile("treeswarm")

# A shell starts background jobs with SIGINT ignored, and every process below them inherits that: a program that a test
# interrupts would run for ever.  With a handler here, processes that are started have the signal's default action.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
