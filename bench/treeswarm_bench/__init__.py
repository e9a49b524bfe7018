"""Measuring treeswarm: benchmarks, a WAN lab, a simulator."""
