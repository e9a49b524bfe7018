"""A WAN lab: network namespaces on one Linux machine, joined by links of given delay, jitter, rate and loss."""

from treeswarm_bench.lab.lab import Lab, LabHost, LinkTraffic, wan_lab
from treeswarm_bench.lab.namespaces import can_make_namespaces
from treeswarm_bench.lab.shape import LabLink

__all__ = ["Lab", "LabHost", "LabLink", "LinkTraffic", "can_make_namespaces", "wan_lab"]
