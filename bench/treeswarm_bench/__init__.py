"""Measurements of treeswarm: benchmarks, a WAN lab, and a simulator."""

__version__ = "0.1.0"
