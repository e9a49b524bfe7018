"""For all tests: examples have no deadline, since a busy machine is no failure."""

from hypothesis import settings

# Whatever else hypothesis chose for this place (in CI: the same examples every time) stays.
settings.register_profile("treeswarm", settings(deadline=None))
settings.load_profile("treeswarm")
