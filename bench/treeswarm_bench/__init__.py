"""Measuring treeswarm: benchmarks, a WAN lab, a simulator."""

__version__ = "0.1.0"
